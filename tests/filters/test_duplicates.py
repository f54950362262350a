"""Laws of the search for near-duplicates."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from ivl.errors import InputError
from ivl.filters import buckets
from ivl.filters.duplicates import Duplicates, find_duplicates
from ivl.types import ImageRef, Message, Record, Text, VideoRef

RULE = Duplicates()
LONG = (
    "A wooden table stands near the window, and on the table there is a blue cup with hot tea. Behind it one can see a shelf "
    "that holds some books, a lamp and a small clock. The light comes from the left, so that the cup throws a shadow."
)


def row(question: str, answer: str, *media: ImageRef | VideoRef) -> Record:
    return Record("r", ((Message("user", (*media, Text(question))), Message("assistant", (Text(answer),))),), "rows.jsonl:7")


def photo(seed: int, size: int = 96) -> Image.Image:
    """Smooth random colours and a few shapes."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = rng.integers(0, size - 20, 2).tolist()
        draw.ellipse((x, y, x + 20, y + 30), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> ImageRef:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return ImageRef(file.getvalue())


def found(signatures: Sequence[bytes], rule: Duplicates = RULE, parts: int = 1) -> list[int | None]:
    """For each row the number of the earlier one that it duplicates; the rows lie in some parts."""
    size = -(-len(signatures) // parts)
    with tempfile.TemporaryDirectory() as folder:
        both = find_duplicates(
            rule, lambda part: list(enumerate(signatures))[part * size : (part + 1) * size], parts, Path(folder)
        )
    duplicates = dict(zip(*both.tolist(), strict=True))
    return [duplicates.get(number) for number in range(len(signatures))]


def seen(records: Sequence[Record], rule: Duplicates = RULE) -> list[str | None]:
    return [None if number is None else str(number) for number in found([rule.signature(record) for record in records], rule)]


def one_by_one(signatures: Sequence[bytes], rule: Duplicates = RULE) -> list[int | None]:
    """The law: rows come in order, and each is compared with the images and the texts that are kept so far."""
    looks: list[np.ndarray] = []
    kept: list[tuple[int, bytes, bytes, np.ndarray]] = []
    answers: list[int | None] = []

    def number(look: np.ndarray) -> int:
        for n, other in enumerate(looks):
            bits, differ = np.unpackbits(look[:8] ^ other[:8]).sum(), np.abs(look[8:].astype(int) - other[8:])
            near = differ[:192].mean() <= rule.max_color and differ[192:].max() <= rule.max_detail
            if bits <= rule.max_bits and near:
                return n
        looks.append(look)
        return len(looks) - 1

    for row, signature in enumerate(signatures):
        pivots, text, videos = signature[:8], signature[8:24], signature[24:40]
        end = 44 + 1224 * int.from_bytes(signature[40:44], "little")
        shown = [number(np.frombuffer(signature[at : at + 1224], np.uint8)) for at in range(44, end, 1224)]
        media, sketch = repr(shown).encode() + videos, np.frombuffer(signature[end:], "<u4")
        alike = []
        for other, other_media, other_exact, other_sketch in kept:
            least = rule.min_similarity if other_exact[:8] == pivots else rule.same_similarity
            if other_media == media and len(sketch) == len(other_sketch) == 64:
                equal = sketch == other_sketch
                if equal.reshape(16, 4).all(axis=1).any() and equal.mean() >= least:
                    alike.append(other)
            elif other_media == media and other_exact == pivots + text:
                alike.append(other)
        answers.append(min(alike, default=None))
        if not alike:
            kept.append((row, media, pivots + text, sketch))
    return answers


def test_a_copy_names_the_earliest() -> None:
    assert seen([row("a?", "b"), row("c?", "d"), row("a?", "b"), row("a?", "b")]) == [None, None, "0", "0"]


def test_case_marks_and_spaces_do_not_matter_to_short_texts_but_every_word_does() -> None:
    rows = [row("What is it?", "A red circle."), row("what is  it", "a red circle"), row("What is it?", "A blue circle.")]
    assert seen(rows) == [None, "0", None]


def test_small_edits_of_long_texts_are_found_numbers_and_negations_are_not_small() -> None:
    rows = [
        row("Describe it.", LONG),
        row("Describe it.", LONG.replace("wooden", "large")),
        row("Describe it.", LONG.replace("hot tea", "hot taa") + " Thank you."),
        row("Describe it.", LONG.replace("a blue cup", "no blue cup").replace("books", "papers").replace("window", "door")),
        row("Describe it.", "Something else entirely: " + " ".join(reversed(LONG.split()))),
    ]
    assert seen(rows) == [None, "0", "0", None, None]


def test_same_image_other_question_and_other_image_same_question_are_kept() -> None:
    a, b = encoded(photo(1)), encoded(photo(2))
    rows = [
        row("What is it?", "A cat.", a),
        row("Which colour?", "Red.", a),
        row("What is it?", "A cat.", b),
        row("What is it?", "A cat."),
    ]
    assert seen(rows) == [None] * 4


@pytest.mark.parametrize("seed", range(8))
def test_an_image_is_known_again_after_compression_and_resizing(seed: int) -> None:
    image = photo(seed)
    changed = [
        encoded(image, "JPEG", quality=75),
        encoded(image.resize((64, 64))),
        encoded(image.resize((200, 200))),
        encoded(image, "WEBP"),
    ]
    rows = [row("What is it?", "A cat.", encoded(photo(100 + seed))), row("What is it?", "A cat.", encoded(image))]
    assert seen(rows + [row("What is it?", "A cat.", each) for each in changed]) == [None, None, "1", "1", "1", "1"]


def test_colour_alone_tells_images_apart() -> None:
    def disc(colour: str) -> ImageRef:
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((10, 10, 54, 54), fill=colour)
        return encoded(image)

    rows = [row("Is it round?", "Yes.", disc(colour)) for colour in ("#c00000", "#0060c0", "#00a000", "#c00000")]
    assert seen(rows) == [None, None, None, "0"]


def receipt(seed: int) -> Image.Image:
    """A page of words and prices in a layout that all receipts share."""
    rng, image = random.Random(seed), Image.new("RGB", (320, 400), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=18)
    draw.text((90, 20), "CORNER SHOP", "black", font)
    for line, item in enumerate(rng.sample(["milk", "bread", "rice", "apples", "coffee", "honey", "soap", "cheese"], 4)):
        draw.text((30, 80 + 40 * line), item, "black", font)
        draw.text((230, 80 + 40 * line), f"{rng.uniform(1, 30):.2f}", "black", font)
    draw.text((30, 260), "TOTAL", "black", font)
    draw.text((230, 260), f"{rng.uniform(20, 99):.2f}", "black", font)
    return image


def test_pages_of_one_layout_are_told_apart_and_their_copies_are_known() -> None:
    pages = [receipt(seed) for seed in range(40)]
    asked = [row("How many items are there?", "4", encoded(page)) for page in pages]
    copies = [
        row("How many items are there?", "4", encoded(changed, "JPEG", quality=60))
        for page in pages[:10]
        for changed in (page, page.resize((200, 250)))
    ]
    assert seen(asked + copies) == [None] * 40 + [str(number) for number in range(10) for _ in range(2)]


def test_order_of_images_and_videos_count() -> None:
    a, b = encoded(photo(1)), encoded(photo(2))
    clips = [VideoRef("v.mp4"), VideoRef("v.mp4", clip=(0.0, 2.0)), VideoRef("w.mp4")]
    rows = [row("?", "Yes.", a, b), row("?", "Yes.", b, a), row("?", "Yes.", a), *[row("?", "Yes.", clip) for clip in clips]]
    assert seen(rows) == [None] * 6
    assert seen([row("?", "Yes.", a, b), row("?", "Yes.", a, b)]) == [None, "0"]


def test_question_and_answer_do_not_run_together() -> None:
    assert seen([row("a b", "c"), row("a", "b c")]) == [None, None]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=200), st.text(max_size=200))
