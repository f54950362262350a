"""One decoder for Qwen2.5, Qwen3, InternLM2.5 and LLaMA-shaped language models, on the flat token axis."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from ivl.config import DecoderConfig
from ivl.model.attention import Sdpa, attend
from ivl.model.cache import CacheStep
from ivl.model.devices import send
from ivl.model.linear import Linear, swiglu
from ivl.types import Layout

Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, [T, 1, H] each."""


def rotary(config: DecoderConfig, layout: Layout, device: torch.device, dtype: torch.dtype) -> Rotary:
    """Return the rotary factors of every token. Positions count from 0 within each sequence, past included.

    With dynamic NTK scaling, a sequence longer than max_positions uses a larger base that depends on its length.
    """
    spans = zip(layout.past_lens, layout.total_lens, strict=True)
    positions = [torch.arange(past, total, dtype=torch.float32) for past, total in spans]
    bases = [rotary_base(config, total) for total in layout.total_lens]
    if len(set(bases)) == 1:
        return rotary_at(config, send(torch.cat(positions), device), bases[0], dtype)
    parts = [rotary_at(config, send(p, device), base, dtype) for p, base in zip(positions, bases, strict=True)]
    cos, sin = (torch.cat(factors) for factors in zip(*parts, strict=True))
    return cos, sin


def rotary_at(config: DecoderConfig, positions_T: torch.Tensor, base: float, dtype: torch.dtype) -> Rotary:
    """Return the rotary factors of positions."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions_T.device) / config.head_dim
    angles_T1H = torch.outer(positions_T, 1.0 / base**half).repeat(1, 2).unsqueeze(1)
    return angles_T1H.cos().to(dtype), angles_T1H.sin().to(dtype)


def rotary_base(config: DecoderConfig, length: int) -> float:
    """Return the rotary base for a sequence of a length (as transformers' `_compute_dynamic_ntk_parameters`)."""
    factor = config.rope_dynamic_factor
    if factor is None or length <= config.max_positions:
        return config.rope_theta
    stretch = factor * length / config.max_positions - (factor - 1)
    return config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2))


def rotate(x_TNH: torch.Tensor, factors: Rotary) -> torch.Tensor:
    """Rotate queries and keys to their positions. The two halves of a head are the real and imaginary parts."""
    cos, sin = (factor.to(x_TNH.dtype) for factor in factors)
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat([-second, first], dim=-1) * sin


class DecoderLayer(nn.Module):
    """One layer: attention and a gated MLP, each with an RMS norm before and a residual around it."""

    backend: Sdpa | None = None
    """The attention backend; None takes the backend of the table in attention.py."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv_parts = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        self.norm1 = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.qkv = Linear(config.width, q_rows + 2 * kv_rows, bias=config.qkv_bias, parts=qkv_parts)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.out = Linear(q_rows, config.width, bias=False)
        self.norm2 = nn.RMSNorm(config.width, eps=config.norm_eps)
        gate_up_parts = (("gate_proj", config.mlp_width), ("up_proj", config.mlp_width))
        self.gate_up = Linear(config.width, 2 * config.mlp_width, bias=False, parts=gate_up_parts)
        self.down = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_TD: torch.Tensor, factors: Rotary, layout: Layout, cache: CacheStep | None, layer: int) -> torch.Tensor:
        """Residual stream in, residual stream out; layer is this layer's index in the cache."""
        heads_TNH = self.attend(self.qkv(self.norm1(x_TD)), factors, layout, cache, layer)
        x_TD = x_TD + self.out(heads_TNH.flatten(1))
        return x_TD + self.down(swiglu(self.gate_up(self.norm2(x_TD))))

    def attend(
        self, qkv_TX: torch.Tensor, factors: Rotary, layout: Layout, cache: CacheStep | None, layer: int
    ) -> torch.Tensor:
        """Rotate and attend. qkv_TX holds query, key and value heads side by side. Returns out_TNH."""
        N, K = self.num_heads, self.num_kv_heads
        qk_TXH, v_TKH = qkv_TX.view(len(qkv_TX), N + 2 * K, self.head_dim).split((N + K, K), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            qk_TXH = torch.cat([self.q_norm(qk_TXH[:, :N]), self.k_norm(qk_TXH[:, N:])], dim=1)
        turned_TXH = rotate(qk_TXH, factors)
        return attend(turned_TXH[:, :N], turned_TXH[:, N:], v_TKH, layout, cache, layer, self.backend)


class Decoder(nn.Module):
    """Embeddings, layers, a final norm and an output head of its own (embeddings are never tied)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        # Left unset, like every weight: drawing it would cost, even on the meta device, 2 s of imports.
        self.embeddings = nn.Embedding(config.vocab_size, config.width, _weight=torch.empty(config.vocab_size, config.width))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x_TD: torch.Tensor, layout: Layout, cache: CacheStep | None = None) -> torch.Tensor:
        """Turn embedded tokens into normalized hidden states, [T, D] each; raises ValueError for a layout of other tokens."""
        if layout.num_tokens != len(x_TD):
            raise ValueError(f"layout describes {layout.num_tokens} tokens but {len(x_TD)} were given")
        factors = self.rotary(x_TD, layout)
        for number, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x_TD = checkpoint(layer, x_TD, factors, layout, cache, number, use_reentrant=False)  # pyright: ignore
            else:
                x_TD = layer(x_TD, factors, layout, cache, number)
        return self.norm(x_TD)

    def rotary(self, x_TD: torch.Tensor, layout: Layout) -> Rotary:
        """Return the rotary factors for the layers, in the dtype of the tokens."""
        return rotary(self.config, layout, x_TD.device, x_TD.dtype)

    def init_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Initialize a tensor randomly as the parameter of this name, for training from nothing."""
        if "norm" in name or name.endswith("bias"):
            nn.init.constant_(tensor, float("norm" in name))
        else:
            nn.init.normal_(tensor, std=0.02)
