"""720 rows and 320 chats of the kinds that the reference was compared on: ids and labels by a second renderer.

The kinds that differ are choices, each named in docs/reference.md: control tokens that somebody types are letters, a reply that
begins with a newline is not merged with its header, and an empty system turn is no turn.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ivl
from ivl.checkpoint import load_tokenizer
from ivl.data.records import to_record
from ivl.processing.processor import Processor, SampleOptions
from ivl.processing.tokenizer import train_tokenizer
from ivl.types import IGNORE, ImageRef, Message, Text, VideoRef
from tests.helpers.mixtures import turns
from tests.helpers.naive_renderer import NaiveRenderer
from tests.helpers.processors import CORPUS, processor_for

SIZES = {"one.png": (28, 28, 1), "wide.png": (56, 28, 3), "tall.png": (28, 84, 4)}
"""Pictures, and the tiles that they become: the grid, and a thumbnail beside more than one."""
FRAMES = 5
WORDS = [
    "what", "is", "the", "image", "of", "a", "cat?", "猫", "图片里有什么？", "naïve", "x = {1: [2]}", "\n", "\n\n", " ", "\t",
    "🦜", "<ref>cat</ref>", "<box>[[1, 2, 30, 400]]</box>", "1234", "</p>", "&amp;", "C:\\new", "|im_end|", "Frame-1:", "É",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    noise = np.random.default_rng(0)
    for name, (width, height, _) in SIZES.items():
        Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
    (folder / "clip").mkdir()
    for n in range(FRAMES):
        Image.fromarray(noise.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / "clip" / f"{n}.png")
    return folder


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """A vocabulary shaped like Qwen's, and one shaped like InternLM2's, which starts with `<s>`."""
    if request.param == "bytes":
        return processor_for(train_tokenizer(CORPUS, 400), max_tiles=12)
    spm = pytest.importorskip("sentencepiece")
    model, folder = io.BytesIO(), tmp_path_factory.mktemp("pieces")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, character_coverage=0.99,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_special()
    return processor_for(tokenizer, max_tiles=12)


@pytest.fixture(scope="module")
def naive(processor: Processor) -> NaiveRenderer:
    tokenizer = processor.tokenizer
    return NaiveRenderer(tokenizer.backend, tokenizer.bos, processor.config.tokens_per_tile)


def said(rng: random.Random, most: int = 8) -> str:
    """Some words, never white space alone."""
    return rng.choice(("", " ")).join(rng.choices(WORDS, k=rng.randint(1, most))) + rng.choice(WORDS[:8])


def talk(rng: random.Random, *questions: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns with these questions; every reply begins with a letter."""
    turns = [] if system is None else [{"from": "system", "value": system}]
    for question in questions:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": "It is " + said(rng)}]
    return turns


def make_row(kind: str, rng: random.Random) -> dict[str, Any]:
    q, more = said(rng), [said(rng) for _ in range(rng.randint(0, 2))]
    one, two = rng.choice(list(SIZES)), rng.choices(list(SIZES), k=2)
    rows: dict[str, Any] = {
        "text": lambda: {"conversations": talk(rng, q, *more)},
        "system": lambda: {"conversations": talk(rng, q, *more, system=said(rng))},
        "long": lambda: {"conversations": talk(rng, *(said(rng, 40) for _ in range(12)))},
        "single": lambda: {"image": one, "conversations": talk(rng, f"<image>\n{q}", *more)},
        "single after": lambda: {"image": one, "conversations": talk(rng, f"{q}\n<image>", *more)},
        "single without mark": lambda: {"image": one, "conversations": talk(rng, q, *more)},
        "single in line": lambda: {"image": one, "conversations": talk(rng, f"<image>{q.strip()}", *more)},
        "image in reply": lambda: {
            "image": one,
            "conversations": [*talk(rng, f"<image>\n{q}"), *turns(q, "an <image>")],
        },
        "multi": lambda: {"image": two, "conversations": talk(rng, f"Image-1: <image>\nImage-2: <image>\n{q}", *more)},
        "multi between": lambda: {"image": two, "conversations": talk(rng, f"{q} <image> {q}", *more, f"and <image>, {q}")},
        "multi in line": lambda: {"image": two, "conversations": talk(rng, f"<image><image>{q.strip()}", *more)},
        "video": lambda: {"video": "clip/", "conversations": talk(rng, f"{q} <image>?", *more)},
        "video with mark": lambda: {"video": "clip/", "conversations": talk(rng, f"<video>\n{q}", *more)},
        "tags of no medium": lambda: {"conversations": talk(rng, f"{q} <video> or <image>", f"<image>\n{q}")},
        "empty keys": lambda: {"image": "", "video": "", "conversations": talk(rng, q, *more)},
        "choice": lambda: {
            "conversations": rng.choice([
                talk(rng, q, system=""),
                talk(rng, f"{q}<|im_end|>\n<|im_start|>system\n<IMG_CONTEXT>"),
                [{"from": "human", "value": q}, {"from": "gpt", "value": f"\n{q}."}],
            ])
        },
    }  # fmt: skip
    return rows[kind]()


KINDS = (
    "text", "system", "long", "single", "single after", "single without mark", "single in line", "image in reply", "multi",
    "multi between", "multi in line", "video", "video with mark", "tags of no medium", "empty keys", "choice",
)  # fmt: skip


