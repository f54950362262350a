"""The kernels by name, and how one is compiled."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from functools import cache

import llvmlite.binding as llvm

from ivl.cpu.kernels.attention_amx import attention
from ivl.cpu.kernels.decode import decode_attention
from ivl.cpu.kernels.dense import linear, linear_amx, normalise, replay, rms_norm, rotate, swiglu
from ivl.cpu.kernels.emitter import Emitter
from ivl.cpu.kernels.quant import quant_linear, quant_prepare, quant_unpack
from ivl.cpu.kernels.quant_amx import quant_few, quant_matmul, quant_round, quant_rounded

KERNELS: dict[str, Callable[..., None]] = {
    "linear": linear,
    "linear_amx": linear_amx,
    "normalise": normalise,
    "replay": replay,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "rotate": rotate,
    "attention": attention,
    "decode_attention": decode_attention,
    "quant_few": quant_few,
    "quant_linear": quant_linear,
    "quant_matmul": quant_matmul,
    "quant_prepare": quant_prepare,
    "quant_round": quant_round,
    "quant_rounded": quant_rounded,
    "quant_unpack": quant_unpack,
}
_compiling = threading.Lock()
_engines: list[llvm.ExecutionEngine] = []  # own the machine code; it lives as long as the process


@cache
def has_amx() -> bool:
    """Whether this process may use matrix tiles of bfloat16, and AVX-512 beside them; Linux wants to be asked first."""
    features = llvm.get_host_cpu_features()
    if sys.platform != "linux" or not all(features.get(name, False) for name in ("amx-bf16", "avx512dq", "avx512bf16")):
        return False
    request_permission, tile_data = 0x1023, 18
    return ctypes.CDLL(None).syscall(158, request_permission, tile_data) == 0  # arch_prctl


def compile_kernel(name: str, *shape: int | str) -> int:
    """Machine address of the named kernel, specialised to the given shape."""
    emitter = Emitter(name)
    KERNELS[name](emitter, *shape)
    return finish(emitter)


def finish(emitter: Emitter) -> int:
    """Machine address of what was emitted."""
    with _compiling:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        emitter.b.ret_void()
        module = llvm.parse_assembly(str(emitter.module))
        module.verify()
        target = llvm.Target.from_default_triple()
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        _engines.append(engine)
        return engine.get_function_address("kernel")
