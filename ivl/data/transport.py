"""Large tensors from a worker to the main process through shared memory; a pipe costs several times their encoding.

A worker writes a tensor into a nameless file in memory (Linux's memfd) and sends where it is. The main process maps it and
thereby owns it: the memory is freed with the tensor. A byte behind the values tells the worker that it may let go. Nothing has
a name, so nothing is left behind when a process is killed, and the size of /dev/shm does not matter.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

SMALL = 64 * 1024
"""Bytes up to which a pipe is as fast."""


@dataclass(frozen=True)
class Parcel:
    """A uint8 tensor in the memory of a process, still to be fetched."""

    path: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape))


_waiting: deque[tuple[int, int]] = deque()
"""File and size of what this process has sent and may not have been fetched."""


def send(tensor: torch.Tensor, receiver: int | None) -> np.ndarray | Parcel:
    """What to put into a message to the process `receiver`, for `receive` there; None never uses shared memory."""
    while _waiting and os.pread(_waiting[0][0], 1, _waiting[0][1]) != b"\0":
        os.close(_waiting.popleft()[0])
    values: np.ndarray = tensor.numpy()
    if receiver is None or tensor.dtype is not torch.uint8 or values.nbytes <= SMALL or not _readable(receiver):
        return values
    try:
        file = os.memfd_create("ivl", os.MFD_CLOEXEC)
    except OSError:  # too many open files: many parcels are waiting
        return values
    _waiting.append((file, values.nbytes))
    rest = memoryview(np.ascontiguousarray(values).data).cast("B")
    while rest:
        rest = rest[os.write(file, rest) :]
    os.ftruncate(file, values.nbytes + 1)
    return Parcel(f"/proc/{os.getpid()}/fd/{file}", tuple(values.shape))


def receive(message: np.ndarray | Parcel) -> torch.Tensor:
    """The tensor that was sent. A parcel can be received once."""
    if not isinstance(message, Parcel):
        return torch.from_numpy(message)
    size = message.num_bytes
    memory = torch.from_file(message.path, shared=True, size=size + 1, dtype=torch.uint8)
    memory[size] = 1
    return memory[:size].view(message.shape)


def _readable(process: int) -> bool:
    """Whether processes may look into one another here; seen from this side, and the same from the other."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return False
    return os.access(f"/proc/{process}/fd", os.R_OK | os.X_OK)
