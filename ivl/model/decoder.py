"""One decoder for Qwen2.5, InternLM2.5 and LLaMA-shaped language models, on the flat token axis (spec 1.3)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ivl.config import DecoderConfig
from ivl.model.attention import attend
from ivl.model.cache import CacheStep
from ivl.model.linear import Linear
from ivl.types import Layout

Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, [T, 1, H] each."""


def rotary(config: DecoderConfig, layout: Layout, device: torch.device, dtype: torch.dtype) -> Rotary:
    """Rotary factors of every token; positions count from 0 within each sequence, past included.

    With dynamic NTK, a sequence longer than max_positions uses a larger base that depends on its current length.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    angles = []
    for new, past in zip(layout.new_lens, layout.past_lens, strict=True):
        base = rotary_base(config, past + new)
        positions = torch.arange(past, past + new, dtype=torch.float32, device=device)
        angles.append(torch.outer(positions, 1.0 / base**half))
    angles_T1H = torch.cat(angles).repeat(1, 2).unsqueeze(1)
    return angles_T1H.cos().to(dtype), angles_T1H.sin().to(dtype)


def rotary_base(config: DecoderConfig, length: int) -> float:
    factor = config.rope_dynamic_factor
    if factor is None or length <= config.max_positions:
        return config.rope_theta
    stretch = factor * length / config.max_positions - (factor - 1)
    return config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2))


def rotate(x_TNH: torch.Tensor, factors: Rotary) -> torch.Tensor:
    cos, sin = factors
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat([-second, first], dim=-1) * sin


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv_parts = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        self.norm1 = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.qkv = Linear(config.width, q_rows + 2 * kv_rows, bias=config.qkv_bias, parts=qkv_parts)
        self.out = Linear(q_rows, config.width, bias=False)
        self.norm2 = nn.RMSNorm(config.width, eps=config.norm_eps)
        gate_up_parts = (("gate_proj", config.mlp_width), ("up_proj", config.mlp_width))
        self.gate_up = Linear(config.width, 2 * config.mlp_width, bias=False, parts=gate_up_parts)
        self.down = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_TD: torch.Tensor, factors: Rotary, layout: Layout, cache: CacheStep | None, layer: int) -> torch.Tensor:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        qkv_TXH = self.qkv(self.norm1(x_TD)).unflatten(-1, (sum(heads), self.head_dim))
        q_TNH, k_TKH, v_TKH = qkv_TXH.split(heads, dim=1)
        out_TNH = attend(rotate(q_TNH, factors), rotate(k_TKH, factors), v_TKH, layout, cache, layer)
        x_TD = x_TD + self.out(out_TNH.flatten(1))
        gate, up = self.gate_up(self.norm2(x_TD)).chunk(2, dim=-1)
        return x_TD + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """Embeddings, layers, final norm and an output head of its own (embeddings are never tied)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x_TD: torch.Tensor, layout: Layout, cache: CacheStep | None = None) -> torch.Tensor:
        """Embedded tokens to final, normalised hidden states, [T, D] each.

        Raises:
            ValueError: if the layout does not describe exactly the given tokens.
        """
        if layout.num_tokens != len(x_TD):
            raise ValueError(f"layout describes {layout.num_tokens} tokens but {len(x_TD)} were given")
        factors = rotary(self.config, layout, x_TD.device, x_TD.dtype)
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
