"""A decoding step as one native call: what Python does between kernels takes longer than many of them.

The layers' own code runs once with every kernel call written down instead of made; a step is then this list of calls on
numbers put in the same places. Only kernels can be written down so, hence any other operation on the way (an adapter, another
dtype, a processor without kernels) leaves the model to its usual way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ivl.cpu import kernels
from ivl.model.cache import CacheStep, PagedCache
from ivl.model.decoder import Decoder, rotary
from ivl.model.linear import Linear, RMSNorm
from ivl.quant.layers import QuantLinear
from ivl.types import Layout

SHORTEST = 64
"""Tokens of the shortest sequences that a list of calls is made for; longer ones double."""
PATIENCE = 3
"""Steps of a shape that go the decoder's way first: writing one down takes about as long as two of a small model."""
STATELESS = (Linear, QuantLinear, RMSNorm)
"""What layers are made of, if they do the same every time. An adapter may be switched off and on."""
CHUNK_BYTES = 1 << 20
ALIGNMENT = 64


class NotRepeatable(Exception):
    """A step is more than kernels."""


@dataclass
class Inputs:
    """Where a list of calls expects what differs from step to step."""

    x_SD: torch.Tensor
    cos_S1H: torch.Tensor
    sin_S1H: torch.Tensor
    table_SB: torch.Tensor
    past_S: torch.Tensor


@dataclass
class Program:
    inputs: Inputs
    calls: kernels.Calls
    out_SD: torch.Tensor


class Replays:
    """Steps of a decoder on a cache, repeated where every sequence has one new token; forward hooks are not called then."""

    def __init__(self, decoder: Decoder, cache: PagedCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.programs: dict[tuple[int, int, int], Program | None] = {}
        """By sequences, longest length and threads; None where the step is not repeatable."""
        self.seen: Counter[tuple[int, int, int]] = Counter()
        self.workspaces = (Workspace(), Workspace())
        self._weights: list[torch.Tensor] = []
        self._made_for: list[int] = []

    def run(self, x_SD: torch.Tensor, step: CacheStep) -> torch.Tensor:
        """What decoder(x_SD, step.layout, step) returns, the same to the last bit."""
        num_seqs = len(step.layout.new_lens)
        if len(x_SD) != num_seqs or num_seqs > kernels.MAX_ROWS or not kernels.usable(x_SD):
            return self.decoder(x_SD, step.layout, step)
        self._forget_if_changed()
        longest = max(step.longest, SHORTEST)
        key = (len(x_SD), 1 << (longest - 1).bit_length(), torch.get_num_threads())
        if key not in self.programs:
            self.seen[key] += 1
            if self.seen[key] <= PATIENCE:
                return self.decoder(x_SD, step.layout, step)
            try:
                self.programs[key] = self._record(*key[:2], x_SD.dtype)
            except NotRepeatable:
                self.programs[key] = None
        program = self.programs[key]
        if program is None:
            return self.decoder(x_SD, step.layout, step)
        to, table_SB = program.inputs, step.table_SB
        cos, sin = rotary(self.decoder.config, step.layout, x_SD.device, torch.float32)
        to.x_SD.copy_(x_SD)
        to.cos_S1H.copy_(cos)
        to.sin_S1H.copy_(sin)
        to.table_SB[:, : table_SB.shape[1]] = table_SB
        to.past_S.copy_(step.past_S)
        program.calls.run()
        return program.out_SD.clone()

    def _forget_if_changed(self) -> None:
        """The calls hold addresses of weights. Moved, replaced or adapted ones have others."""
        if self._made_for != self._places():
            self.programs.clear()
            self.seen.clear()
            self._weights = [*self.decoder.parameters(), *self.decoder.buffers()]
            self._made_for = self._places()

    def _places(self) -> list[int]:
        return [*map(id, self._modules()), *(weight.data_ptr() for weight in self._weights)]

    def _modules(self) -> list[nn.Module | None]:
        return [module for layer in self.decoder.layers for module in layer._modules.values()]

    def _record(self, num_seqs: int, longest: int, dtype: torch.dtype) -> Program:
        """The calls of a step. None is made, so what the tensors hold meanwhile does not matter.

        Raises:
            NotRepeatable: if something else than kernels computes.
        """
        if any(type(module) not in STATELESS for module in self._modules()):
            raise NotRepeatable("a module that may not do the same every time")
        config, size = self.decoder.config, self.cache.block_size
        shape = (num_seqs, 1, config.head_dim)
        inputs = Inputs(
            x_SD=torch.zeros(num_seqs, config.width, dtype=dtype),
            cos_S1H=torch.zeros(shape),
            sin_S1H=torch.zeros(shape),
            table_SB=torch.zeros(num_seqs, -(-longest // size), dtype=torch.long),
            past_S=torch.zeros(num_seqs, dtype=torch.long),
        )
        step = CacheStep(self.cache, Layout((1,) * num_seqs, (0,) * num_seqs), [()] * num_seqs)
        step.table_SB, step.past_S, step.longest = inputs.table_SB, inputs.past_S, longest
        factors = (inputs.cos_S1H, inputs.sin_S1H)
        with kernels.Calls.recorded() as calls, _KernelsOnly() as allowed:
            x_SD = inputs.x_SD
            for number, layer in enumerate(self.decoder.layers):
                # Of a layer only its outcome lives on, until the next one is done.
                allowed.workspace = self.workspaces[number % 2].rewound()
                x_SD = layer(x_SD, factors, step.layout, step, number)
            allowed.workspace = self.workspaces[len(self.decoder.layers) % 2].rewound()
            out_SD = self.decoder.norm(x_SD)
        return Program(inputs, calls, out_SD)


class Workspace:
    """Memory handed out piece by piece and, once rewound, from the start again. It stays in place: calls know addresses."""

    def __init__(self) -> None:
        self.chunks: list[torch.Tensor] = []
        self.chunk = self.used = 0

    def rewound(self) -> Workspace:
        self.chunk = self.used = 0
        return self

    def take(self, size: int) -> torch.Tensor:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        while self.chunk < len(self.chunks) and self.used + size > len(self.chunks[self.chunk]):
            self.chunk, self.used = self.chunk + 1, 0
        if self.chunk == len(self.chunks):
            self.chunks.append(torch.empty(max(size, CHUNK_BYTES), dtype=torch.uint8))
        self.used += size
        return self.chunks[self.chunk][self.used - size : self.used]


class _KernelsOnly(TorchDispatchMode):
    """Lets torch make views and tensors without content, the latter from the workspace; what computes is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.workspace = Workspace()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> torch.Tensor:
        kwargs = kwargs or {}
        if func is torch.ops.aten.new_empty.default:
            like, shape = args
            dtype = kwargs.get("dtype") or like.dtype
        elif func is torch.ops.aten.empty.memory_format:
            (shape,), dtype = args, kwargs.get("dtype") or torch.get_default_dtype()
        elif func.is_view:
            return func(*args, **kwargs)
        else:
            raise NotRepeatable(str(func))
        number = torch.Size(shape).numel()
        return self.workspace.take(number * dtype.itemsize)[: number * dtype.itemsize].view(dtype).view(shape)
