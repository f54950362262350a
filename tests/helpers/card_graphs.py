"""CUDA graphs and quantized products of the pretended card.

A captured graph holds calls with the very tensors that they read and write. Replaying makes the calls again and puts their
results where they were, so a number that the host had baked in, or a tensor that moved, gives wrong results as on a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.waits import wait_of

graphs: list[Graph] = []
"""All that were captured, in order."""
_recorder: Recorder | None = None


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple, dict[str, Any], Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)

    def trace(self) -> list[tuple[str, tuple[int, ...]]]:
        """The operations and the addresses of all tensors that they read and write."""
        return [
            (str(function), tuple(x.data_ptr() for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)))
            for function, args, kwargs, out in self.calls
        ]


class Stream:
    """Stands for torch.cuda.Stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


class Recorder(TorchDispatchMode):
    """Captures into a graph. What writes is not run, as nothing is while a card captures."""

    def __init__(self, graph: Graph, card: torch.device) -> None:
        super().__init__()
        self.graph, self.card, self.paused = graph, card, False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        out = args[0] if func._schema.is_mutable else func(*args, **kwargs)
        assert wait_of(func, args, kwargs, out) is None, f"a card cannot capture {func}"
        other = {x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.is_cuda} - {self.card}
        assert not other, f"{func} on {other} is not captured by a stream of {self.card}"
        on_host = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and not x.is_cuda and x.dim()]
        assert not on_host, f"{func} of a tensor on the host cannot be captured"
        if func._schema.is_mutable or not memory_of(out) <= memory_of((args, kwargs)):  # the rest are views
            self.graph.calls.append((func, args, kwargs, out))
        return out


def memory_of(values: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make a call that a graph captures as one."""
    if _recorder is None or _recorder.paused:
        return function(*args, **kwargs)
    _recorder.paused = True
    try:
        out = function(*args, **kwargs)
    finally:
        _recorder.paused = False
    _recorder.graph.calls.append((function, args, kwargs, out))
    return out


@contextmanager
def capture(
    graph: Graph, *, pool: object = None, stream: Stream | None = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    global _recorder
    _recorder = Recorder(graph, stream.device if stream else torch.device("cuda", 0))
    try:
        with _recorder:
            yield
    finally:
        _recorder = None
    graphs.append(graph)


def convert_weight_to_int4pack(weight: torch.Tensor, tiles: int) -> torch.Tensor:
    rows, width = len(weight), weight.shape[1] * 2
    assert weight.is_contiguous() and weight.dtype is torch.uint8 and tiles in (2, 4, 8)
    return weight.view(torch.int32).reshape(rows // 8, width // (16 * tiles), 32, tiles // 2)


def weight_int4pack_mm(x: torch.Tensor, packed: torch.Tensor, group: int, scale_and_zero: torch.Tensor) -> torch.Tensor:
    assert x.dtype is scale_and_zero.dtype is torch.bfloat16 and group in (32, 64, 128, 256)
    weight = packed.view(torch.uint8).reshape(len(packed) * 8, -1)
    q = torch.stack([weight >> 4, weight & 15], dim=2).flatten(1).float().unflatten(1, (-1, group))
    scale, zero = scale_and_zero.float().transpose(0, 1).unbind(2)
    matrix = ((q - 8) * scale.unsqueeze(2) + zero.unsqueeze(2)).flatten(1)
    return (x.float() @ matrix.bfloat16().float().t()).bfloat16()


def put_in() -> None:
    """Let torch's functions be these."""
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph, cuda.graph_pool_handle, cuda.Stream = Graph, capture, lambda: (0, 0), Stream
    global _library
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("_convert_weight_to_int4pack", convert_weight_to_int4pack, "CUDA")
    _library.impl("_weight_int4pack_mm", weight_int4pack_mm, "CUDA")
