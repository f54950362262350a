"""How kernels are called: on torch's own OpenMP threads, at once or written down for later."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, cached_property

import torch

GRAIN = 32768
"""Elements of work below which a second thread costs more than it brings."""

_KernelPointer = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_recording = threading.local()


@cache
def parallel() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, argument, num_threads, flags) of the OpenMP runtime that torch has loaded, if it has one."""
    for name in ("libgomp.so.1", "libiomp5.so", "libomp.so"):
        try:
            run = ctypes.CDLL(name, mode=os.RTLD_NOLOAD).GOMP_parallel
        except (AttributeError, OSError):
            continue
        run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return run
    return None


@cache
def address_of(name: str, *shape: int | str) -> int | None:
    """Machine address of a kernel specialised to a shape, or None where kernels cannot be built."""
    if os.environ.get("IVL_KERNELS") == "0" or parallel() is None:
        return None
    try:
        from ivl.cpu.kernels import build
    except ImportError:  # no llvmlite for this platform
        return None
    return build.compile_kernel(name, *shape)


def run(name: str, shape: tuple[int | str, ...], work: int, *arguments: int) -> None:
    """Call a kernel with 64-bit arguments. Argument 0 is added: the counter from which threads claim their share."""
    address = address_of(name, *shape)
    assert address is not None
    packed = (ctypes.c_int64 * (1 + len(arguments)))(0, *arguments)
    team = parallel()
    threads = torch.get_num_threads() if work > GRAIN and team is not None else 1
    if (calls := getattr(_recording, "calls", None)) is not None:
        calls.add(address, packed, threads, counts_threads=arguments[0] == 0)
        return
    if threads > 1 and team is not None:
        team(address, ctypes.addressof(packed), threads, 0)
    else:
        _KernelPointer(address)(ctypes.addressof(packed))


class Calls:
    """Kernel calls of a thread, written down instead of made, to be made any number of times by one native call."""

    def __init__(self) -> None:
        self.entries: list[int] = []
        self.arguments: list[ctypes.Array[ctypes.c_int64]] = []

    @classmethod
    @contextmanager
    def recorded(cls) -> Generator[Calls, None, None]:
        """The calls that would be made within."""
        _recording.calls = calls = cls()
        try:
            yield calls
        finally:
            _recording.calls = None

    def add(self, address: int, packed: ctypes.Array[ctypes.c_int64], threads: int, *, counts_threads: bool) -> None:
        """counts_threads: argument 1 is a counter, too."""
        self.arguments.append(packed)
        self.entries += [address, ctypes.addressof(packed), threads, int(counts_threads)]

    def run(self) -> None:
        address = address_of("replay")
        assert address is not None
        entries, team = self._packed
        packed = (ctypes.c_int64 * 3)(ctypes.addressof(entries), len(self.arguments), team)
        _KernelPointer(address)(ctypes.addressof(packed))

    @cached_property
    def _packed(self) -> tuple[ctypes.Array[ctypes.c_int64], int]:
        team = ctypes.cast(parallel(), ctypes.c_void_p).value or 0  # type: ignore[arg-type]
        return (ctypes.c_int64 * len(self.entries))(*self.entries), team
