"""Laws of the paged store: nobody's block is touched, a step of everything equals its parts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from ivl.cpu import accelerate
from ivl.model.cache import BlockPool, CachedSequence, CacheFull, PagedCache
from ivl.model.vlm import VLM
from tests.conftest import tiny_config


def test_blocks_are_free_used_or_kept_whatever_happens() -> None:
    rng, pool = random.Random(0), BlockPool(12)
    held: list[list[int]] = []
    for step in range(2000):
        if rng.random() < 0.5:
            count = rng.randint(1, 4)
            if count > pool.num_available:
                continue
            blocks = pool.take(count)
            assert not set(blocks) & {block for others in held for block in others}
            for block in blocks:
                if rng.random() < 0.6:
                    pool.register(block, bytes([rng.randrange(30)]))
            held.append(blocks)
        elif rng.random() < 0.3 and pool.cached:
            found = pool.find([rng.choice(list(pool.cached))])
            pool.hold(found)
            held.append(found)
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        used = {block for blocks in held for block in blocks}
        assert sorted([*pool.free, *pool.evictable, *used]) == list(range(12)), step
        assert all(pool.users[block] == sum(blocks.count(block) for blocks in held) for block in range(12))
        assert {block: {n for n, b in pool.cached.items() if b == block} for block in pool.hashes} == {
            block: set(names) for block, names in pool.hashes.items()
        }


def test_a_chain_is_found_as_far_as_it_is_known_and_given_up_from_its_end() -> None:
    pool = BlockPool(3)
    blocks = pool.take(3)
    for block, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.register(block, name)
    pool.release(blocks)
    assert pool.find([b"a", b"b", b"x"]) == blocks[:2] and pool.find([b"b"]) == blocks[1:2]
    taken = pool.take(1)
    assert taken == blocks[2:] and pool.find([b"a", b"b", b"c"]) == blocks[:2]
    pool.hold(blocks[:1])
    assert pool.num_available == 1 and pool.take(1) == blocks[1:2]


@torch.no_grad()
def test_sharing_and_copying_equal_computing(tiny: VLM) -> None:
    cache = PagedCache(tiny.config.decoder, num_tokens=128, block_size=8)
    tokens = torch.randint(0, 90, (21,))
    first, second, alone = CachedSequence(), CachedSequence(), CachedSequence()
    step = cache.step([first], (20,))
    tiny(tokens[:20], step.layout, cache=step)
    cache.resume(second, first.blocks[:2])
    cache.append_copy(second, first.blocks[2], 4)
    assert second.length == 20 and second.blocks[:2] == first.blocks[:2] and second.blocks[2] != first.blocks[2]
    step = cache.step([second], (1,))
    shared = tiny(tokens[20:], step.layout, cache=step)
    step = cache.step([first], (1,))
    tiny(torch.tensor([5]), step.layout, cache=step)  # goes on in its own block
    cache.release(first)
    step = cache.step([alone], (21,))
    assert (tiny(tokens, step.layout, cache=step)[-1:] - shared).abs().max() <= 1e-5
    cache.release(second)
    cache.release(alone)
    assert cache.pool.num_available == cache.num_blocks


@torch.no_grad()
def test_a_full_cache_gives_up_what_is_kept(tiny: VLM) -> None:
    cache = PagedCache(tiny.config.decoder, num_tokens=16, block_size=8)
    sequence, other = CachedSequence(), CachedSequence()
    cache.step([sequence], (16,))
    cache.pool.register(sequence.blocks[0], b"kept")
    cache.release(sequence)
    assert list(cache.pool.evictable) and cache.pool.num_available == 2
    cache.step([other], (16,))
    assert not cache.pool.cached
    with pytest.raises(CacheFull, match="1 blocks of 8 tokens needed, 0 of 2 free"):
        cache.step([CachedSequence()], (1,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
@torch.no_grad()
def test_replies_and_prompts_of_one_step_equal_each_alone(dtype: torch.dtype, tolerance: float, accelerated: bool) -> None:
    """Replies, prompts that continue and prompts that begin, in any order."""
    config = tiny_config()
    torch.manual_seed(0)
    model = VLM(replace(config, decoder=replace(config.decoder, width=64, mlp_width=128, head_dim=64, num_layers=3))).eval()
    model.init_weights()
    model = accelerate(model.to(dtype)) if accelerated else model.to(dtype)
    for lens in [
        [(1, 30), (1, 71), (80, 40), (5, 90), (41, 300), (40, 0), (3, 0)],
        [(70, 0), (1, 9), (66, 64), (1, 64), (1, 0)],
        [(1, 3), (1, 0), (90, 17)],
    ]:
        tokens = [torch.randint(0, 90, (past + new,)) for new, past in lens]
        outcomes = []
        for together in (True, False):
            cache = PagedCache(model.config.decoder, num_tokens=2048, block_size=16, dtype=dtype)
            sequences = [CachedSequence() for _ in lens]
            for sequence, every, (_, past) in zip(sequences, tokens, lens, strict=True):
                if past:
                    step = cache.step([sequence], (past,))
                    model(every[:past], step.layout, cache=step)
            hidden = []
            groups = [range(len(lens))] if together else [[n] for n in range(len(lens))]
            for group in groups:
                step = cache.step([sequences[n] for n in group], tuple(lens[n][0] for n in group))
                hidden.append(model(torch.cat([tokens[n][lens[n][1] :] for n in group]), step.layout, cache=step))
            outcomes.append(torch.cat(hidden).float())
        assert (outcomes[0] - outcomes[1]).abs().max() <= tolerance
