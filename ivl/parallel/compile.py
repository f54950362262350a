"""torch.compile applied to the layers of a plain model.

What a layer does to each token, or to the patches of a tile, is a graph before attention and one behind it. Neither sees where
sequences begin, so each is compiled once for all layers and all layouts; attention runs between them as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ivl.model.attention import attend
from ivl.model.cache import CacheStep
from ivl.model.decoder import DecoderLayer, Rotary, rotate
from ivl.model.linear import swiglu
from ivl.model.vit import VisionLayer
from ivl.model.vlm import VLM
from ivl.types import Layout

Graph = Callable[..., Any]


def compile_layers(model: VLM, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let the layers of ViT and decoder train by compiled graphs, in place; parameters keep their names.

    Args:
        model: the model, not yet sharded; without gradients it computes as before.
        backend: of torch.compile.
    """

    def compiled(function: Graph) -> Graph:
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=True)

    in_decoder = compiled(_heads), compiled(_behind_attention)
    in_vit = compiled(_attended), compiled(_mlp)
    for layer in model.decoder.layers:
        layer.__class__ = CompiledDecoderLayer
        layer.graphs = in_decoder  # type: ignore[assignment]
    for layer in model.vision.layers:
        layer.__class__ = CompiledVisionLayer
        layer.graphs = in_vit  # type: ignore[assignment]


class CompiledDecoderLayer(DecoderLayer):
    """A decoder layer whose two graphs have attention between them."""

    graphs: tuple[Graph, Graph]

    def forward(self, x_TD: torch.Tensor, factors: Rotary, layout: Layout, cache: CacheStep | None, layer: int) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x_TD, factors, layout, cache, layer)
        heads, behind = self.graphs
        q_TNH, k_TKH, v_TKH = heads(self, x_TD, factors)
        return behind(self, x_TD, attend(q_TNH, k_TKH, v_TKH, layout, cache, layer, self.backend))


def _heads(layer: DecoderLayer, x_TD: torch.Tensor, factors: Rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the heads of query, key and value."""
    N, K = layer.num_heads, layer.num_kv_heads
    qkv_TXH = layer.qkv(layer.norm1(x_TD)).unflatten(-1, (N + 2 * K, layer.head_dim))
    turned_TXH = rotate(qkv_TXH[:, : N + K], factors)
    return turned_TXH[:, :N], turned_TXH[:, N:], qkv_TXH[:, N + K :]


def _behind_attention(layer: DecoderLayer, x_TD: torch.Tensor, heads_TNH: torch.Tensor) -> torch.Tensor:
    x_TD = x_TD + layer.out(heads_TNH.flatten(1))
    return x_TD + layer.down(swiglu(layer.gate_up(layer.norm2(x_TD))))


class CompiledVisionLayer(VisionLayer):
    """A layer of the ViT; drop path, whose rate differs from layer to layer, is outside of its two graphs."""

    graphs: tuple[Graph, Graph]

    def forward(self, x_GPD: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x_GPD)
        attended, mlp = self.graphs
        x_GPD = torch.addcmul(x_GPD, self.drop(attended(self, x_GPD)), self.scale1)
        return torch.addcmul(x_GPD, self.drop(mlp(self, x_GPD)), self.scale2)


def _attended(layer: VisionLayer, x_GPD: torch.Tensor) -> torch.Tensor:
    return layer.attention(layer.norm1(x_GPD))


def _mlp(layer: VisionLayer, x_GPD: torch.Tensor) -> torch.Tensor:
    return layer.fc2(F.gelu(layer.fc1(layer.norm2(x_GPD))))
