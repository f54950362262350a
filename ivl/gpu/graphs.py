"""A decoding step as one CUDA graph: launching its kernels one by one takes the host longer than many of them run.

The kernels of a step are captured once for a number of sequences and a length of their tables. A step then copies its numbers
to where the graph reads them, in one transfer, and replays it. Fewer sequences than the graph has are filled up with the first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ivl.model.attention import VARLEN, backend_for
from ivl.model.cache import CacheStep, PagedCache
from ivl.model.decoder import Decoder, rotary_at
from ivl.model.linear import Linear
from ivl.quant.layers import QuantLinear
from ivl.types import Layout

SHORTEST = 4096
"""Tokens of the shortest sequences that a step is captured for; longer ones double."""
EVERY = 8
"""Beyond this many sequences, a graph serves as many as the next multiple of it; below, as the next power of two."""
PATIENCE = 1
"""Steps of a shape that take the decoder's way first: torch and its libraries prepare themselves in them."""
CAPTURABLE = (Linear, nn.RMSNorm)
"""Modules of a layer that do the same in every step, beside quantized ones. Adapters may be switched off, and what sums over
tensor ranks has never been captured."""


class FixedStep(CacheStep):
    """A forward call for one new token per sequence that reads everything that changes from the same places."""

    def __init__(self, store: PagedCache, num_seqs: int, longest: int) -> None:
        blocks = tuple(range(-(-longest // store.block_size)))
        super().__init__(store, Layout((1,) * num_seqs, (longest - 1,) * num_seqs), [blocks] * num_seqs)
        device = store.keys.device
        self.numbers = torch.zeros(num_seqs * (2 + len(blocks)), dtype=torch.int32, device=device)
        slots_S, self.past_S, table = self.numbers.split((num_seqs, num_seqs, num_seqs * len(blocks)))
        self.slots_S, self.table_SB32 = slots_S, table.view(num_seqs, -1)
        self.bounds = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)

    def load(self, step: CacheStep) -> None:
        """Copy the numbers of a step into their places; the host does not wait for it."""
        spare, size, width = len(self.blocks) - len(step.blocks), self.store.block_size, len(self.blocks[0])
        past = step.layout.past_lens
        slots = [blocks[at // size] * size + at % size for blocks, at in zip(step.blocks, past, strict=True)]
        table = [[*blocks, *blocks[-1:] * (width - len(blocks))] for blocks in step.blocks]
        rows = [[*slots, *slots[:1] * spare], [*past, *past[:1] * spare], *table, *table[:1] * spare]
        numbers = torch.tensor([number for row in rows for number in row], dtype=torch.int32)
        self.numbers.copy_(numbers.pin_memory(), non_blocking=True)

    def derive(self) -> None:
        """Compute, within the graph, what the layers ask."""
        self.new_slots_T = self.slots_S.long()
        self.addresses = (self.bounds, self.past_S + 1, self.table_SB32)


@dataclass
class CapturedGraph:
    """A graph, the tensors that it reads, and the tensor that it writes."""

    graph: torch.cuda.CUDAGraph
    step: FixedStep
    x_SD: torch.Tensor
    out_SD: torch.Tensor


class CapturedGraphs:
    """The captured steps of one decoder on one cache."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.steps: dict[tuple[int, int], CapturedGraph] = {}
        """By sequences and longest length."""
        self.seen: Counter[tuple[int, int]] = Counter()
        self._captured_from: list[int] = []

    def run(self, decoder: Decoder, x_SD: torch.Tensor, cache: CacheStep) -> torch.Tensor | None:
        """Return the decoder's output for one new token per sequence; None if this step is not captured."""
        config, longest = decoder.config, max(cache.layout.total_lens)
        if config.rope_dynamic_factor is not None and longest > config.max_positions:
            return None  # each length has a rotary base of its own
        self._forget_if_changed(decoder)
        num_seqs = len(x_SD)
        bucket = 1 << (num_seqs - 1).bit_length() if num_seqs <= EVERY else -(-num_seqs // EVERY) * EVERY
        key = (bucket, max(SHORTEST, 1 << (longest - 1).bit_length()))
        self.seen[key] += 1
        if self.seen[key] <= PATIENCE:
            return None
        if key not in self.steps:
            self.steps[key] = self._capture(decoder, cache.store, *key)
        captured = self.steps[key]
        captured.step.load(cache)
        captured.x_SD[:num_seqs] = x_SD
        captured.x_SD[num_seqs:] = x_SD[:1]
        captured.graph.replay()
        return captured.out_SD[:num_seqs].clone()

    def _forget_if_changed(self, decoder: Decoder) -> None:
        """Forget all steps if modules or weights were moved or replaced: a graph holds addresses of the weights."""
        modules = [id(module) for layer in decoder.layers for module in layer._modules.values()]
        weights = [weight.data_ptr() for weight in (*decoder.parameters(), *decoder.buffers())]
        if self._captured_from != [*modules, *weights]:
            self.steps.clear()
            self.seen.clear()
            self._captured_from = [*modules, *weights]

    def _capture(self, decoder: Decoder, store: PagedCache, num_seqs: int, longest: int) -> CapturedGraph:
        """Capture the kernels of a step. None runs, so the content of the tensors does not matter."""
        step = FixedStep(store, num_seqs, longest)
        x_SD = torch.zeros(num_seqs, decoder.config.width, dtype=store.keys.dtype, device=store.keys.device)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(x_SD.device)  # that of torch.cuda.graph is one of the current card, for good
        # Other threads may use the card meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            step.derive()
            factors = rotary_at(decoder.config, step.past_S.float(), decoder.config.rope_theta, x_SD.dtype)
            out_SD = x_SD
            for number, layer in enumerate(decoder.layers):
                out_SD = layer(out_SD, factors, step.layout, step, number)
            out_SD = decoder.norm(out_SD)
        return CapturedGraph(graph, step, x_SD, out_SD)


class CardDecoder(Decoder):
    """Replays captured steps where every sequence has one new token; forward hooks of its layers are not called then."""

    def forward(self, x_TD: torch.Tensor, layout: Layout, cache: CacheStep | None = None) -> torch.Tensor:
        if cache is not None and len(x_TD) == len(layout.new_lens) == layout.num_tokens and self._capturable(x_TD):
            hidden_TD = self._captured(cache.store).run(self, x_TD, cache)
            if hidden_TD is not None:
                return hidden_TD
        return super().forward(x_TD, layout, cache)

    def _capturable(self, x_TD: torch.Tensor) -> bool:
        if torch.is_grad_enabled() or backend_for(x_TD) is not VARLEN or not x_TD.is_cuda:
            return False
        layers = [layer for layer in self.layers if getattr(layer, "backend", None) is None]
        modules = [module for layer in layers for module in layer._modules.values() if module is not None]
        known = all(type(module) in CAPTURABLE or isinstance(module, QuantLinear) for module in modules)
        return len(layers) == len(self.layers) and known

    def _captured(self, cache: PagedCache) -> CapturedGraphs:
        steps: WeakKeyDictionary[PagedCache, CapturedGraphs] = self.__dict__.setdefault("_steps", WeakKeyDictionary())
        if cache not in steps:
            steps[cache] = CapturedGraphs()
        return steps[cache]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or pickled: captured steps hold addresses, so they stay behind."""
        return {name: value for name, value in self.__dict__.items() if name != "_steps"}
