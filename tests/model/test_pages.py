"""One call of flash attention over pages of the cache is what attend() computes kind by kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from ivl.model.attention import SDPA, VARLEN, attend
from ivl.model.cache import CachedSequence, PagedCache
from tests.conftest import tiny_config
from tests.helpers.pretend import by_pages


def in_words(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: None, max_q: int, max_k: int, *, window_size: tuple[int, int],
    enable_gqa: bool, seqused_k: Any, block_table: Any, num_splits: int,
) -> Any:  # fmt: skip
    """The documented meaning of torch's varlen_attn with a block table."""
    assert window_size == (-1, 0) and enable_gqa and cu_seq_k is None
    return by_pages(query, key, value, cu_seq_q, seqused_k, block_table, (max_q, max_k))


@torch.inference_mode()
@pytest.mark.parametrize("size", [16, 256])
def test_pages_equal_every_kind(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", in_words)
    torch.manual_seed(0)
    config = tiny_config().decoder
    caches = [PagedCache(config, num_tokens=4096, block_size=size) for _ in range(2)]
    sequences = [[CachedSequence() for _ in range(5)] for _ in range(2)]
    for lens in ((40, 3, 17, 1, 300), (1, 1, 1, 1, 1), (1, 1, 30, 1, 5), (1, 64, 1, 1, 1), (1, 1, 1, 1, 1)):
        q_TNH = torch.randn(sum(lens), config.num_heads, config.head_dim)
        k_TKH, v_TKH = torch.randn(2, sum(lens), config.num_kv_heads, config.head_dim)
        steps = [cache.step(each, lens) for cache, each in zip(caches, sequences, strict=True)]
        by_kind, at_once = (
            attend(q_TNH, k_TKH, v_TKH, step.layout, step, 1, backend)
            for step, backend in zip(steps, (SDPA, VARLEN), strict=True)
        )
        torch.testing.assert_close(at_once, by_kind, atol=1e-5, rtol=1e-5)
