"""What this process can use: compiled kernels at all, VNNI, and AMX."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache


@cache
def openmp() -> Callable[[int, int, int, int], None] | None:
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
def available() -> bool:
    """Whether kernels can be compiled and run here. The environment variable IVL_KERNELS=0 turns them off."""
    if os.environ.get("IVL_KERNELS") == "0" or openmp() is None:
        return False
    try:
        import llvmlite.binding  # noqa: F401
    except ImportError:  # no llvmlite for this platform
        return False
    return True


def _host_has(*names: str) -> bool:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return all(features.get(name, False) for name in names)


@cache
def has_vnni() -> bool:
    """Whether there are AVX-512 and its products of 8-bit integers, which the kernels for quantized weights need."""
    return available() and sys.byteorder == "little" and _host_has("avx512f", "avx512bw", "avx512vnni")


@cache
def has_amx() -> bool:
    """Whether this process may use AMX for bfloat16, and AVX-512 beside it. Linux wants to be asked for AMX first."""
    if not available() or sys.platform != "linux" or not _host_has("amx-bf16", "avx512dq", "avx512bf16"):
        return False
    arch_prctl, request_permission, amx_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, amx_data) == 0
