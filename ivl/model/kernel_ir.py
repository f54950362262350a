"""The kernels of kernels.py in LLVM's vector instructions, which it lowers to AVX-512, AVX2, NEON or whatever is there.

Every kernel is `void kernel(int64 *arguments)`. Arguments[0] is a counter: threads claim chunks of rows from it until
none is left, so a thread that is held up by other programs holds nobody up.

bfloat16 is the upper half of a float32. A vector of 32 is read as 16 pairs of 32 bits: shifted left they are the even
elements, masked they are the odd ones, both as float32. Elements come in pairs everywhere, so the order cancels out.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
LANES = 16
F32S, I32S = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
ROW_BLOCK, COLUMN_BLOCK = 4, 4
"""Weight rows and input rows multiplied together: their sums fill half of the vector registers."""
PREFETCH = 4096
"""Elements ahead."""
TILE = 16
"""Rows of a matrix tile."""
Value = Any
Pair = tuple[Value, Value]


class Emitter:
    """One kernel under construction. Vectors hold LANES float32."""

    def __init__(self, name: str) -> None:
        self.module = ir.Module(name)
        self.module.triple = llvm.get_process_triple()
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer()])
        self.function = ir.Function(self.module, kind, "kernel")
        self.b = ir.IRBuilder(self.function.append_basic_block())

    # Scalars
    def int(self, value: int) -> Value:
        return ir.Constant(I64, value)

    def argument(self, index: int) -> Value:
        return self.b.load(self.at(self.function.args[0], I64, self.int(index)))

    def pointer(self, index: int, kind: ir.Type = I16) -> Value:
        return self.b.inttoptr(self.argument(index), kind.as_pointer())

    def at(self, pointer: Value, kind: ir.Type, index: Value) -> Value:
        return self.b.gep(pointer, [index], source_etype=kind)

    def smaller(self, a: Value, c: Value) -> Value:
        return self.b.select(self.b.icmp_signed("<", a, c), a, c)

    def call(self, name: str, result: ir.Type, *args: Value) -> Value:
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.b.call(function, args)

    def bytes(self, pointer: Value) -> Value:
        return self.b.bitcast(pointer, I8.as_pointer())

    def prefetch(self, pointer: Value) -> None:
        flags = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, into every cache, data
        self.call("llvm.prefetch.p0", ir.VoidType(), self.bytes(pointer), *flags)

    # Vectors
    def splat(self, value: Value | float) -> Value:
        if isinstance(value, float):
            return ir.Constant(F32S, [value] * LANES)
        single = self.b.insert_element(ir.Constant(F32S, ir.Undefined), value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(single, ir.Constant(F32S, ir.Undefined), ir.Constant(I32S, [0] * LANES))

    def ints(self, value: int) -> Value:
        return ir.Constant(I32S, [value] * LANES)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        return self.call("llvm.fma.v16f32", F32S, x, y, z)

    def total(self, x: Value) -> Value:
        function = "llvm.vector.reduce.fadd.v16f32"
        self.call(function, F32, ir.Constant(F32, -0.0), x)
        return self.b.call(self.module.globals[function], [ir.Constant(F32, -0.0), x], fastmath=("reassoc",))

    def load(self, pointer: Value, index: Value) -> Pair:
        """Even and odd elements of 32 bfloat16."""
        pairs = self.b.load(self.b.bitcast(self.at(pointer, I16, index), I32S.as_pointer()), typ=I32S, align=2)
        even = self.b.shl(pairs, self.ints(16))
        odd = self.b.and_(pairs, self.ints(-65536))
        return self.b.bitcast(even, F32S), self.b.bitcast(odd, F32S)

    def store(self, pointer: Value, index: Value, value: Pair) -> None:
        even = self.b.lshr(self.rounded(value[0]), self.ints(16))
        odd = self.b.and_(self.rounded(value[1]), self.ints(-65536))
        target = self.b.bitcast(self.at(pointer, I16, index), I32S.as_pointer())
        self.b.store(self.b.or_(even, odd), target, align=2)

    def store_one(self, pointer: Value, value: Value) -> None:
        bits = self.b.lshr(self.rounded(value), ir.Constant(I32, 16))
        self.b.store(self.b.trunc(bits, I16), pointer)

    def rounded(self, x: Value) -> Value:
        """Bits of float32 (a vector or one), rounded to nearest even in the upper half. NaN stays NaN."""
        kind = I32S if x.type == F32S else I32
        constant = self.ints if kind is I32S else lambda value: ir.Constant(I32, value)
        bits = self.b.bitcast(x, kind)
        tie = self.b.and_(self.b.lshr(bits, constant(16)), constant(1))
        up = self.b.add(bits, self.b.add(tie, constant(0x7FFF)))
        return self.b.select(self.b.fcmp_unordered("uno", x, x), constant(0x7FC00000), up)

    def exp(self, x: Value) -> Value:
        """e^x to about 1e-7: 2^n times a polynomial of the remainder; infinite above 88.4, no smaller than e^-87."""
        x = self.call("llvm.maxnum.v16f32", F32S, self.call("llvm.minnum.v16f32", F32S, x, self.splat(89.0)), self.splat(-87.0))
        n = self.call("llvm.rint.v16f32", F32S, self.b.fmul(x, self.splat(1.4426950408889634)))
        r = self.fma(n, self.splat(-0.693145751953125), x)
        r = self.fma(n, self.splat(-1.428606765330187e-06), r)
        y = self.splat(1 / 720)
        for coefficient in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            y = self.fma(y, r, self.splat(coefficient))
        power = self.b.shl(self.b.add(self.b.fptosi(n, I32S), self.ints(127)), self.ints(23))
        return self.b.fmul(y, self.b.bitcast(power, F32S))

    # Control flow
    @contextmanager
    def loop(self, start: Value, stop: Value, step: int, *carried: Value) -> Iterator[Loop]:
        """for i in range(start, stop, step), at least once; carried values are set anew with Loop.carry."""
        before = self.b.block
        body = self.function.append_basic_block()
        self.b.branch(body)
        self.b.position_at_end(body)
        i = self.b.phi(I64)
        i.add_incoming(start, before)
        phis = [self.b.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        state = Loop(i, phis)
        yield state
        following = self.b.add(i, self.int(step))
        i.add_incoming(following, self.b.block)
        for phi, value in zip(phis, state.values, strict=True):
            phi.add_incoming(value, self.b.block)
        after = self.function.append_basic_block()
        self.b.cbranch(self.b.icmp_signed("<", following, stop), body, after)
        self.b.position_at_end(after)

    @contextmanager
    def claimed(self, count: Value, grain: int) -> Iterator[Pair]:
        """About 16 chunks (start, stop) of range(count), each a multiple of grain and handed to one thread."""
        grains = self.b.add(self.b.udiv(count, self.int(16 * grain)), self.int(1))
        chunk = self.b.mul(grains, self.int(grain))
        head, body, after = (self.function.append_basic_block() for _ in range(3))
        self.b.branch(head)
        self.b.position_at_end(head)
        start = self.b.atomic_rmw("add", self.function.args[0], chunk, "monotonic")
        self.b.cbranch(self.b.icmp_signed("<", start, count), body, after)
        self.b.position_at_end(body)
        yield start, self.smaller(self.b.add(start, chunk), count)
        self.b.branch(head)
        self.b.position_at_end(after)


class Loop:
    def __init__(self, index: Value, values: list[Value]) -> None:
        self.index = index
        self.values = values

    def carry(self, values: list[Value]) -> None:
        self.values = values


def _linear(e: Emitter, num_columns: int) -> None:
    """y[c, r] = sum_i x[c, i] w[r, i] + bias[r] for num_columns input rows c."""
    x, w, y = e.pointer(1), e.pointer(2), e.pointer(4)
    bias_address, width, rows, x_stride = (e.argument(i) for i in (3, 5, 6, 7))
    ahead = e.smaller(e.b.mul(width, e.int(ROW_BLOCK)), e.int(PREFETCH))
    with e.claimed(rows, ROW_BLOCK) as (start, stop), e.loop(start, stop, ROW_BLOCK) as outer:
        # The last block moves back to end with the last row; rows met twice get the same value twice.
        first = e.smaller(outer.index, e.b.sub(rows, e.int(ROW_BLOCK)))
        row_ids = [e.b.add(first, e.int(r)) for r in range(ROW_BLOCK)]
        w_rows = [e.at(w, I16, e.b.mul(row, width)) for row in row_ids]
        for block in range(0, num_columns, COLUMN_BLOCK):
            columns = range(block, min(block + COLUMN_BLOCK, num_columns))
            x_rows = [e.at(x, I16, e.b.mul(x_stride, e.int(c))) for c in columns]
            cells = [(r, c) for r in range(ROW_BLOCK) for c in range(len(columns))]
            with e.loop(e.int(0), width, 2 * LANES, *[e.splat(0.0) for _ in cells]) as inner:
                if block == 0:
                    for row in w_rows:
                        e.prefetch(e.at(row, I16, e.b.add(inner.index, ahead)))
                x_pairs = [e.load(row, inner.index) for row in x_rows]
                w_pairs = [e.load(row, inner.index) for row in w_rows]
                sums = [e.fma(w_pairs[r][0], x_pairs[c][0], s) for (r, c), s in zip(cells, inner.values, strict=True)]
                inner.carry([e.fma(w_pairs[r][1], x_pairs[c][1], s) for (r, c), s in zip(cells, sums, strict=True)])
            biases = [_bias(e, bias_address, row) for row in row_ids]
            for (r, c), s in zip(cells, inner.values, strict=True):
                index = e.b.add(e.b.mul(rows, e.int(block + c)), row_ids[r])
                e.store_one(e.at(y, I16, index), e.b.fadd(e.total(s), biases[r]))


def _linear_amx(e: Emitter, num_columns: int) -> None:
    """The same on a processor with matrix tiles (AMX), where even 16 columns cost no more than reading the weight.

    One step multiplies two tiles of 16 weight rows by 32 elements, straight from the weight, with one tile of pairs of
    inputs, x_pairs[i / 2, column].
    """
    x_pairs, w, y = e.pointer(1, I32), e.pointer(2), e.pointer(4)
    bias_address, width, rows = (e.argument(i) for i in (3, 5, 6))
    row_bytes, pair_bytes = e.b.mul(width, e.int(2)), e.int(4 * num_columns)
    *sums_and_weights, inputs = (ir.Constant(I8, tile) for tile in range(5))
    sums, weights = sums_and_weights[:2], sums_and_weights[2:]
    configuration = _tile_configuration([4 * num_columns] * 2 + [2 * LANES * 2] * 2 + [4 * num_columns])
    place = e.b.alloca(configuration.type)
    e.b.store(configuration, place, align=1)
    e.call("llvm.x86.ldtilecfg", ir.VoidType(), e.bytes(place))
    block = 2 * TILE
    scratch = e.b.alloca(F32, size=block * num_columns)
    with e.claimed(rows, block) as (start, stop), e.loop(start, stop, block) as outer:
        first = e.smaller(outer.index, e.b.sub(rows, e.int(block)))
        w_tiles = [e.at(w, I16, e.b.mul(e.b.add(first, e.int(part)), width)) for part in (0, TILE)]
        for tile in sums:
            e.call("llvm.x86.tilezero", ir.VoidType(), tile)
        with e.loop(e.int(0), width, 2 * LANES) as inner:
            pairs = e.at(x_pairs, I32, e.b.mul(e.b.lshr(inner.index, e.int(1)), e.int(num_columns)))
            e.call("llvm.x86.tileloadd64", ir.VoidType(), inputs, e.bytes(pairs), pair_bytes)
            for target, weight, tile in zip(sums, weights, w_tiles, strict=True):
                e.call("llvm.x86.tileloadd64", ir.VoidType(), weight, e.bytes(e.at(tile, I16, inner.index)), row_bytes)
                e.call("llvm.x86.tdpbf16ps", ir.VoidType(), target, weight, inputs)
        for part, tile in enumerate(sums):
            corner = e.at(scratch, F32, e.int(part * TILE * num_columns))
            e.call("llvm.x86.tilestored64", ir.VoidType(), tile, e.bytes(corner), pair_bytes)
        with e.loop(e.int(0), e.int(block), 1) as row:
            row_id, source = e.b.add(first, row.index), e.at(scratch, F32, e.b.mul(row.index, e.int(num_columns)))
            bias = _bias(e, bias_address, row_id)
            for c in range(num_columns):
                value = e.b.fadd(e.b.load(e.at(source, F32, e.int(c)), typ=F32), bias)
                e.store_one(e.at(y, I16, e.b.add(e.b.mul(rows, e.int(c)), row_id)), value)
    e.call("llvm.x86.tilerelease", ir.VoidType())


def _tile_configuration(row_bytes: list[int]) -> Value:
    """The 64 bytes that describe up to 16 tiles of TILE rows: palette, start row, bytes per row, rows."""
    widths = row_bytes + [0] * (16 - len(row_bytes))
    heights = [TILE] * len(row_bytes) + [0] * (16 - len(row_bytes))
    layout = bytes([1] + [0] * 15) + b"".join(width.to_bytes(2, "little") for width in widths) + bytes(heights)
    return ir.Constant(ir.ArrayType(I8, len(layout)), bytearray(layout))


def _bias(e: Emitter, address: Value, row: Value) -> Value:
    """bias[row] as float32, or 0 where there is no bias."""
    given = e.b.icmp_signed("!=", address, e.int(0))
    source = e.b.select(given, e.b.add(address, e.b.mul(row, e.int(2))), e.b.ptrtoint(e.function.args[0], I64))
    half = e.b.load(e.b.inttoptr(source, I16.as_pointer()), typ=I16)
    bits = e.b.shl(e.b.zext(half, I32), ir.Constant(I32, 16))
    return e.b.select(given, e.b.bitcast(bits, F32), ir.Constant(F32, 0.0))


def _rms_norm(e: Emitter) -> None:
    x, weight, y = (e.pointer(i) for i in (1, 2, 3))
    rows, width, stride = (e.argument(i) for i in (4, 5, 6))
    eps = e.b.bitcast(e.b.trunc(e.argument(7), I32), F32)
    with e.claimed(rows, 1) as (start, stop), e.loop(start, stop, 1) as row:
        x_row, y_row = e.at(x, I16, e.b.mul(row.index, stride)), e.at(y, I16, e.b.mul(row.index, width))
        with e.loop(e.int(0), width, 2 * LANES, e.splat(0.0), e.splat(0.0)) as squares:
            pair = e.load(x_row, squares.index)
            squares.carry([e.fma(p, p, s) for p, s in zip(pair, squares.values, strict=True)])
        mean = e.b.fdiv(e.total(e.b.fadd(*squares.values)), e.b.sitofp(width, F32))
        root = e.call("llvm.sqrt.f32", F32, e.b.fadd(mean, eps))
        scale = e.splat(e.b.fdiv(ir.Constant(F32, 1.0), root))
        with e.loop(e.int(0), width, 2 * LANES) as column:
            pair, weights = e.load(x_row, column.index), e.load(weight, column.index)
            even, odd = (e.b.fmul(e.b.fmul(p, scale), w) for p, w in zip(pair, weights, strict=True))
            e.store(y_row, column.index, (even, odd))


def _swiglu(e: Emitter) -> None:
    x, y = e.pointer(1), e.pointer(2)
    rows, width, stride = (e.argument(i) for i in (3, 4, 5))
    with e.claimed(rows, 1) as (start, stop), e.loop(start, stop, 1) as row:
        gate_row, y_row = e.at(x, I16, e.b.mul(row.index, stride)), e.at(y, I16, e.b.mul(row.index, width))
        up_row = e.at(gate_row, I16, width)
        with e.loop(e.int(0), width, 2 * LANES) as column:
            gates, ups = e.load(gate_row, column.index), e.load(up_row, column.index)
            even, odd = (
                e.b.fdiv(e.b.fmul(g, u), e.b.fadd(e.splat(1.0), e.exp(e.b.fneg(g)))) for g, u in zip(gates, ups, strict=True)
            )
            e.store(y_row, column.index, (even, odd))


def _rotate(e: Emitter) -> None:
    x, cos, sin = e.pointer(1), e.pointer(2, F32), e.pointer(3, F32)
    tokens, heads, size, token_stride, head_stride = (e.argument(i) for i in (4, 5, 6, 7, 8))
    half = e.b.lshr(size, e.int(1))
    with e.claimed(tokens, 1) as (start, stop), e.loop(start, stop, 1) as token, e.loop(e.int(0), heads, 1) as head:
        row = e.at(x, I16, e.b.add(e.b.mul(token.index, token_stride), e.b.mul(head.index, head_stride)))
        factors = e.b.mul(token.index, size)
        with e.loop(e.int(0), half, 2 * LANES) as column:
            other = e.b.add(column.index, half)
            firsts, seconds = e.load(row, column.index), e.load(row, other)
            place = e.b.add(factors, column.index)
            coss, sins = _deinterleaved(e, cos, place), _deinterleaved(e, sin, place)
            turned = []
            for first, second, c, s in zip(firsts, seconds, coss, sins, strict=True):
                turned.append((e.fma(first, c, e.b.fneg(e.b.fmul(second, s))), e.fma(second, c, e.b.fmul(first, s))))
            e.store(row, column.index, (turned[0][0], turned[1][0]))
            e.store(row, other, (turned[0][1], turned[1][1]))


def _deinterleaved(e: Emitter, pointer: Value, index: Value) -> Pair:
    """Even and odd elements of 32 float32."""
    low, high = (
        e.b.load(e.b.bitcast(e.at(pointer, F32, e.b.add(index, e.int(part))), F32S.as_pointer()), typ=F32S, align=4)
        for part in (0, LANES)
    )
    evens, odds = (ir.Constant(I32S, list(range(part, 2 * LANES, 2))) for part in (0, 1))
    return e.b.shuffle_vector(low, high, evens), e.b.shuffle_vector(low, high, odds)


KERNELS: dict[str, Callable[..., None]] = {
    "linear": _linear,
    "linear_amx": _linear_amx,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "rotate": _rotate,
}
_compiling = threading.Lock()
_engines: list[llvm.ExecutionEngine] = []  # own the machine code; it lives as long as the process


@cache
def has_amx() -> bool:
    """Whether this process may use matrix tiles of bfloat16; Linux wants to be asked first."""
    if sys.platform != "linux" or not llvm.get_host_cpu_features().get("amx-bf16", False):
        return False
    request_permission, tile_data = 0x1023, 18
    return ctypes.CDLL(None).syscall(158, request_permission, tile_data) == 0  # arch_prctl


def compile_kernel(name: str, *shape: int) -> int:
    """Machine address of the named kernel, specialised to the given shape."""
    with _compiling:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        emitter = Emitter(name)
        KERNELS[name](emitter, *shape)
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
