"""Fast subclasses of the model's modules. `accelerate` puts them in place of a module by its class, so parameters stay.

Each takes the kernels where they apply, and the plain way of its base class elsewhere: where gradients are wanted, or after
the module was moved to another device or dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ivl.cpu.attention import CPU_ATTENTION
from ivl.cpu.captured_step import CapturedSteps
from ivl.cpu.kernels import ops
from ivl.cpu.linear import AmxW8A8Linear, bfloat16_linear, fused_linear, norm_heads_
from ivl.model.attention import attend
from ivl.model.cache import CacheStep, PagedCache
from ivl.model.decoder import Decoder, DecoderLayer, Rotary, rotary
from ivl.model.vit import VisionAttention, VisionEmbeddings, VisionLayer
from ivl.model.vlm import VLM, normalize
from ivl.types import Layout

CHUNK_TILES = 2
"""Tiles encoded together: enough rows for fast products, and few enough to stay in the caches."""
CHUNK_ROWS = 512
"""Tokens that pass the wide middle of a layer together."""


def in_chunks(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, size: int) -> torch.Tensor:
    """Return function(x), computed by chunks of the first dimension where no gradient is wanted. Wide tensors inside the
    function then stay in the caches and reuse memory; fresh pages from the system cost more than the products."""
    if torch.is_grad_enabled() or not x.is_cpu or len(x) <= size:
        return function(x)
    return torch.cat([function(part) for part in x.split(size)])


class FastVLM(VLM):
    """Encodes tiles by chunks."""

    def encode_tiles(self, tiles_GSSC: torch.Tensor) -> torch.Tensor:
        return in_chunks(self._encode_chunk, tiles_GSSC.to(self.device), CHUNK_TILES)

    def _encode_chunk(self, tiles_GSSC: torch.Tensor) -> torch.Tensor:
        return self.encode_pixels(normalize(tiles_GSSC, self.dtype))


class FastVisionEmbeddings(VisionEmbeddings):
    """Projects patches by the CPU's product."""

    def project(self, patches_GPE: torch.Tensor) -> torch.Tensor:
        if not ops.takes(patches_GPE) or self.patch.weight.dtype is not torch.bfloat16:
            return super().project(patches_GPE)
        return bfloat16_linear(patches_GPE, self.patch.weight.flatten(1), self.patch.bias)


class FastVisionAttention(VisionAttention):
    """Attends by the CPU's backend."""

    backend = CPU_ATTENTION


