"""How kernels are started: at once on torch's own OpenMP threads, or recorded to be repeated by one native call."""

from __future__ import annotations

import ctypes
from functools import cache, cached_property

import torch

from ivl.cpu.kernels import features

GRAIN = 32768
"""Elements of work below which a second thread costs more than it brings."""
CACHE_LINE = 64
CHUNK_BYTES = 1 << 20

_KernelPointer = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Packed = ctypes.Array[ctypes.c_int64]


@cache
def address_of(name: str, *shape: int | str) -> int:
    """Return the machine address of a kernel specialized to a shape; it is compiled at first use."""
    from ivl.cpu.kernels import build

    return build.compile_kernel(name, *shape)


class Launch:
    """Starts kernels at once; their memory comes from torch."""

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Return a tensor without content."""
        return torch.empty(shape, dtype=dtype)

    def run(self, name: str, shape: tuple[int | str, ...], work: int, *arguments: int, scratch: int = 0) -> None:
        """Call a kernel with 64-bit arguments.

        Args:
            name: The kernel's name in build.py.
            shape: What the kernel is specialized to.
            work: Elements of work, which decide whether more than one thread pays.
            arguments: The kernel's arguments from number 1. Number 0 is the counter from which threads claim their rows.
            scratch: Bytes of scratch memory for each thread. A kernel with such memory has a counter of threads, the memory,
                which begins at a cache line, and these bytes as its first arguments.
        """
        memory = self.empty(torch.get_num_threads() * scratch + CACHE_LINE, dtype=torch.uint8) if scratch else None
        if memory is not None:
            arguments = (0, -(-memory.data_ptr() // CACHE_LINE) * CACHE_LINE, scratch, *arguments)
        packed = (ctypes.c_int64 * (1 + len(arguments)))(0, *arguments)
        threads = torch.get_num_threads() if work > GRAIN else 1
        self._start(address_of(name, *shape), packed, threads, counts_threads=memory is not None)

    def _start(self, address: int, packed: _Packed, threads: int, *, counts_threads: bool) -> None:  # noqa: ARG002
        team = features.openmp() if threads > 1 else None
        if team is not None:
            team(address, ctypes.addressof(packed), threads, 0)
        else:
            _KernelPointer(address)(ctypes.addressof(packed))


NOW = Launch()


class CallRecorder(Launch):
    """Records kernel calls instead of making them; `repeat` makes them all, any number of times, by one native call.

    The calls hold addresses. Their memory therefore comes from a workspace that stays in place.
    """

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.entries: list[int] = []
        self.arguments: list[_Packed] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.workspace.take(size)[:size].view(dtype).view(shape)

    def _start(self, address: int, packed: _Packed, threads: int, *, counts_threads: bool) -> None:
        self.arguments.append(packed)
        self.entries += [address, ctypes.addressof(packed), threads, int(counts_threads)]

    def repeat(self) -> None:
        """Make the recorded calls."""
        entries, team = self._packed
        packed = (ctypes.c_int64 * 3)(ctypes.addressof(entries), len(self.arguments), team)
        _KernelPointer(address_of("repeat_calls"))(ctypes.addressof(packed))

    @cached_property
    def _packed(self) -> tuple[_Packed, int]:
        team = ctypes.cast(features.openmp(), ctypes.c_void_p).value or 0  # type: ignore[arg-type]
        return (ctypes.c_int64 * len(self.entries))(*self.entries), team


class Workspace:
    """Memory that is handed out piece by piece and, once rewound, from the start again. It never moves."""

    def __init__(self) -> None:
        self.chunks: list[torch.Tensor] = []
        self.chunk = self.used = 0

    def rewound(self) -> Workspace:
        """Start again with the first byte."""
        self.chunk = self.used = 0
        return self

    def take(self, size: int) -> torch.Tensor:
        """Return the next bytes, in whole cache lines."""
        size = -(-size // CACHE_LINE) * CACHE_LINE
        while self.chunk < len(self.chunks) and self.used + size > len(self.chunks[self.chunk]):
            self.chunk, self.used = self.chunk + 1, 0
        if self.chunk == len(self.chunks):
            self.chunks.append(torch.empty(max(size, CHUNK_BYTES), dtype=torch.uint8))
        self.used += size
        return self.chunks[self.chunk][self.used - size : self.used]
