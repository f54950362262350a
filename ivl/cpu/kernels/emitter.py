"""A small assembler of kernels: LLVM's vector instructions, which LLVM lowers to AVX-512, AVX2, NEON or what there is.

Every kernel is `void kernel(int64 *arguments)`. Arguments[0] is a counter: threads claim chunks of rows from it until
none is left, so a thread that is held up by other programs holds nobody up.

bfloat16 is the upper half of a float32. A vector of 32 is read as 16 pairs of 32 bits: shifted left they are the even
elements, masked they are the odd ones, both as float32. Elements come in pairs everywhere, so the order cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import llvmlite.binding as llvm
from llvmlite import ir

from ivl.cpu.kernels.values import Builder, Operand, Value

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
LANES = 16
AMX_ROWS = 16
"""Rows of an AMX register; each has up to 64 bytes."""
F32S, I32S, I16S = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
Pair = tuple[Value, Value]
StepBody = Callable[[Value, int, list[Value]], list[Value] | None]
"""Emits a step of a row, given its number, its size and what is carried; returns what is carried on."""


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know; only to be cast."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class Emitter:
    """One kernel under construction. Vectors hold LANES float32."""

    def __init__(self, name: str) -> None:
        self.module = ir.Module(name)
        self.module.triple = llvm.get_process_triple()
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer()])
        self.function = ir.Function(self.module, kind, "kernel")
        self.b = Builder(ir.IRBuilder(self.function.append_basic_block()))
        self.arguments = Value(self.b, self.function.args[0])

    # Scalars
    def int(self, value: int) -> Value:
        return Value(self.b, ir.Constant(I64, value))

    def index(self, value: Value | int) -> Value:
        """Return a number as a value."""
        return self.int(value) if isinstance(value, int) else value

    def argument(self, index: int) -> Value:
        return self.b.load(self.at(self.arguments, I64, index))

    def pointer(self, index: int, kind: ir.Type = I16) -> Value:
        return self.b.inttoptr(self.argument(index), kind.as_pointer())

    def thread_scratch(self) -> Value:
        """Return this thread's part of the scratch memory. Arguments: 1 a counter, from which a thread draws its number, 2 the
        memory, 3 the bytes of a part."""
        number = self.b.atomic_rmw("add", self.at(self.arguments, I64, 1), self.int(1), "monotonic")
        return self.b.gep(self.pointer(2, I8), [number * self.argument(3)], source_etype=I8)

    def memory(self, kind: ir.Type, size: int) -> Value:
        """Return memory of this call for so many elements, which begins at a cache line."""
        place = self.b.alloca(kind, size=self.int(size))
        place.raw.align = 64
        return place

    def at(self, pointer: Value, kind: ir.Type, index: Value | int) -> Value:
        """Return a pointer to element `index` of elements of the given kind."""
        return self.b.gep(self.b.bitcast(pointer, kind.as_pointer()), [self.index(index)], source_etype=kind)

    def element(self, pointer: Value, kind: ir.Type, index: Value | int) -> Value:
        """Read element `index` of elements of the given kind."""
        return self.b.load(self.at(pointer, kind, index), typ=kind)

    def smaller(self, a: Value | int, c: Value | int) -> Value:
        a, c = self.index(a), self.index(c)
        return self.b.select(a < c, a, c)

    def call(self, name: str, result: ir.Type, *args: Operand) -> Value:
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.b.call(function, args)

    def bytes(self, pointer: Value) -> Value:
        return self.b.bitcast(pointer, I8.as_pointer())

    # AMX has 8 registers of up to 16 rows of up to 64 bytes. A product takes the rows of one register as rows of a matrix,
    # and the rows of another as columns in pairs (bfloat16) or fours (bytes): row p of that one holds elements 2 p and
    # 2 p + 1 (or 4 p to 4 p + 3) of each of 16 columns side by side. Hence "pairs" and "words" in the kernels. Weights, whose
    # rows lie in memory as rows, are the first operand; what is small, or laid out once for many uses, is the second.
    def amx_configure(self, shapes: list[tuple[int, int]]) -> None:
        """Describe the AMX registers of this thread: rows and bytes per row of each. Palette 1, first row 0."""
        rows, widths = ([shape[i] for shape in shapes] for i in (0, 1))
        unused = 16 - len(shapes)
        layout = bytes([1] + [0] * 15) + b"".join(width.to_bytes(2, "little") for width in widths + [0] * unused)
        layout += bytes(rows + [0] * unused)
        kind = ir.ArrayType(I8, len(layout))
        place = self.b.alloca(kind)
        self.b.store(ir.Constant(kind, bytearray(layout)), place, align=1)
        self.call("llvm.x86.ldtilecfg", ir.VoidType(), self.bytes(place))

    def amx_zero(self, registers: Iterable[int]) -> None:
        for register in registers:
            self.call("llvm.x86.tilezero", ir.VoidType(), ir.Constant(I8, register))

    def amx_load(self, register: int, pointer: Value, row_bytes: Value | int) -> None:
        operands = ir.Constant(I8, register), self.bytes(pointer), self.index(row_bytes)
        self.call("llvm.x86.tileloadd64", ir.VoidType(), *operands)

    def amx_store(self, register: int, pointer: Value, row_bytes: Value | int) -> None:
        operands = ir.Constant(I8, register), self.bytes(pointer), self.index(row_bytes)
        self.call("llvm.x86.tilestored64", ir.VoidType(), *operands)

    def amx_dot(self, instruction: str, total: int, left: int, right: int) -> None:
        """total += left @ right. tdpbf16ps multiplies pairs of bfloat16 to float32 sums; tdpbusd and tdpbsud multiply fours
        of unsigned and signed (signed and unsigned) bytes to integer sums."""
        self.call(f"llvm.x86.{instruction}", ir.VoidType(), *(ir.Constant(I8, register) for register in (total, left, right)))

    def amx_release(self) -> None:
        self.call("llvm.x86.tilerelease", ir.VoidType())

    def prefetch(self, pointer: Value) -> None:
        flags = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, into every cache, data
        self.call("llvm.prefetch.p0", ir.VoidType(), self.bytes(pointer), *flags)

    # Vectors
    def splat(self, value: Value | float) -> Value:
        """Return a number in every lane."""
        if isinstance(value, int | float):
            return Value(self.b, ir.Constant(F32S, [value] * LANES))
        nothing = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
        single = self.b.insert_element(nothing, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(single, nothing, ir.Constant(I32S, [0] * LANES))

    def ints(self, value: int) -> Value:
        return Value(self.b, ir.Constant(I32S, [value] * LANES))

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        return self.call("llvm.fma.v16f32", F32S, x, y, z)

    def total(self, x: Value) -> Value:
        function = "llvm.vector.reduce.fadd.v16f32"
        self.call(function, F32, ir.Constant(F32, -0.0), x)
        return self.b.call(self.module.globals[function], [ir.Constant(F32, -0.0), x], fastmath=("reassoc",))

    def larger(self, x: Value, y: Value) -> Value:
        return self.b.select(x > y, x, y)

    def greatest(self, x: Value) -> Value:
        return self.call("llvm.vector.reduce.fmax.v16f32", F32, x)

    def read(self, kind: ir.Type, pointer: Value, element: ir.Type, index: Value | int) -> Value:
        """Read a vector of the given kind from pointer[index] on; no alignment is needed."""
        return self.b.load(self.b.bitcast(self.at(pointer, element, index), kind.as_pointer()), typ=kind, align=1)

    def write(self, value: Operand, pointer: Value, element: ir.Type, index: Value | int) -> None:
        self.b.store(value, self.b.bitcast(self.at(pointer, element, index), value.type.as_pointer()), align=1)

    def load(self, pointer: Value, index: Value | int) -> Pair:
        """Read 32 bfloat16 as their even and odd elements."""
        pairs = self.read(I32S, pointer, I16, index)
        even, odd = pairs << 16, pairs & -65536
        return self.b.bitcast(even, F32S), self.b.bitcast(odd, F32S)

    def store(self, pointer: Value, index: Value | int, value: Pair) -> None:
        self.write(self.rounded_words(value), pointer, I16, index)

    def words(self, even: Value, odd: Value) -> Value:
        """Return words of two bfloat16: the upper halves of the even bits, and above them those of the odd ones."""
        return (even >> 16) | (odd & -65536)

    def rounded_words(self, pair: Pair) -> Value:
        """Return two vectors of float32 as bfloat16, the first in the lower halves of words."""
        return self.words(self.rounded(pair[0]), self.rounded(pair[1]))

    def floats(self, pointer: Value, index: Value | int) -> Value:
        """Read 16 bfloat16 in their order."""
        return self.b.bitcast(self.b.zext(self.read(I16S, pointer, I16, index), I32S) << 16, F32S)

    def store_one(self, pointer: Value, value: Value) -> None:
        self.b.store(self.b.trunc(self.rounded(value) >> 16, I16), pointer)

    def load_one(self, pointer: Value) -> Value:
        """Read one bfloat16."""
        return self.b.bitcast(self.b.zext(self.b.load(pointer, typ=I16), I32) << 16, F32)

    def deinterleaved(self, pointer: Value, index: Value | int) -> Pair:
        """Read 32 float32 as their even and odd elements."""
        low, high = (self.read(F32S, pointer, F32, self.index(index) + part) for part in (0, LANES))
        evens, odds = (ir.Constant(I32S, list(range(part, 2 * LANES, 2))) for part in (0, 1))
        return self.b.shuffle_vector(low, high, evens), self.b.shuffle_vector(low, high, odds)

    def rounded(self, x: Value) -> Value:
        """Return the bits of float32 (a vector or one), rounded to nearest even in the upper half. NaN stays NaN."""
        bits = self.b.bitcast(x, I32S if x.type == F32S else I32)
        up = bits + (((bits >> 16) & 1) + 0x7FFF)
        return self.b.select(self.b.fcmp_unordered("uno", x, x), bits.like(0x7FC00000), up)

    def exp(self, x: Value) -> Value:
        """Return e^x to about 1e-7: 2^n times a polynomial of the remainder. Infinite above 88.4, at least e^-87 below."""
        # Comparisons with NaN are false, so NaN goes through.
        for limit, beyond in ((89.0, ">"), (-87.0, "<")):
            x = self.b.select(self.b.fcmp_ordered(beyond, x, self.splat(limit)), self.splat(limit), x)
        n = self.call("llvm.rint.v16f32", F32S, x * 1.4426950408889634)
        r = self.fma(n, self.splat(-0.693145751953125), x)
        r = self.fma(n, self.splat(-1.428606765330187e-06), r)
        y = self.splat(1 / 720)
        for coefficient in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            y = self.fma(y, r, self.splat(coefficient))
        power = (self.b.fptosi(n, I32S) + 127) << 23
        return y * self.b.bitcast(power, F32S)

    def store_small(self, pointer: Value, index: Value | int, value: Pair) -> None:
        """Store numbers that are not near overflow: ties are rounded up."""
        even, odd = (self.b.bitcast(x, I32S) + 0x8000 for x in value)
        self.write(self.words(even, odd), pointer, I16, index)

    # Processors with AMX have these instructions of AVX-512
    def small_exp2(self, x: Value) -> Value:
        """Return 2^x to 1e-4, enough for what is rounded to bfloat16; 0 far below. NaN goes through."""
        every, as_set, to_floor = ir.Constant(I16, -1), ir.Constant(I32, 4), ir.Constant(I32, 9)
        r = self.call("llvm.x86.avx512.mask.reduce.ps.512", F32S, x, to_floor, x, every, as_set)  # x less its whole part
        y = self.splat(0.07802351)
        for coefficient in (0.22606783, 0.69583369, 0.99992516):
            y = self.fma(y, r, self.splat(coefficient))
        return self.call("llvm.x86.avx512.mask.scalef.ps.512", F32S, y, x, y, every, as_set)

    def store_floats(self, pointer: Value, index: Value | int, value: Value) -> None:
        """Store 16 float32 as bfloat16, in their order."""
        short = self.call("llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(_BFloat(), LANES), value)
        self.write(self.b.bitcast(short, I16S), pointer, I16, index)

    def narrowed(self, low: Value, high: Value) -> Value:
        """Return 32 float32 as 32 bfloat16 in their order, in 16 words."""
        short = self.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(_BFloat(), 2 * LANES), high, low)
        return self.b.bitcast(short, I32S)

    # Control flow
    @contextmanager
    def loop(self, start: Value | int, stop: Value | int, step: int, *carried: Value) -> Iterator[KernelLoop]:
        """Emit `for i in range(start, stop, step)`, run at least once; KernelLoop.carry sets the carried values anew."""
        before = self.b.block
        body = self.function.append_basic_block()
        self.b.branch(body)
        self.b.position_at_end(body)
        phis = [self.b.phi(value.type) for value in (self.int(0), *carried)]
        for phi, value in zip(phis, (self.index(start), *carried), strict=True):
            phi.raw.add_incoming(value.raw, before)
        state = KernelLoop(phis[0], phis[1:])
        yield state
        following = state.index + step
        for phi, value in zip(phis, (following, *state.values), strict=True):
            phi.raw.add_incoming(value.raw, self.b.block)
        after = self.function.append_basic_block()
        self.b.cbranch(following < self.index(stop), body, after)
        self.b.position_at_end(after)

    def in_steps(self, width: int, size: int, body: StepBody, *carried: Value) -> list[Value]:
        """Emit `carried = body(number, size, carried)` for every step of a row, and for what is left behind the last one."""
        values = list(carried)
        if width >= size:
            with self.loop(0, width // size, 1, *values) as step:
                step.carry(body(step.index, size, step.values) or [])
            values = step.values
        return body(self.int(width // size), width % size, values) or [] if width % size else values

    @contextmanager
    def claimed(self, count: Value, grain: int) -> Iterator[Pair]:
        """Split range(count) into about 16 chunks (start, stop) of a multiple of grain; threads claim them one by one."""
        chunk = (count // (16 * grain) + 1) * grain
        head, body, after = (self.function.append_basic_block() for _ in range(3))
        self.b.branch(head)
        self.b.position_at_end(head)
        start = self.b.atomic_rmw("add", self.arguments, chunk, "monotonic")
        self.b.cbranch(start < count, body, after)
        self.b.position_at_end(body)
        yield start, self.smaller(start + chunk, count)
        self.b.branch(head)
        self.b.position_at_end(after)

    @contextmanager
    def blocks(self, rows: Value, size: int) -> Iterator[Value]:
        """Split rows into claimed blocks and yield the first row of each.

        The last block moves back to end with the last row. Rows that are met twice get the same value twice.
        """
        with self.claimed(rows, size) as (start, stop), self.loop(start, stop, size) as outer:
            yield self.smaller(outer.index, rows - size)


@dataclass
class KernelLoop:
    """A loop under construction: its index, and the values that it carries from one pass to the next."""

    index: Value
    values: list[Value]

    def carry(self, values: list[Value]) -> None:
        self.values = values
