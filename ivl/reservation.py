"""Memory for a model's weights, made ready by the system while torch is being imported: fresh pages cost as much as reading."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

MADV_HUGEPAGE, MADV_POPULATE_WRITE, MADV_DONTNEED = 14, 23, 4  # of Linux's mman.h
ALIGNMENT = 64
EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight")
"""Stay in their file."""


class Reservation:
    """Touched memory for tensors of so many bytes."""

    def __init__(self, sizes: list[int]) -> None:
        self.memory = mmap.mmap(-1, max(1, sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)))
        self.used = 0
        self._thread = threading.Thread(target=self._advise, args=(MADV_HUGEPAGE, MADV_POPULATE_WRITE), daemon=True)
        self._thread.start()

    def take(self, size: int) -> memoryview | None:
        """That many bytes, aligned; None where they do not fit."""
        start = self.used
        if not size or start + size > len(self.memory):
            return None
        self.used = min(start + -(-size // ALIGNMENT) * ALIGNMENT, len(self.memory))
        return memoryview(self.memory)[start : start + size]

    def finish(self) -> None:
        """Give back what was not taken."""
        if self.used == len(self.memory):
            return
        self._thread.join()
        self._advise(MADV_DONTNEED, first=-(-self.used // mmap.PAGESIZE) * mmap.PAGESIZE)

    def _advise(self, *advice: int, first: int = 0) -> None:
        """Without Python's lock, which mmap.madvise would hold. An older system that knows no such advice ignores it."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + first
        for number in advice:
            if len(self.memory) > first:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(len(self.memory) - first), number)


_pending: list[Reservation] = []


@contextmanager
def begun(directory: Path) -> Generator[None, None, None]:
    """Reserve memory for the safetensors of a directory, unless torch is there already or files are not what they should be;
    given back at the end if nobody claimed it."""
    try:
        if "torch" not in sys.modules and not _pending and _worth_it():
            sizes = [size for path in sorted(directory.glob("*.safetensors")) for size in _tensor_sizes(path)]
            if sizes and sum(sizes) < _available() // 2:
                _pending.append(Reservation(sizes))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # whoever reads the weights will say what is wrong
    try:
        yield
    finally:
        _pending.clear()


def claim() -> Reservation | None:
    """What was reserved, for one model."""
    return _pending.pop() if _pending else None


def _worth_it() -> bool:
    """Whether weights stay as they are: in this machine's memory, in bfloat16."""
    if not sys.platform.startswith("linux") or Path("/dev/nvidiactl").exists():
        return False
    return "bf16" in Path("/proc/cpuinfo").read_text()


def _tensor_sizes(path: Path) -> list[int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("header longer than the file")
        header = json.loads(file.read(length))
    if any(at.get("dtype") == "F16" for at in header.values()):
        raise ValueError("weights that will be converted")
    spans = [at["data_offsets"] for name, at in header.items() if name != "__metadata__" and not name.endswith(EMBEDDINGS)]
    sizes = [int(stop) - int(start) for start, stop in spans]
    if min(sizes, default=0) < 0 or sum(sizes) > path.stat().st_size:
        raise ValueError("offsets outside the file")
    return sizes


def _available() -> float:
    """Bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf
