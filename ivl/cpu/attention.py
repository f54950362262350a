"""The attention backend of a CPU: AMX kernels for long prompts, and short attention in plain products for training."""

from __future__ import annotations

import torch

from ivl.cpu.kernels import features, ops
from ivl.model.attention import Sdpa
from ivl.types import Layout

MIN_PADDED = 28
"""From so many new tokens on, a continued prompt is padded to the fewest that the kernel takes: torch's takes longer."""
MAX_SPELLED_OUT = 256
"""Up to this length, training spells attention out: the fused kernel's backward costs about 0.2 ms for every head of every
sequence, however short, which is several times the arithmetic."""


class CpuAttention(Sdpa):
    """Attention on a CPU. What its kernels do not take goes to scaled_dot_product_attention."""

    def rectangle(
        self, q_SNLH: torch.Tensor, k_SKLH: torch.Tensor, v_SKLH: torch.Tensor, mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        trains = torch.is_grad_enabled() and q_SNLH.requires_grad and q_SNLH.is_cpu
        if trains and mask is None and max(q_SNLH.shape[2], k_SKLH.shape[2]) <= MAX_SPELLED_OUT:
            return _spelled_out(q_SNLH, k_SKLH, v_SKLH, causal)
        if q_SNLH.dtype is torch.bfloat16 and q_SNLH.is_cpu and not features.multiplies_bfloat16():
            return super().rectangle(q_SNLH.float(), k_SKLH.float(), v_SKLH.float(), mask, causal).bfloat16()
        return super().rectangle(q_SNLH, k_SKLH, v_SKLH, mask, causal)

    def packed(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, layout: Layout) -> torch.Tensor:
        lens = layout.new_lens
        if not all(ops.attention_takes(q_TNH[:length], length) for length in lens):
            return super().packed(q_TNH, k_TKH, v_TKH, layout)
        parts = zip(q_TNH.split(lens), k_TKH.split(lens), v_TKH.split(lens), strict=True)
        return torch.cat([ops.attention(q, k, v, causal=True) for q, k, v in parts])

    def continued(self, q_TNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor) -> torch.Tensor:
        new, total = len(q_TNH), len(k_LKH)
        q = q_TNH
        if MIN_PADDED <= new < ops.MIN_QUERIES <= total and ops.takes(q_TNH):
            q = torch.cat([q_TNH.new_zeros(ops.MIN_QUERIES - new, *q_TNH.shape[1:]), q_TNH])
        if ops.attention_takes(q, total):
            return ops.attention(q, k_LKH, v_LKH, causal=True)[-new:]
        return super().continued(q_TNH, k_LKH, v_LKH)

    def tiles(self, q_GPNH: torch.Tensor, k_GPNH: torch.Tensor, v_GPNH: torch.Tensor) -> torch.Tensor:
        if not ops.attention_takes(q_GPNH[0], k_GPNH.shape[1]):
            return super().tiles(q_GPNH, k_GPNH, v_GPNH)
        tiles = zip(q_GPNH, k_GPNH, v_GPNH, strict=True)
        return torch.stack([ops.attention(q, k, v, causal=False) for q, k, v in tiles])


def _spelled_out(q_SNLH: torch.Tensor, k_SKLH: torch.Tensor, v_SKLH: torch.Tensor, causal: bool) -> torch.Tensor:
    num_seqs, num_heads, length, head_dim = q_SNLH.shape
    num_kv_heads = k_SKLH.shape[1]
    # The query heads of one key/value head become rows of one product, so keys and values are never repeated.
    q = (q_SNLH * head_dim**-0.5).reshape(num_seqs, num_kv_heads, -1, head_dim)
    scores = (q @ k_SKLH.transpose(-1, -2)).float().view(num_seqs, num_heads, length, -1)
    if causal:
        scores = scores + torch.full((length, length), float("-inf"), device=q.device).triu(1)
    weights = scores.softmax(-1).to(v_SKLH.dtype).view(num_seqs, num_kv_heads, -1, k_SKLH.shape[2])
    return (weights @ v_SKLH).view(q_SNLH.shape)


CPU_ATTENTION = CpuAttention()
