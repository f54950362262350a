"""The vision warm-up objective and tile flips."""

from __future__ import annotations

import pytest
import torch

from ivl.model.vlm import VLM
from ivl.recipes.nano_objectives import caption_words, flip_tiles
from ivl.types import IGNORE, Batch, Layout


def captioned(tiny: VLM, captions: list[list[int]]) -> Batch:
    """One sequence and one tile per caption; each caption ends with the end-of-turn token 91."""
    marks = tiny.config.tokens_per_tile
    tokens, labels = [], []
    for caption in captions:
        tokens += [1] + [90] * marks + [2, *caption]
        labels += [IGNORE] * (marks + 1) + [*caption, 91]
    labels_T = torch.tensor(labels)
    lens = tuple(marks + 2 + len(caption) for caption in captions)
    tiles = torch.randint(0, 256, (len(captions), 28, 28, 3), dtype=torch.uint8)
    return Batch(
        torch.tensor(tokens), labels_T, (labels_T != IGNORE).float(), tiles, torch.arange(len(captions)), Layout.packed(lens)
    )


def test_loss_is_the_mean_log_probability_of_each_tiles_own_words(tiny: VLM) -> None:
    captions = [[5, 7, 9], [11]]
    batch = captioned(tiny, captions)
    loss = caption_words(tiny, batch)
    log_probs = tiny.head(tiny.encode_tiles(batch.tiles_GSSC).mean(1)).log_softmax(-1)
    expected = -sum(log_probs[r, caption].mean() for r, caption in enumerate(captions))
    assert loss.weight == 2
    assert torch.allclose(loss.total, expected)


def test_tiles_without_words_are_an_error(tiny: VLM) -> None:
    batch = captioned(tiny, [[], []])
    with pytest.raises(ValueError, match="needs tiles with trained captions"):
        caption_words(tiny, batch)


def test_flips_keep_every_tiles_pixels_and_leave_the_batch_alone(tiny: VLM) -> None:
    batch = captioned(tiny, [[5]] * 40)
    before = batch.tiles_GSSC.clone()
    torch.manual_seed(0)
    flipped = flip_tiles(batch)
    assert torch.equal(batch.tiles_GSSC, before)
    variants = set()
    for tile, new in zip(before, flipped.tiles_GSSC, strict=True):
        forms = {}
        for transposed in (False, True):
            for dims in ((), (0,), (1,), (0, 1)):
                form = tile.flip(dims)
                forms[transposed, dims] = form.transpose(0, 1) if transposed else form
        match = [name for name, form in forms.items() if torch.equal(form, new)]
        assert len(match) == 1
        variants.add(match[0])
    assert len(variants) == 8
