"""One decoder for Qwen2.5, InternLM2.5 and LLaMA-shaped language models, on the flat token axis (spec 1.3)."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ivl.config import DecoderConfig
from ivl.cpu import kernels
from ivl.model.attention import attend
from ivl.model.cache import CacheStep
from ivl.model.linear import Linear, RMSNorm, in_chunks, product, swiglu
from ivl.types import Layout

CHUNK_ROWS = 512
"""Tokens that pass the wide middle of a layer together at inference on a CPU."""
Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, [T, 1, H] each."""


def rotary(config: DecoderConfig, layout: Layout, device: torch.device, dtype: torch.dtype) -> Rotary:
    """Rotary factors of every token; positions count from 0 within each sequence, past included.

    With dynamic NTK, a sequence longer than max_positions uses a larger base that depends on its current length.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    spans = zip(layout.past_lens, layout.total_lens, strict=True)
    positions_T = torch.cat([torch.arange(past, total, dtype=torch.float32, device=device) for past, total in spans])
    bases = [rotary_base(config, total) for total in layout.total_lens]
    if len(set(bases)) == 1:
        angles = torch.outer(positions_T, 1.0 / bases[0] ** half)
    else:
        inverse_SH = torch.stack([1.0 / base**half for base in bases])
        angles = positions_T.unsqueeze(1) * inverse_SH.repeat_interleave(torch.tensor(layout.new_lens, device=device), dim=0)
    angles_T1H = angles.repeat(1, 2).unsqueeze(1)
    return angles_T1H.cos().to(dtype), angles_T1H.sin().to(dtype)


def rotary_base(config: DecoderConfig, length: int) -> float:
    factor = config.rope_dynamic_factor
    if factor is None or length <= config.max_positions:
        return config.rope_theta
    stretch = factor * length / config.max_positions - (factor - 1)
    return config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2))


def rotate(x_TNH: torch.Tensor, factors: Rotary) -> torch.Tensor:
    """Queries and keys turned to their positions; by our kernel in place where it applies."""
    if kernels.usable(x_TNH) and factors[0].dtype is torch.float32 and x_TNH.shape[-1] % 64 == 0:
        return kernels.rotate_(x_TNH, *factors)
    cos, sin = (factor.to(x_TNH.dtype) for factor in factors)
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat([-second, first], dim=-1) * sin


def decodes_by_kernel(qkv_TXH: torch.Tensor, factors: Rotary, num_heads: int, num_kv_heads: int) -> bool:
    """Whether one kernel turns, stores and attends where a sequence has one new token."""
    return (
        factors[0].dtype is torch.float32
        and kernels.usable(qkv_TXH)
        and kernels.decode_attention_usable(qkv_TXH.shape[-1], num_heads, num_kv_heads)
    )


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv_parts = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        self.norm1 = RMSNorm(config.width, eps=config.norm_eps)
        self.qkv = Linear(config.width, q_rows + 2 * kv_rows, bias=config.qkv_bias, parts=qkv_parts)
        self.out = Linear(q_rows, config.width, bias=False)
        self.norm2 = RMSNorm(config.width, eps=config.norm_eps)
        gate_up_parts = (("gate_proj", config.mlp_width), ("up_proj", config.mlp_width))
        self.gate_up = Linear(config.width, 2 * config.mlp_width, bias=False, parts=gate_up_parts)
        self.down = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_TD: torch.Tensor, factors: Rotary, layout: Layout, cache: CacheStep | None, layer: int) -> torch.Tensor:
        N, K = self.num_heads, self.num_kv_heads
        qkv_TXH = product(self.qkv, x_TD, before=self.norm1).unflatten(-1, (N + 2 * K, self.head_dim))
        n, num_seqs = 0, len(layout.new_lens)
        if cache is not None and layout.num_decoding and decodes_by_kernel(qkv_TXH, factors, N, K):
            n = layout.num_decoding
        if cache is None or n == 0:
            out_TNH = self.attend(qkv_TXH, factors, layout, cache, layer)
        else:
            cos, sin = factors
            out_TNH = cache.part(0, n).decode(layer, qkv_TXH[:n], cos[:n], sin[:n])
            if n < num_seqs:  # prompts beside the replies
                rest = cache.part(n, num_seqs)
                read_TNH = self.attend(qkv_TXH[n:], (cos[n:], sin[n:]), rest.layout, rest, layer)
                out_TNH = torch.cat([out_TNH, read_TNH])
        x_TD = product(self.out, out_TNH.flatten(1), plus=x_TD)
        return in_chunks(self.mlp, x_TD, CHUNK_ROWS)

    def attend(
        self, qkv_TXH: torch.Tensor, factors: Rotary, layout: Layout, cache: CacheStep | None, layer: int
    ) -> torch.Tensor:
        N, K = self.num_heads, self.num_kv_heads
        q_TNH, k_TKH = rotate(qkv_TXH[:, : N + K], factors).split((N, K), dim=1)
        return attend(q_TNH, k_TKH, qkv_TXH[:, N + K :], layout, cache, layer)

    def mlp(self, x_TD: torch.Tensor) -> torch.Tensor:
        return product(self.down, product(self.gate_up, x_TD, before=self.norm2), before=swiglu, plus=x_TD)


class Decoder(nn.Module):
    """Embeddings, layers, final norm and an output head of its own (embeddings are never tied)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        # Left unset, like every weight: drawing it would cost, even on the meta device, 2 s of imports.
        self.embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.width), freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x_TD: torch.Tensor, layout: Layout, cache: CacheStep | None = None) -> torch.Tensor:
        """Embedded tokens to final, normalised hidden states, [T, D] each.

        Raises:
            ValueError: if the layout does not describe exactly the given tokens.
        """
        if layout.num_tokens != len(x_TD):
            raise ValueError(f"layout describes {layout.num_tokens} tokens but {len(x_TD)} were given")
        dtype = torch.float32 if kernels.usable(x_TD) else x_TD.dtype
        factors = rotary(self.config, layout, x_TD.device, dtype)
        for number, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                args = (x_TD, factors, layout, cache, number)
                x_TD = checkpoint(layer, *args, use_reentrant=False)
            else:
                x_TD = layer(x_TD, factors, layout, cache, number)
        return self.norm(x_TD)

    def init_weights(self) -> None:
        """Random initialisation for training from nothing."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
