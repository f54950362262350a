"""Products with quantized weights, for x86-64 with AVX2 or more. See emitter.py for the terms.

Inputs become integers of 16 bits with one scale per token, which loses less than their own bfloat16: x = s (256 h + l), where
h and l have 8 bits. VNNI, or what `_dot` makes of AVX2, multiplies unsigned weight bytes with h and with l. The sums are exact,
and what the offset of the weights adds is known beforehand from the inputs alone.

A token, as the kernels read it (`token_bytes`): three vectors (minus 128 times the sums of h and of l by lane, and s), then
for every step of the weight's row 64 bytes each of h and l, in 4 bits apart for even and odd elements, followed by what the
offset adds in this step. In 4 bits a step has 128 elements, 8 to a lane, so that a lane lies within a group.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from ivl.cpu.kernels import features
from ivl.cpu.kernels.emitter import F32, F32S, I8, I16, I32, I32S, LANES, Emitter, Value
from ivl.cpu.kernels.rows import bias_at, prepared_row
from ivl.cpu.kernels.values import Operand

BYTES, WORDS = ir.VectorType(I8, 64), ir.VectorType(I16, 32)
HEAD = 3 * 64
COLUMN_BLOCK = 2
"""Tokens multiplied together with `rows_at_once` weight rows."""

PREFETCH = 4096
"""Bytes ahead."""
TOP = 32512
"""Largest 16-bit input: h is then 127 at most."""


def step_of(bits: int) -> int:
    """Return the elements of a row that a step multiplies: 64 bytes of weight."""
    return 512 // bits


def step_bytes(bits: int) -> int:
    """Return the bytes of a token for a step."""
    return 2 * 64 if bits == 8 else 5 * 64


def token_bytes(bits: int, width: int) -> int:
    return HEAD + -(-width // step_of(bits)) * step_bytes(bits)


def quantize_inputs(e: Emitter, bits: int, zero: int, width: int) -> None:
    """Turn rows of bfloat16 into tokens as above."""
    x, tokens = e.pointer(1), e.pointer(2, I8)
    rows, x_stride = e.argument(3), e.argument(4)
    with e.claimed(rows, 1) as (start, stop), e.loop(start, stop, 1) as row:
        token = e.at(tokens, I8, row.index * token_bytes(bits, width))
        _prepare(e, e.at(x, I16, row.index * x_stride), token, bits, bool(zero), width)


def quant_gemv(e: Emitter, bits: int, groups: int, zero: int, width: int, num_tokens: int, before: str, plus: int) -> None:
    """y[c, r] = sum_i x[c, i] w[r, i] + bias[r] for num_tokens prepared tokens c, or for one row of bfloat16.

    The single row may be normalized or gated `before`, by every thread for itself, and a residual added to the result.
    """
    x, w, scales, y = e.pointer(1, I8), e.pointer(2, I8), e.pointer(3), e.pointer(6)
    bias_address, rows = e.argument(5), e.argument(7)
    token_size = token_bytes(bits, width)
    if num_tokens == 1:
        row = prepared_row(e, e.pointer(1), e.int(width), before)
        x = e.memory(I8, token_size)
        _prepare(e, row, x, bits, bool(zero), width)
    added = e.pointer(10) if plus else None
    zeros = e.pointer(4, I8) if zero else None
    row_bytes = width * bits // 8
    together = features.rows_at_once()
    with e.blocks(rows, together) as first:
        row_ids = [first + r for r in range(together)]
        w_rows = [e.at(w, I8, row * row_bytes) for row in row_ids]
        scale_rows = [e.at(scales, I16, row * groups) for row in row_ids]
        zero_rows = [zeros and e.at(zeros, I8, row * groups) for row in row_ids]
        for block in range(0, num_tokens, COLUMN_BLOCK):
            tokens = [e.at(x, I8, c * token_size) for c in range(block, min(block + COLUMN_BLOCK, num_tokens))]
            if bits == 8:
                totals = _sums8(e, w_rows, tokens, width, fetch=block == 0)
                totals = [[total * e.load_one(scale) for total in row]
                          for row, scale in zip(totals, scale_rows, strict=True)]  # fmt: skip
            else:
                totals = _sums4(e, w_rows, scale_rows, zero_rows, tokens, width, groups, fetch=block == 0)
            for r, row_id in enumerate(row_ids):
                bias = bias_at(e, bias_address, row_id)
                for c, token in enumerate(tokens):
                    scale = e.element(e.at(token, I8, 128), F32, 0)
                    total = totals[r][c] * scale + bias
                    if added is not None:
                        total = total + e.load_one(e.at(added, I16, row_id))
                    e.store_one(e.at(y, I16, rows * (block + c) + row_id), total)


def dequantize(e: Emitter, bits: int, groups: int, zero: int, width: int) -> None:
    """w[r, i] = (q - z) scale as bfloat16, rounded half up."""
    w, scales, zeros, out = e.pointer(1, I8), e.pointer(2), e.pointer(3, I8), e.pointer(4)
    rows = e.argument(5)
    group, row_bytes = width // groups, width * bits // 8
    kind = ir.VectorType(I16 if bits == 8 else I8, LANES)
    with e.claimed(rows, 1) as (start, stop), e.loop(start, stop, 1) as row:
        w_row, out_row = e.at(w, I8, row.index * row_bytes), e.at(out, I16, row.index * width)
        with e.loop(0, groups, 1) as part:
            place = row.index * groups + part.index
            scale = e.load_one(e.at(scales, I16, place))
            middle = ir.Constant(F32, float(2 ** (bits - 1)))
            if zero:
                middle = e.b.uitofp(e.element(zeros, I8, place), F32)
            factor, offset = e.splat(scale), e.splat(-(scale * middle))
            base = part.index * group
            with e.loop(0, group, 2 * LANES) as column:
                at = base + column.index
                lanes = e.b.zext(e.read(kind, w_row, I8, at >> 1 if bits == 4 else at), I32S)
                pair = (lanes & (2**bits - 1), lanes >> bits)
                even, odd = (e.fma(e.b.sitofp(q, F32S), factor, offset) for q in pair)
                e.store_small(out_row, at, (even, odd))


def row_scale(e: Emitter, x: Value, width: int, top_value: int) -> tuple[Value, Value]:
    """Return what a row is divided by so that its largest element becomes top_value, and one over it in every lane."""
    nothing = e.splat(0.0)
    with e.loop(0, width, 2 * LANES, nothing, nothing) as column:
        top, bad = column.values
        for half in e.load(x, column.index):
            size = e.b.bitcast(e.b.bitcast(half, I32S) & 0x7FFFFFFF, F32S)
            top, bad = e.larger(size, top), e.fma(half, nothing, bad)
        column.carry([top, bad])
    largest = e.greatest(column.values[0])
    # Infinity or NaN makes the scale NaN, and so every result of the row.
    scale = largest * (1 / top_value) + e.total(column.values[1])
    positive = largest > 0.0
    inverse = e.b.select(positive, float(top_value) / largest, ir.Constant(F32, 0.0))
    return scale, e.splat(inverse)


def _prepare(e: Emitter, x: Value, token: Value, bits: int, zero: bool, width: int) -> None:
    scale, factor = row_scale(e, x, width, TOP)
    steps = -(-width // step_of(bits))
    if width % step_of(bits):  # what the last step lacks is zero
        last = e.int(HEAD + (steps - 1) * step_bytes(bits))
        for at in range(0, step_bytes(bits), 64):
            e.write(ir.Constant(BYTES, [0] * 64), token, I8, last + at)
    quarter = ir.VectorType(I8, LANES)
    with e.loop(0, width, 2 * LANES) as column:
        pairs = []
        for half in e.load(x, column.index):
            whole = e.b.fptosi(e.call("llvm.rint.v16f32", F32S, half * factor), I32S)
            high = e.b.ashr(whole + 128, e.ints(8))
            pairs.append((high, whole - (high << 8)))
        step = column.index // step_of(bits) * step_bytes(bits)
        place, within = step + HEAD, column.index % step_of(bits)
        for part, (even, odd) in enumerate(zip(*pairs, strict=True)):
            if bits == 8:
                both = (even & 255) | (odd << 8)
                both = e.b.trunc(both, ir.VectorType(I16, LANES))
                e.write(both, token, I8, place + within + 64 * part)
            else:
                for odds, values in enumerate((even, odd)):
                    at = place + ((within >> 1) + (128 * part + 64 * odds))
                    e.write(e.b.trunc(values, quarter), token, I8, at)
    e.write(e.splat(scale), token, I8, 128)
    offset = ir.Constant(BYTES, [128 if bits == 8 else 1 if zero else 8] * 64)
    none = e.ints(0)
    with e.loop(0, steps, 1, none, none) as step:
        place = step.index * step_bytes(bits) + HEAD
        parts = [e.read(BYTES, token, I8, place + 64 * n) for n in range(2 if bits == 8 else 4)]
        if bits == 8:
            step.carry([_dot(e, total, offset, part, small=False) for total, part in zip(step.values, parts, strict=True)])
        else:
            high, low = (_dot(e, _dot(e, none, offset, parts[n], small=True), offset, parts[n + 1], small=True) for n in (0, 2))
            sums = none - ((high << 8) + low)
            e.write(e.b.sitofp(sums, F32S) if zero else sums, token, I8, place + 256)
    if bits == 8:
        for part, total in enumerate(step.values):
            e.write(none - total, token, I8, 64 * part)


def _sums8(e: Emitter, w_rows: list[Value], tokens: list[Value], width: int, *, fetch: bool) -> list[list[Value]]:
    """Return sums of 16-bit inputs times 8-bit weights, as float32, by row and token."""
    cells = [(r, c) for r in range(len(w_rows)) for c in range(len(tokens))]
    starts = [e.read(I32S, tokens[c], I8, 64 * part) for _, c in cells for part in (0, 1)]

    def step(number: Value, size: int, sums: list[Value]) -> list[Value]:
        at, place = number * 64, number * 128 + HEAD
        for row in w_rows if fetch and size == 64 else ():
            e.prefetch(e.at(row, I8, at + PREFETCH))
        weights = [weight_bytes(e, row, at, size) for row in w_rows]
        inputs = [[e.read(BYTES, t, I8, place + 64 * part) for part in (0, 1)] for t in tokens]
        old = iter(sums)
        return [_dot(e, next(old), weights[r], inputs[c][part], small=False) for r, c in cells for part in (0, 1)]

    by_cell = iter(e.in_steps(width, 64, step, *starts))
    totals: list[list[Value]] = [[] for _ in w_rows]
    for r, _ in cells:
        high, low = (
            e.b.sitofp(e.call("llvm.vector.reduce.add.v16i32", I32, total), F32) for total in (next(by_cell), next(by_cell))
        )
        totals[r].append(high * 256.0 + low)
    return totals


def _sums4(
    e: Emitter, w_rows: list[Value], scale_rows: list[Value], zero_rows: list[Value | None], tokens: list[Value], width: int,
    groups: int, *, fetch: bool,
) -> list[list[Value]]:  # fmt: skip
    """Return sums of 16-bit inputs times 4-bit weights and their scales, by row and token."""
    cells = [(r, c) for r in range(len(w_rows)) for c in range(len(tokens))]
    group = width // groups
    low_half = ir.Constant(BYTES, [15] * 64)

    def step(number: Value, size: int, sums: list[Value]) -> list[Value]:
        for row in w_rows if fetch and size == 128 else ():
            e.prefetch(e.at(row, I8, number * 64 + PREFETCH))
        place = number * step_bytes(4) + HEAD
        inputs = [[e.read(BYTES, t, I8, place + 64 * n) for n in range(4)] for t in tokens]
        offsets = [e.read(F32S if zero_rows[0] else I32S, t, I8, place + 256) for t in tokens]
        first_group = number * (128 // group)
        old, new = iter(sums), []
        for row, scale_row, zero_row in zip(w_rows, scale_rows, zero_rows, strict=True):
            both = weight_bytes(e, row, number * 64, size // 2)
            shifted = e.b.bitcast(both, I32S) >> 4
            halves = (both & low_half, e.b.bitcast(shifted, BYTES) & low_half)
            scale = _by_group(e, scale_row, I16, first_group, size // group, group)
            scale = e.b.bitcast(scale << 16, F32S)
            zero = zero_row and e.b.sitofp(_by_group(e, zero_row, I8, first_group, size // group, group), F32S)
            for c in range(len(tokens)):
                high, low = e.ints(0), e.ints(0) if zero else offsets[c]
                for half, part in zip(halves, inputs[c][:2], strict=True):
                    high = _dot(e, high, half, part, small=True)
                for half, part in zip(halves, inputs[c][2:], strict=True):
                    low = _dot(e, low, half, part, small=True)
                product = e.b.sitofp((high << 8) + low, F32S)
                if zero:
                    product = e.fma(zero, offsets[c], product)
                new.append(e.fma(product, scale, next(old)))
        return new

    by_cell = iter(e.in_steps(width, 128, step, *(e.splat(0.0) for _ in cells)))
    return [[e.total(next(by_cell)) for _ in tokens] for _ in w_rows]


def weight_bytes(e: Emitter, row: Value, at: Value, size: int) -> Value:
    """Read 64 bytes of weight; those beyond `size` become zero."""
    present = e.read(ir.VectorType(I8, size), row, I8, at)
    return present if size == 64 else _filled(e, present, list(range(64)), 64)


def _by_group(e: Emitter, row: Value, element: ir.Type, first: Value, count: int, group: int) -> Value:
    """row[first], ... of `count` groups, each in the lanes of its elements (8 to a lane), zero beyond, as int32."""
    lanes = group // 8
    if count * lanes == LANES and count == 1:
        return e.splat(e.b.zext(e.element(row, element, first), I32))
    values = e.b.zext(e.read(ir.VectorType(element, count), row, element, first), ir.VectorType(I32, count))
    return _filled(e, values, [lane // lanes for lane in range(LANES)], LANES)


def _filled(e: Emitter, values: Value, order: list[int], size: int) -> Value:
    """Return values[order], with zero where the order leads beyond."""
    count, element = values.type.count, values.type.element
    index = ir.Constant(ir.VectorType(I32, size), [min(i, count) for i in order])
    return e.b.shuffle_vector(values, ir.Constant(ir.VectorType(element, count), [0] * count), index)


def _dot(e: Emitter, total: Value, weights: Operand, inputs: Value, *, small: bool) -> Value:
    """Return total + the sum of 4 unsigned weights times signed inputs, by lane. small: weights have 4 bits."""
    if features.at_least("avx512"):
        return e.call("llvm.x86.avx512.vpdpbusd.512", I32S, total, *(e.b.bitcast(x, I32S) for x in (weights, inputs)))
    if features.has_avx_vnni():
        halves = [[_half(e, e.b.bitcast(x, I32S), part) for x in (total, weights, inputs)] for part in (0, 1)]
        return _joined(e, [e.call("llvm.x86.avx512.vpdpbusd.256", half[0].type, *half) for half in halves])
    kind, ones = ir.VectorType(I32, LANES // 2), ir.Constant(ir.VectorType(I16, LANES), [1] * LANES)
    if small:  # two products fit into 16 bits
        pairs = [e.call("llvm.x86.avx2.pmadd.ub.sw", ones.type, _half(e, weights, n), _half(e, inputs, n)) for n in (0, 1)]
        return total + _joined(e, [e.call("llvm.x86.avx2.pmadd.wd", kind, pair, ones) for pair in pairs])
    # Even and odd bytes are multiplied as 16-bit numbers, into sums of 32 bits.
    words, eight = [e.b.bitcast(x, WORDS) for x in (weights, inputs)], ir.Constant(WORDS, [8] * 32)
    even = words[0] & ir.Constant(WORDS, [255] * 32), e.b.ashr(words[1] << eight, eight)
    odd = words[0] >> eight, e.b.ashr(words[1], eight)
    for pair in (even, odd):
        halves = [[_half(e, x, part) for x in pair] for part in (0, 1)]
        total = total + _joined(e, [e.call("llvm.x86.avx2.pmadd.wd", kind, *half) for half in halves])
    return total


def _half(e: Emitter, x: Any, part: int) -> Value:
    """Return the lower or the upper half of a vector."""
    size = x.type.count // 2
    return e.b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, size), list(range(part * size, (part + 1) * size))))


def _joined(e: Emitter, halves: list[Value]) -> Value:
    low, high = halves
    return e.b.shuffle_vector(low, high, ir.Constant(I32S, list(range(LANES))))
