"""Memory of a process that computes on a CPU."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

MADV_NOHUGEPAGE = 15  # of Linux's mman.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_FROM = 2**30


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free for the next step, instead of returning it to the system.

    Fresh pages cost a fault each: a training step of the 1B spends a fifth of its time on them, a prompt up to a third.
    Linux with glibc only; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def small_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, whose memory, yet untouched, will come in small pages where the system allows: of one that is written here
    and there, huge pages would clear many times as much. Linux only; elsewhere nothing changes."""
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - first) // page * page
    if sys.platform.startswith("linux") and tensor.device.type == "cpu" and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_NOHUGEPAGE)  # advice may be ignored
    return tensor