def test_signatures_are_pure_and_never_raise(question: str, answer: str) -> None:
    record = row(question, answer)
    assert RULE.signature(record) == RULE.signature(record)
    assert seen([record, record]) == [None, "0"]


def _corpus(size: int) -> list[Record]:
    rng = random.Random(3)
    words = LONG.split()
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(size)]
    return [row("Describe it.", text) for text in texts + [text + " Indeed." for text in texts[::3]]]


def test_parallel_signatures_give_what_one_process_gives() -> None:
    records = _corpus(60)
    with ProcessPoolExecutor(2) as pool:
        signatures = list(pool.map(RULE.signature, records, chunksize=7))
    assert signatures == [RULE.signature(record) for record in records]
    assert found(signatures)[60:] == list(range(0, 60, 3))


@pytest.mark.parametrize("seed", range(6))
def test_buckets_on_disk_find_what_comparing_row_by_row_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of edits, where a row is like one that is dropped and like none that is kept; images that drift; equal rows."""
    monkeypatch.setattr(buckets, "RANGE", 300)
    monkeypatch.setattr(buckets, "PAIRS", 7)
    rng = random.Random(seed)
    words = [f"{a}{b}" for a in ("mo", "ka", "lu", "ri", "ten") for b in ("ra", "sel", "do", "vin", "pat", "gu")]
    texts, pictures, rows = [rng.choices(words, k=50) for _ in range(4)], [photo(n, 48) for n in range(3)], []
    for _ in range(150):
        text = rng.choice(texts)
        if rng.random() < 0.7:  # the next edit begins at this one
            text = text.copy()
            for _ in range(rng.randrange(4)):
                text[rng.randrange(len(text))] = rng.choice([*words, "not"])
            texts.append(text)
        answer = " ".join(text if rng.random() < 0.7 else text[:3])
        shown = []
        if rng.random() < 0.5:
            image = rng.choice(pictures).rotate(rng.choice([0, 0, 2, 4]), fillcolor=rng.choice(["black", "grey"]))
            pictures.append(image)
            shown = [encoded(image)]
        rows.append(RULE.signature(row("Describe it.", answer, *shown)))
    law = one_by_one(rows)
    assert 30 < sum(number is not None for number in law) < 120
    assert found(rows) == found(rows, parts=7) == law


def test_signatures_are_small() -> None:
    assert len(RULE.signature(row("What?", "Yes."))) < 64
    assert len(RULE.signature(row("What?", LONG, encoded(photo(1))))) < 1600


def test_an_unreadable_image_names_the_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl:7"):
        RULE.signature(row("What?", "Yes.", ImageRef(str(tmp_path / "none.png"))))


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="min_similarity"):
        Duplicates(min_similarity=0)
    with pytest.raises(ValueError, match="max_bits"):
        Duplicates(max_bits=8)
