"""Prompts and samples: shifted labels, weights, budgets, shared tiles, limits."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ivl.checkpoint import load_processor, save_processor
from ivl.errors import InputError
from ivl.processing.augment import Augmentation
from ivl.processing.chat import render, user
from ivl.processing.image import tile_image
from ivl.processing.processor import Processor, SampleOptions
from ivl.types import IGNORE, ImageRef, Message, Record, Text, VideoRef
from tests.helpers.processors import processor_for


def says(text: str) -> Message:
    return Message("assistant", (Text(text),))


def record(*conversations) -> Record:
    return Record("7", conversations, "rows.jsonl:12", "shapes")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three files of different shape: 4:1, square, 1:2; and a folder of six frames."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for name, (width, height) in {"wide.png": (112, 28), "square.png": (84, 84), "tall.png": (40, 80)}.items():
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / name)
    (root / "video").mkdir()
    for n in range(6):
        Image.fromarray(draw.integers(0, 256, (20, 90, 3), dtype=np.uint8)).save(root / "video" / f"{n}.png")
    return root


WIDE, SQUARE, TALL = (ImageRef(f"{name}.png") for name in ("wide", "square", "tall"))


def options(root, **given) -> SampleOptions:
    return SampleOptions(root=str(root), **given)


def test_labels_are_the_next_trained_token(processor, images):
    conversation = (user("<image>\nWhat?", SQUARE), says("A cat."), user("Sure?"), says("Yes."))
    sample = processor.sample(record(conversation), options=options(images))
    rendered = render(conversation, [sample.num_tiles], processor.tokenizer, tokens_per_tile=processor.config.tokens_per_tile)
    assert sample.tokens_T.tolist() == rendered.ids and sample.seq_lens == (len(rendered.ids),)
    expected = [i if on else IGNORE for i, on in zip(rendered.ids, rendered.trained, strict=True)]
    assert sample.labels_T.tolist() == [*expected[1:], IGNORE]
    assert sample.tokens_T.dtype == sample.labels_T.dtype == sample.tile_ids_R.dtype == torch.int64
    assert (sample.id, sample.source, sample.dataset) == ("7", "rows.jsonl:12", "shapes")
    runs = int((sample.tokens_T == processor.config.image_token_id).sum()) / processor.config.tokens_per_tile
    assert runs == len(sample.tile_ids_R) == sample.num_tiles


def test_training_begins_with_the_prompt(processor, images):
    question = user("<image>\nWhat?", WIDE)
    sample = processor.sample(record((question, says("\nA cat."))), options=options(images))
    prompt = processor.prompt((question,), root=str(images))
    n = len(prompt.tokens_T)
    assert sample.tokens_T[:n].equal(prompt.tokens_T)
    assert sample.tiles_GSSC.equal(prompt.tiles_GSSC) and sample.tile_ids_R.equal(prompt.tile_ids_R)
    assert (sample.labels_T[: n - 1] == IGNORE).all() and sample.labels_T[n - 1] == sample.tokens_T[n]


@pytest.mark.parametrize(("averaging", "power"), [("token", 0), ("sample", -1), ("square", -0.5)])
def test_weights(processor, averaging, power):
    record_ = record((user("Q"), says("A cat."), user("Q"), says("Yes.")), (user("Q"), says("No.")))
    sample = processor.sample(record_, options=SampleOptions(averaging=averaging))
    assert sample.weights_T.dtype == torch.float32
    for labels, weights in zip(sample.labels_T.split(sample.seq_lens), sample.weights_T.split(sample.seq_lens), strict=True):
        on = labels != IGNORE
        n = int(on.sum())
        assert torch.allclose(weights[on], torch.tensor(float(n**power))) and not weights[~on].any() and labels[-1] == IGNORE


def test_budgets(processor, images):
    def tiles(*refs, **given) -> int:
        return processor.sample(record((user("Q", *refs), says("A"))), options=options(images, **given)).num_tiles

    assert tiles(WIDE) == 5 and tiles(WIDE, max_tiles_per_image=2) == 3, "4x1 and 2x1, and the thumbnail"
    assert tiles(WIDE, SQUARE, TALL) == 5 + 5 + 3, "12 // 3 tiles each"
    assert tiles(*[replace(SQUARE, max_tiles=n) for n in (1, 4)], TALL) == 1 + 5 + 3, "an image's own cap comes first"
    assert tiles(WIDE, SQUARE, TALL, max_tiles_per_image=2) == 3
    assert len(processor.prompt((user("Q", WIDE, SQUARE, TALL),), root=str(images)).tiles_GSSC) == 13
    many = processor.sample(record((user("Q", WIDE), says("A"), user("Q", SQUARE, TALL), says("A"))), options=options(images))
    assert many.num_tiles == 13, "images of all turns count"


def test_equal_media_share_tiles(processor, images):
    q = "<image>\nQ"
    picture = Image.open(images / "tall.png")
    pair = record(
        (user(q, SQUARE), says("A")),
        (user(q, ImageRef("square.png")), says("B")),
        (user(q, ImageRef(picture)), says("C")),
        (user(q, ImageRef(picture)), says("D")),
        (user(f"{q}<image>", SQUARE, SQUARE), says("E")),
    )
    sample = processor.sample(pair, options=options(images))
    one = tile_image(Image.open(images / "square.png"), processor.tiling)
    n = len(one)
    assert sample.tiles_GSSC[:n].equal(one)
    ids = sample.tile_ids_R.tolist()
    assert ids[: 2 * n] == [*range(n)] * 2
    m = len(tile_image(picture, processor.tiling))
    assert ids[2 * n : 2 * n + 2 * m] == [*range(n, n + m)] * 2
    halves = tile_image(Image.open(images / "square.png"), processor.tiling, 6)  # two images: half the budget each
    assert ids[2 * n + 2 * m :] == [*range(n + m, n + m + len(halves))] * 2
    assert sample.num_tiles == n + m + len(halves) and len(sample.seq_lens) == 5


def test_videos(processor, images):
    ref = VideoRef("video")
    asked = record((user("<video>\nQ", ref), says("A")))
    counts = set()
    for seed in range(20):
        given = options(images, generator=random.Random(seed), min_frames=2, max_frames=4, augment=Augmentation())
        sample = processor.sample(asked, options=given)
        counts.add(sample.num_tiles)
        again = processor.sample(asked, options=replace(given, generator=random.Random(seed)))
        assert sample.tokens_T.equal(again.tokens_T) and sample.tiles_GSSC.equal(again.tiles_GSSC)
    assert counts == {2, 3, 4}
    frames = [tile_image(Image.open(images / "video" / f"{n}.png"), processor.tiling, 1)[0] for n in range(6)]
    for tile in sample.tiles_GSSC:
        assert any(tile.equal(frame) for frame in frames), "one tile per frame, never degraded"
    prompt = processor.prompt((user("Q", ref),), root=str(images), num_frames=3)
    assert [next(i for i, f in enumerate(frames) if tile.equal(f)) for tile in prompt.tiles_GSSC] == [0, 2, 3]
    assert "Frame-3: <img>" in processor.tokenizer.decode(prompt.tokens_T.tolist(), skip_special=False)
    assert len(processor.prompt((user("Q", replace(ref, num_frames=2)),), root=str(images)).tiles_GSSC) == 2


def test_jpeg_degradation_repeats_with_its_generator(processor, images):
    asked = record((user("Q", SQUARE), says("A")))
    clean = processor.sample(asked, options=options(images)).tiles_GSSC
    one, two, other = (
        processor.sample(asked, options=options(images, augment=Augmentation(), generator=random.Random(s))).tiles_GSSC
        for s in (1, 1, 2)
    )
    assert one.equal(two) and not one.equal(clean) and not one.equal(other)
    with pytest.raises(ValueError, match="generator"):
        SampleOptions(augment=Augmentation())


def test_limits(processor, images):
    conversation = (user("Q", SQUARE), says("One."), user("Q", TALL), says("Two."), user("Q"), says("Three."))
    whole = processor.sample(record(conversation), options=options(images))
    fits = options(images, max_tokens=whole.num_tokens)
    assert processor.sample(record(conversation), options=fits).tokens_T.equal(whole.tokens_T)
    with pytest.raises(InputError, match=rf"^rows.jsonl:12: {whole.num_tokens} tokens .* limits are {whole.num_tokens - 1}"):
        processor.sample(record(conversation), options=replace(fits, max_tokens=whole.num_tokens - 1))
    cut = processor.sample(record(conversation), options=replace(fits, max_tokens=whole.num_tokens - 1, overflow="truncate"))
    n = cut.num_tokens
    assert cut.tokens_T.equal(whole.tokens_T[:n]) and cut.num_tiles == whole.num_tiles
    less = processor.sample(record(conversation), options=replace(fits, max_tokens=n - 1, overflow="truncate"))
    assert less.tokens_T.equal(whole.tokens_T[: less.num_tokens]), "tile budgets do not change when turns go"
    assert less.num_tiles < whole.num_tiles and less.tile_ids_R.tolist() == [*range(less.num_tiles)]
    said = less.labels_T[less.labels_T != IGNORE].tolist()
    assert processor.tokenizer.decode(said) == "One."
    with pytest.raises(InputError, match=r"rows\.jsonl:12"):
        processor.sample(record(conversation), options=replace(fits, max_tokens=10, overflow="truncate"))


def test_limits_are_the_whole_sample_s(processor, images):
    first = (user("Q", SQUARE), says("One."))
    talks = (first, (user("Q", SQUARE), says("Two."), user("Q", TALL), says("Three.")), (user("Q"), says("Four.")))
    many = replace(record(first), conversations=talks)
    whole = processor.sample(many, options=options(images))
    cut = processor.sample(many, options=options(images, max_tokens=whole.num_tokens - 1, overflow="truncate"))
    assert cut.seq_lens == whole.seq_lens[:2] and cut.num_tiles == whole.num_tiles
    square = processor.sample(record(first), options=options(images)).num_tiles
    fewer = processor.sample(many, options=options(images, max_total_tiles=whole.num_tiles - 1, overflow="truncate"))
    assert (
        fewer.num_tiles < whole.num_tiles and fewer.seq_lens[0] == whole.seq_lens[0] and fewer.seq_lens[1] < whole.seq_lens[1]
    )
    assert fewer.seq_lens[2] == whole.seq_lens[2], "a conversation that fits stays whole"
    with pytest.raises(InputError, match=rf"{square} tiles, the limits are inf and {square - 1}, and no reply fits"):
        processor.sample(record(first), options=options(images, max_total_tiles=square - 1, overflow="truncate"))


def test_a_long_reply_is_trained_from_its_beginning(processor, images):
    """Overflow `cut`: ids and labels are those of the whole sample up to the limit, as the reference cuts them."""
    conversation = (user("Q", SQUARE), says("One."), user("Q"), says("Two, and more, and more, and more."))
    whole = processor.sample(record(conversation), options=options(images))
    start = whole.labels_T.tolist().index(processor.tokenizer.encode("One.")[0])
    for limit in range(start + 2, whole.num_tokens):
        cut = processor.sample(record(conversation), options=options(images, max_tokens=limit, overflow="cut"))
        assert cut.tokens_T.equal(whole.tokens_T[:limit]) and cut.num_tiles == whole.num_tiles and cut.seq_lens == (limit,)
        assert cut.labels_T.tolist() == [*whole.labels_T[: limit - 1].tolist(), IGNORE] and cut.cut.endswith(
            f"to {limit} and 10"
        )
    for limit in (start + 1, start, 5):  # nothing would be trained
        with pytest.raises(InputError, match=rf"limits are {limit} and inf, and no reply fits"):
            processor.sample(record(conversation), options=options(images, max_tokens=limit, overflow="cut"))


def test_no_image_is_cut_through(processor, images):
    """Where the limit lies before the end of an image, whole turns go, as with `truncate`."""
    conversation = (user("Q"), says("One."), user("Q", SQUARE), says("Two."))
    whole = processor.sample(record(conversation), options=options(images))
    end = processor.tokenizer.id("</img>")
    last = whole.tokens_T.tolist().index(end)
    given = options(images, max_tokens=last, overflow="truncate")
    first = processor.sample(record(conversation), options=given)
    same = processor.sample(record(conversation), options=replace(given, overflow="cut"))
    assert same.tokens_T.equal(first.tokens_T) and same.num_tiles == 0
    more = processor.sample(record(conversation), options=replace(given, max_tokens=last + 1, overflow="cut"))
    assert more.num_tokens == last + 1 and more.num_tiles == 10
    talks = replace(record((user("Q"), says("One."))), conversations=((user("Q"), says("One.")), conversation[:2]))
    alone = processor.sample(talks, options=options(images))
    fewer = processor.sample(talks, options=options(images, max_tokens=alone.num_tokens - 2, overflow="cut"))
    assert fewer.seq_lens == (alone.seq_lens[0], alone.seq_lens[1] - 2)


@pytest.mark.parametrize(
    ("conversations", "problem"),
    [
        (((user("Q"),),), "no token is trained"),
        ((), "no conversation"),
        (((user("Q"), says("")),), "empty reply"),
        (((user("Q", ImageRef("gone.png")), says("A")),), "gone.png"),
    ],
)
def test_errors_begin_with_the_source(processor, conversations, problem):
    with pytest.raises(InputError, match=rf"^rows.jsonl:12: .*{problem}"):
        processor.sample(record(*conversations))


def test_text_only(processor):
    prompt = processor.prompt((user("Hi"),))
    assert prompt.tiles_GSSC.shape == (0, 28, 28, 3) and prompt.tiles_GSSC.dtype == torch.uint8 and len(prompt.tile_ids_R) == 0


def test_pixel_cap(tokenizer, images):
    config = processor_for(tokenizer).config
    with pytest.raises(InputError, match="the limit is 100"):
        Processor(config, tokenizer, max_pixels=100).prompt((user("Q", SQUARE),), root=str(images))


def test_tokenizer_of_another_model_is_refused(tokenizer):
    config = processor_for(tokenizer).config
    with pytest.raises(InputError, match=f"has id {config.image_token_id}, the model's is 5"):
        Processor(replace(config, image_token_id=5), tokenizer)
    with pytest.raises(InputError, match="unknown template"):
        Processor(replace(config, template="none"), tokenizer)


@pytest.mark.parametrize("dialect", ["internvl_chat", "transformers"])
def test_saved_and_loaded_beside_a_model(tokenizer, images, tmp_path, dialect):
    from ivl.checkpoint import save_model
    from ivl.model.vlm import VLM

    ours = processor_for(tokenizer, "plain-chatml", max_tiles=6, min_tiles=2)
    model = VLM(ours.config)
    model.init_weights()
    save_model(model, tmp_path, dialect=dialect)
    save_processor(ours, tmp_path)
    again = load_processor(tmp_path)
    assert again.config == ours.config and again.tiling == ours.tiling
    conversation = (user("What is <ref>it</ref>?", SQUARE), says("A cat."), user("Sure?", VideoRef("video")))
    one, two = (p.prompt(conversation, root=str(images)) for p in (ours, again))
    assert one.tokens_T.equal(two.tokens_T) and one.tiles_GSSC.equal(two.tiles_GSSC) and one.tile_ids_R.equal(two.tile_ids_R)


def test_frames_over_time_in_samples_and_prompts(processor, tmp_path):
    """A GIF whose second half is slow: by numbers half of the frames are fast ones, over time nearly none."""
    shades = [Image.new("RGB", (28, 28), (30 * n, 0, 0)) for n in range(8)]
    shades[0].save(tmp_path / "a.gif", save_all=True, append_images=shades[1:], duration=[100] * 4 + [2000] * 4)

    def shown(tiles) -> list[int]:
        return [round(float(tile[..., 0].float().mean()) / 30) for tile in tiles]

    video = VideoRef("a.gif", num_frames=4)
    asked = record((user("Q", video), says("A")))
    by = {name: options(tmp_path, frames="middle", frames_by=name) for name in ("index", "time")}
    found = {name: shown(processor.sample(asked, options=each).tiles_GSSC) for name, each in by.items()}
    assert found == {"index": [0, 2, 4, 6], "time": [0, 5, 6, 7]}
    over_time = processor.prompt((user("Q", replace(video, frames_by="time")),), root=str(tmp_path))
    assert shown(over_time.tiles_GSSC) == [0, 5, 6, 6]
