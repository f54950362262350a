"""A decoding step as one native call: Python takes longer between kernels than many of them run.

The kernel calls of a step are recorded once, from the layers' parameters, and a step then repeats them on numbers put into
the same places. Only steps that consist of kernels can be captured: an adapter, another dtype or a processor without the
kernels leaves the model to its usual way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from ivl.cpu.kernels import ops
from ivl.cpu.kernels.launch import CallRecorder, Workspace
from ivl.cpu.linear import FastRMSNorm, few_rows, norm_heads_
from ivl.model.cache import CacheStep, PagedCache
from ivl.model.decoder import Decoder, DecoderLayer, rotary

SHORTEST = 64
"""Tokens of the shortest sequences that a step is captured for; longer ones double."""
PATIENCE = 3
"""Steps of a shape that take the decoder's way first: capturing takes about as long as two steps of a small model."""


class NotCapturable(Exception):
    """Raised while capturing when something other than a kernel would compute."""


@dataclass
class CapturedStep:
    """Recorded calls, the tensors that they read, and the tensor that they write."""

    calls: CallRecorder
    x_SD: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor]
    table_SB: torch.Tensor
    past_S: torch.Tensor
    out_SD: torch.Tensor


class CapturedSteps:
    """The captured steps of one decoder on one cache."""

    def __init__(self, cache: PagedCache) -> None:
        self.keys, self.values, self.block_size = cache.keys, cache.values, cache.block_size
        self.steps: dict[tuple[int, int, int], CapturedStep | None] = {}
        """By sequences, longest length and threads; None where a step cannot be captured."""
        self.seen: Counter[tuple[int, int, int]] = Counter()
        self.workspaces = (Workspace(), Workspace())
        self._weights: list[torch.Tensor] = []
        self._captured_from: list[int] = []

    def run(self, decoder: Decoder, x_SD: torch.Tensor, cache: CacheStep) -> torch.Tensor | None:
        """Return the decoder's output for one new token per sequence, equal to the last bit; None if it is not captured."""
        self._forget_if_changed(decoder)
        longest = max(*cache.layout.total_lens, SHORTEST)
        key = (len(x_SD), 1 << (longest - 1).bit_length(), torch.get_num_threads())
        if key not in self.steps:
            self.seen[key] += 1
            if self.seen[key] <= PATIENCE:
                return None
            try:
                self.steps[key] = self._capture(decoder, *key[:2])
            except NotCapturable:
                self.steps[key] = None
        step = self.steps[key]
        if step is None:
            return None
        step.x_SD.copy_(x_SD)
        for place, factor in zip(step.factors, rotary(decoder.config, cache.layout, x_SD.device, torch.float32), strict=True):
            place.copy_(factor)
        step.table_SB[:, : cache.table_SB.shape[1]] = cache.table_SB
        step.past_S.copy_(torch.tensor(cache.layout.past_lens))
        step.calls.repeat()
        return step.out_SD.clone()

    def _forget_if_changed(self, decoder: Decoder) -> None:
        """Forget all steps if modules or weights were moved or replaced: the calls hold addresses of the weights."""
        modules = [id(module) for layer in decoder.layers for module in layer._modules.values()]
        if self._captured_from != [*modules, *(weight.data_ptr() for weight in self._weights)]:
            self.steps.clear()
            self.seen.clear()
            self._weights = [*decoder.parameters(), *decoder.buffers()]
            self._captured_from = [*modules, *(weight.data_ptr() for weight in self._weights)]

    def _capture(self, decoder: Decoder, num_seqs: int, longest: int) -> CapturedStep:
        """Record the calls of a step. None is made, so the content of the tensors does not matter.

        Raises:
            NotCapturable: if something other than kernels computes.
        """
        config, norm = decoder.config, decoder.norm
        if not isinstance(norm, FastRMSNorm) or not ops.decode_attention_fits(
            config.head_dim, config.num_heads, config.num_kv_heads
        ):
            raise NotCapturable
        step = CapturedStep(
            calls=CallRecorder(),
            x_SD=torch.zeros(num_seqs, config.width, dtype=torch.bfloat16),
            factors=(torch.zeros(num_seqs, 1, config.head_dim), torch.zeros(num_seqs, 1, config.head_dim)),
            table_SB=torch.zeros(num_seqs, -(-longest // self.block_size), dtype=torch.long),
            past_S=torch.zeros(num_seqs, dtype=torch.long),
            out_SD=torch.empty(0),
        )
        x_SD = step.x_SD
        for number, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            # Only a layer's output lives on, until the next layer is done.
            step.calls.workspace = self.workspaces[number % 2].rewound()
            x_SD = self._layer(layer, number, x_SD, step, longest)
        step.calls.workspace = self.workspaces[len(decoder.layers) % 2].rewound()
        step.out_SD = ops.rms_norm(x_SD, *norm.args(), step.calls)
        return step

    def _layer(self, layer: DecoderLayer, number: int, x_SD: torch.Tensor, step: CapturedStep, longest: int) -> torch.Tensor:
        """Record a layer, which reads as its forward."""
        qkv_SXH = _product(layer.qkv, x_SD, step, norm=layer.norm1).unflatten(-1, (-1, layer.head_dim))
        if not norm_heads_(layer, qkv_SXH, step.calls):
            raise NotCapturable
        heads_SNH = ops.decode_attention(
            qkv_SXH, step.factors, self.keys[number], self.values[number], step.table_SB, step.past_S,
            block_size=self.block_size, longest=longest, launch=step.calls,
        )  # fmt: skip
        x_SD = _product(layer.out, heads_SNH.flatten(1), step, residual=x_SD)
        gate_up_SM = _product(layer.gate_up, x_SD, step, norm=layer.norm2)
        return _product(layer.down, gate_up_SM, step, gated=True, residual=x_SD)


def _product(layer: nn.Module, x_SI: torch.Tensor, step: CapturedStep, **around: object) -> torch.Tensor:
    y_SO = few_rows(layer, x_SI, launch=step.calls, **around)  # type: ignore[arg-type]
    if y_SO is None:
        raise NotCapturable
    return y_SO
