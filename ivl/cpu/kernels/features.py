"""What this process may use of its processor: one of four levels, each of which has all that the levels below it have.

`amx`: AMX for bfloat16. `avx512`: AVX-512 with VNNI. `avx2`: AVX2 with FMA. `any`: no kernel of ours, torch alone; also on
other processors than x86-64. The environment variable IVL_CPU asks for a lower level than the processor has, so that every
level can be tested and measured on one machine. Set ONEDNN_MAX_CPU_ISA beside it to hold torch to the same level.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache

from ivl.errors import InputError

LEVELS = ("any", "avx2", "avx512", "amx")
NEEDS = {
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512vnni"),
    "amx": ("amx-bf16", "amx-int8", "amx-tile", "avx512dq", "avx512bf16"),
}
"""LLVM's names of the features that a level adds."""


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
def host_features() -> dict[str, bool]:
    """LLVM's names of the processor's features, and whether this processor has them; empty where there is no llvmlite."""
    try:
        import llvmlite.binding as llvm
    except ImportError:  # no llvmlite for this platform
        return {}
    return dict(llvm.get_host_cpu_features())


@cache
def machine_level() -> str:
    """Return the highest level that the processor, the system and the installed packages allow."""
    if openmp() is None or sys.byteorder != "little":
        return "any"
    found = "any"
    for level in LEVELS[1:]:
        if not all(host_features().get(name) for name in NEEDS[level]) or (level == "amx" and not _amx_permitted()):
            break
        found = level
    return found


def _amx_permitted() -> bool:
    """Ask Linux for AMX, which it grants by process."""
    arch_prctl, request_permission, amx_data = 158, 0x1023, 18
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(arch_prctl, request_permission, amx_data) == 0


@cache
def level() -> str:
    """Return the level of this process: the machine's, or the lower one that IVL_CPU asks for.

    Raises:
        InputError: if IVL_CPU is no level, or one that this machine does not have.
    """
    wanted, most = os.environ.get("IVL_CPU") or machine_level(), machine_level()
    if wanted not in LEVELS[: LEVELS.index(most) + 1]:
        raise InputError(f"IVL_CPU={wanted}: this machine has {', '.join(LEVELS[: LEVELS.index(most) + 1])}")
    return wanted


def at_least(wanted: str) -> bool:
    """Whether the level of this process is `wanted` or a higher one. Kernels are compiled and run from avx2 on."""
    return LEVELS.index(level()) >= LEVELS.index(wanted)


@cache
def has_avx_vnni() -> bool:
    """Whether kernels may use the products of 8-bit integers of 256-bit vectors."""
    return at_least("avx2") and bool(host_features().get("avxvnni"))


@cache
def multiplies_bfloat16() -> bool:
    """Whether torch multiplies matrices in bfloat16 itself here; without, it takes tens of times as long as in float32."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    has = any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return has and (at_least("avx512") or not capabilities.get("avx512_bf16"))


@cache
def rows_at_once() -> int:
    """Return how many weight rows a product of few rows reads together: 4, but one at a time at two places. The prefetcher of
    AMD's processors follows one stream a thread, and AVX2 has registers for the sums of one row (docs/cpu.md)."""
    import llvmlite.binding as llvm

    return 1 if not at_least("avx512") or llvm.get_host_cpu_name().startswith("znver") else 4


def target_features() -> str:
    """Return the processor's features for LLVM, less those above the level of this process."""
    hidden = () if at_least("avx512") else ("avx512", "amx", "avx10")
    return ",".join(f"{'+' if has and not name.startswith(hidden) else '-'}{name}" for name, has in host_features().items())