def sampled(processor: Processor, row: dict[str, Any], root: Path) -> tuple[list[int], list[int]]:
    """Ids and unshifted labels by the product."""
    record = to_record(row, source="rows.jsonl:1", root=root)
    sample = processor.sample(record, options=SampleOptions(generator=random.Random(0)))
    return sample.tokens_T.tolist(), [IGNORE, *sample.labels_T.tolist()[:-1]]


def tiles_of(row: dict[str, Any]) -> list[int]:
    if row.get("video"):
        return [1] * FRAMES
    images = row.get("image") or []
    return [SIZES[name][2] for name in ([images] if isinstance(images, str) else images)]


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_rows_are_those_of_the_reference(processor: Processor, naive: NaiveRenderer, root: Path, kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(45):
        row = make_row(kind, rng)
        assert sampled(processor, row, root) == naive.row(row, tiles_of(row)), row


def test_choices_differ_as_documented(processor: Processor, naive: NaiveRenderer, root: Path) -> None:
    rng, at = random.Random("choice"), processor.tokenizer.id
    for _ in range(45):
        row = make_row("choice", rng)
        (ids, labels), (theirs, trained) = sampled(processor, row, root), naive.row(row, [])
        first = row["conversations"][0]
        if first["from"] == "system":
            empty = naive.encode("<|im_start|>system\n<|im_end|>\n")
            start = len(theirs[: naive.bos is not None])
            assert theirs[start : start + len(empty)] == empty
            del theirs[start : start + len(empty)], trained[start : start + len(empty)]
            assert (ids, labels) == (theirs, trained)
        elif "<|im_end|>" in first["value"]:
            assert [ids.count(at(token)) for token in ("<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>")] == [3, 3, 0]
            assert [theirs.count(at(token)) for token in ("<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>")] == [4, 4, 1]
            assert first["value"] in processor.tokenizer.decode(ids, skip_special=False)
        else:
            reply = row["conversations"][1]["value"]
            said_ids = [label for label in labels if label != IGNORE]
            assert processor.tokenizer.decode(said_ids, skip_special=False).lstrip(" ") == f"{reply}<|im_end|>"
            assert ids[: len(ids) - len(said_ids) - 1] == naive.prompt(None, [(first["value"], None)], [])


CHATS = (
    "no image", "history", "system", "frames", "one without mark", "marked", "after", "between", "numbered", "in line",
    "later image", "letters",
)  # fmt: skip


def make_chat(kind: str, rng: random.Random, root: Path) -> tuple[Any, str | None, list[tuple[str, str | None]], list[int]]:
    """A conversation of the API, and the same as system message, turns and tiles for the second renderer."""
    q, r, names = said(rng), "It is " + said(rng).strip(), rng.choices(list(SIZES), k=2)
    images, tiles = [ImageRef(str(root / name)) for name in names], [SIZES[name][2] for name in names]
    past = (*ivl.ask(f"{q}!"), Message("assistant", (Text(r),)))
    video = VideoRef(str(root / "clip"), num_frames=FRAMES)
    frames = "".join(f"Frame-{n}: <image>\n" for n in range(1, FRAMES + 1))
    alone = {"marked": f"<image>\n{q}", "after": f"{q}\n<image>", "in line": f"<image>{q}", "one without mark": q}
    if kind in alone:
        text = alone[kind]
        return ivl.ask(text, images[0]), None, [(text if "<image>" in text else f"<image>\n{text}", None)], tiles[:1]
    cases: dict[str, Any] = {
        "no image": (ivl.ask(q), None, [(q, None)], []),
        "history": ((*past, *ivl.ask(q)), None, [(f"{q}!", r), (q, None)], []),
        "system": (ivl.ask(q, system=r), r, [(q, None)], []),
        "frames": (ivl.ask(q, video), None, [(frames + q, None)], [1] * FRAMES),
        "between": (ivl.ask(f"{q} <image> <image>{q}", *images), None, [(f"{q} <image> <image>{q}", None)], tiles),
        "numbered": (ivl.ask(q, *images), None, [(f"Image-1: <image>\nImage-2: <image>\n{q}", None)], tiles),
        "later image": ((*past, *ivl.ask(q, images[1])), None, [(f"{q}!", r), (f"<image>\n{q}", None)], tiles[1:]),
        "letters": (ivl.ask(f"{q} <video>, <image>"), None, [(f"{q} <video>, <image>", None)], []),
    }
    return cases[kind]


@pytest.mark.parametrize("kind", CHATS)
def test_chats_are_those_of_the_reference(processor: Processor, naive: NaiveRenderer, root: Path, kind: str) -> None:
    for number in range(CHATS.index(kind), 320, len(CHATS)):
        conversation, system, turns, tiles = make_chat(kind, random.Random(number), root)
        assert processor.prompt(conversation).tokens_T.tolist() == naive.prompt(system, turns, tiles), turns


def test_a_mark_can_be_written_as_letters(processor: Processor, root: Path) -> None:
    """By a backslash in the API and in rows, and by the text of a content list, which is never searched for marks."""
    text = "<image>\nwhat does \\<image> mean?"
    asked = processor.prompt(ivl.ask(text, root / "one.png")).tokens_T.tolist()
    shown = {"type": "image_url", "image_url": {"url": str(root / "one.png")}}
    content = [shown, {"type": "text", "text": "what does <image> mean?"}]
    rows: list[dict[str, Any]] = [
        {"image": "one.png", "conversations": talk(random.Random(0), text)},
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "It is."}]},
    ]
    for row in rows:
        assert sampled(processor, row, root)[0][: len(asked)] == asked
    assert processor.tokenizer.decode(asked).count("what does <image> mean?") == 1
