"""Laws of the flat token axis: packed == alone, prefill + decode == one pass, checked placement."""

from __future__ import annotations

import pytest
import torch

from ivl.config import SIZES, published_config
from ivl.model.cache import CachedSequence, CacheFull, PagedCache
from ivl.model.vlm import VLM
from ivl.types import Layout

LENS = (5, 40, 1, 17, 17, 90)
PUBLISHED_COUNTS = {
    "1B": 938_193_024, "2B": 2_205_754_368, "4B": 3_712_637_952, "8B": 8_075_365_376, "26B": 25_514_186_112,
    "38B": 38_388_164_992, "78B": 78_408_318_336,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_exact_parameter_counts(size: str) -> None:
    with torch.device("meta"):
        model = VLM(published_config(size))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_COUNTS[size]


@torch.no_grad()
@pytest.mark.parametrize("lens", [LENS, (9, 9, 9), (30,), (64, 60, 3, 2)])
def test_packed_equals_alone(tiny: VLM, lens: tuple[int, ...]) -> None:
    tokens = torch.randint(0, 90, (sum(lens),))
    packed = tiny(tokens, Layout.packed(lens))
    for part, hidden in zip(tokens.split(lens), packed.split(lens), strict=True):
        alone = tiny(part, Layout.packed((len(part),)))
        assert (alone - hidden).abs().max() <= 1e-5


@torch.no_grad()
def test_prefill_in_chunks_and_decode_equal_one_pass(tiny: VLM) -> None:
    lens = (12, 33, 7)
    tokens = [torch.randint(0, 90, (n,)) for n in lens]
    whole = tiny(torch.cat(tokens), Layout.packed(lens)).split(lens)
    cache = PagedCache(tiny.config.decoder, num_tokens=256, block_size=8)
    sequences = [CachedSequence() for _ in lens]
    pieces: list[list[torch.Tensor]] = [[] for _ in lens]
    done = [0, 0, 0]
    for news in [(4, 20, 1), (3, 1, 1), (1, 5, 2), (4, 7, 3)]:
        step = cache.step(sequences, news)
        new = torch.cat([t[d : d + n] for t, d, n in zip(tokens, done, news, strict=True)])
        for i, hidden in enumerate(tiny(new, step.layout, cache=step).split(news)):
            pieces[i].append(hidden)
        done = [d + n for d, n in zip(done, news, strict=True)]
    assert tuple(done) == lens
    for piece, expected in zip(pieces, whole, strict=True):
        assert (torch.cat(piece) - expected).abs().max() <= 1e-5
    for sequence in sequences:
        cache.release(sequence)
    assert len(cache.pool.free) == cache.num_blocks


def test_full_cache_says_so_and_reserves_nothing(tiny: VLM) -> None:
    cache = PagedCache(tiny.config.decoder, num_tokens=16, block_size=8)
    sequences = [CachedSequence(), CachedSequence()]
    with pytest.raises(CacheFull, match="3 blocks of 8 tokens needed, 2 of 2 free"):
        cache.step(sequences, (8, 9))
    assert not any(s.blocks for s in sequences) and len(cache.pool.free) == 2


@torch.no_grad()
def test_vision_is_placed_exactly_or_refused(tiny: VLM) -> None:
    tiles = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    vision = tiny.encode_tiles(tiles)
    count = tiny.config.tokens_per_tile
    assert vision.shape == (2, count, 48)
    tokens = torch.tensor([1, *[90] * count, 2, *[90] * count, 3])
    embedded = tiny.embed(tokens, vision)
    assert torch.equal(embedded[1 : 1 + count], vision[0]) and torch.equal(embedded[2 + count : -1], vision[1])
    with pytest.raises(ValueError, match=f"{2 * count} image placeholder tokens but {count} vision tokens"):
        tiny.embed(tokens, vision[:1])


def test_dynamic_rope_grows_only_beyond_max_positions(tiny: VLM) -> None:
    from dataclasses import replace

    from ivl.model.decoder import rotary_base

    config = replace(tiny.config.decoder, rope_dynamic_factor=2.0, max_positions=100, rope_theta=1e4)
    assert rotary_base(config, 100) == 1e4
    assert rotary_base(config, 200) == pytest.approx(1e4 * 3 ** (16 / 14))
