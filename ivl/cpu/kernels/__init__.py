"""CPU kernels for bfloat16 inference, where torch's own fall behind the memory.

A product of few rows is bound by reading the weight; torch reads it at about half the speed of memory. RMSNorm, SwiGLU
and rotary positions are chains of passes in torch and one pass here. The kernels are written in LLVM's portable vector
instructions, compiled by llvmlite in milliseconds at first use, and run on torch's own OpenMP threads. Sums are float32.

features: what the processor has. ops: the kernels as functions of tensors. launch: how kernels are started. build: the
kernels by name, and how one is compiled. emitter and values: the assembler that they are written in, and its numbers, whose
operators emit instructions. All other files hold kernels.
"""