class FastVisionLayer(VisionLayer):
    """Applies GELU in place; W8A8 layers apply it, and add to the residual stream, within their product."""

    def forward(self, x_GPD: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().forward(x_GPD)
        x_GPD = self._add(x_GPD, self.attention.out, self.attention.heads(self.norm1(x_GPD)), self.scale1)
        return self._add(x_GPD, self.fc2, gelu_linear(self.fc1, self.norm2(x_GPD)), self.scale2)

    def _add(self, x_GPD: torch.Tensor, layer: nn.Module, y_GPI: torch.Tensor, scale_D: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, AmxW8A8Linear) and layer.takes(y_GPI):
            return layer.fused(y_GPI, residual=x_GPD, factor_O=scale_D)
        return torch.addcmul(x_GPD, self.drop(layer(y_GPI)), scale_D)


def gelu_linear(layer: nn.Module, x_GPD: torch.Tensor) -> torch.Tensor:
    """Return gelu(layer(x))."""
    if isinstance(layer, AmxW8A8Linear) and layer.takes(x_GPD):
        return layer.fused(x_GPD, gelu=True)
    return torch.ops.aten.gelu_(layer(x_GPD))


class FastDecoderLayer(DecoderLayer):
    """Fuses norm, gate and residual into the products of few tokens, and decodes by one attention kernel."""

    backend = CPU_ATTENTION

    def forward(self, x_TD: torch.Tensor, factors: Rotary, layout: Layout, cache: CacheStep | None, layer: int) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().forward(x_TD, factors, layout, cache, layer)
        qkv_TX = fused_linear(self.qkv, x_TD, norm=self.norm1)
        heads_TNH = self.attend(qkv_TX, factors, layout, cache, layer)
        x_TD = fused_linear(self.out, heads_TNH.flatten(1), residual=x_TD)
        return in_chunks(self._mlp, x_TD, CHUNK_ROWS)

    def _mlp(self, x_TD: torch.Tensor) -> torch.Tensor:
        gate_up_TM = fused_linear(self.gate_up, x_TD, norm=self.norm2)
        return fused_linear(self.down, gate_up_TM, gated=True, residual=x_TD)

    def attend(
        self, qkv_TX: torch.Tensor, factors: Rotary, layout: Layout, cache: CacheStep | None, layer: int
    ) -> torch.Tensor:
        N, K, num_seqs = self.num_heads, self.num_kv_heads, len(layout.new_lens)
        qkv_TXH = qkv_TX.unflatten(-1, (N + 2 * K, self.head_dim))
        by_kernel = factors[0].dtype is torch.float32 and self.head_dim % 64 == 0 and ops.takes(qkv_TX)
        if not by_kernel or not norm_heads_(self, qkv_TXH):
            return super().attend(qkv_TX, factors, layout, cache, layer)
        n = leading_replies(layout) if ops.decode_attention_fits(self.head_dim, N, K) else 0
        if cache is None or n == 0:
            return self._attend_prompts(qkv_TXH, factors, layout, cache, layer)
        replies, (cos, sin) = cache.part(0, n), factors
        out_TNH = ops.decode_attention(
            qkv_TXH[:n], (cos[:n], sin[:n]), cache.store.keys[layer], cache.store.values[layer], replies.table_SB,
            past_lengths(replies.layout), block_size=cache.store.block_size, longest=max(replies.layout.total_lens),
        )  # fmt: skip
        if n == num_seqs:
            return out_TNH
        prompts = cache.part(n, num_seqs)
        read_TNH = self._attend_prompts(qkv_TXH[n:], (cos[n:], sin[n:]), prompts.layout, prompts, layer)
        return torch.cat([out_TNH, read_TNH])

    def _attend_prompts(
        self, qkv_TXH: torch.Tensor, factors: Rotary, layout: Layout, cache: CacheStep | None, layer: int
    ) -> torch.Tensor:
        num_turned = self.num_heads + self.num_kv_heads
        turned_TXH = ops.rotate_(qkv_TXH[:, :num_turned], *factors)
        q_TNH, k_TKH = turned_TXH.split((self.num_heads, self.num_kv_heads), dim=1)
        return attend(q_TNH, k_TKH, qkv_TXH[:, num_turned:], layout, cache, layer, self.backend)


def leading_replies(layout: Layout) -> int:
    """Count the leading sequences that have one new token."""
    return next((s for s, new in enumerate(layout.new_lens) if new > 1), len(layout.new_lens))


@lru_cache(maxsize=64)
def past_lengths(layout: Layout) -> torch.Tensor:
    """The cached tokens of every sequence, [S]."""
    return torch.tensor(layout.past_lens)


class FastDecoder(Decoder):
    """Repeats captured steps where every sequence has one new token; forward hooks of its layers are not called then."""

    def forward(self, x_TD: torch.Tensor, layout: Layout, cache: CacheStep | None = None) -> torch.Tensor:
        if cache is not None and len(x_TD) == len(layout.new_lens) == layout.num_tokens <= ops.MAX_ROWS and ops.takes(x_TD):
            hidden_TD = self._captured(cache.store).run(self, x_TD, cache)
            if hidden_TD is not None:
                return hidden_TD
        return super().forward(x_TD, layout, cache)

    def rotary(self, x_TD: torch.Tensor, layout: Layout) -> Rotary:
        """Return float32 factors where kernels rotate."""
        by_kernel = ops.takes(x_TD) and self.config.head_dim % 64 == 0
        return rotary(self.config, layout, x_TD.device, torch.float32 if by_kernel else x_TD.dtype)

    def _captured(self, cache: PagedCache) -> CapturedSteps:
        steps: WeakKeyDictionary[PagedCache, CapturedSteps] = self.__dict__.setdefault("_steps", WeakKeyDictionary())
        if cache not in steps:
            steps[cache] = CapturedSteps(cache)
        return steps[cache]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or pickled: captured steps hold addresses, so they stay behind."""
        return {name: value for name, value in self.__dict__.items() if name != "_steps"}
