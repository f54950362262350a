"""The kernels by name, and how one is compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable

import llvmlite.binding as llvm

from ivl.cpu.kernels import attention_amx, decode, dense, pixels, quant, quant_amx
from ivl.cpu.kernels.emitter import Emitter
from ivl.cpu.kernels.features import target_features

KERNELS: dict[str, Callable[..., None]] = {
    kernel.__name__: kernel
    for kernel in (
        dense.linear, dense.linear_amx, dense.rms_norm, dense.norm_heads, dense.swiglu, dense.rotate, dense.repeat_calls,
        attention_amx.attention, decode.decode_attention,
        quant.quantize_inputs, quant.quant_gemv, quant.dequantize,
        quant_amx.quant_small_batch8, quant_amx.quant_small_batch4, quant_amx.quant_gemm,
        quant_amx.w8a8_round, quant_amx.w8a8_gemm, pixels.across, pixels.down,
    )
}  # fmt: skip
_compiling = threading.Lock()
_engines: list[llvm.ExecutionEngine] = []  # own the machine code; it lives as long as the process


def compile_kernel(name: str, *shape: int | str) -> int:
    """Compile a kernel, specialized to a shape. Returns its machine address."""
    emitter = Emitter(name)
    KERNELS[name](emitter, *shape)
    emitter.b.ret_void()
    with _compiling:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(str(emitter.module))
        module.verify()
        target = llvm.Target.from_default_triple()
        cpu = llvm.get_host_cpu_name()
        machine = target.create_target_machine(cpu=cpu, features=target_features(), opt=3)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        _engines.append(engine)
        return engine.get_function_address("kernel")
