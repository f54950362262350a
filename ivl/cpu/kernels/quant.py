"""Products with quantized weights, for x86-64 with AVX2 or more. See emitter.py for the terms.

Inputs become integers of 16 bits with one scale per token, which loses less than their own bfloat16: x = s (256 h + l), where
h and l have 8 bits. VNNI, or what `_dot` makes of AVX2, multiplies unsigned weight bytes with h and with l. The sums are exact,
and what the offset of the weights adds is known beforehand from the inputs alone.

A token, as the kernels read it (`token_bytes`): three vectors (minus 128 times the sums of h and of l by lane, and s), then
for every step of the weight's row 64 bytes each of h and l, in 4 bits apart for even and odd elements, followed by what the
offset adds in this step. In 4 bits a step has 128 elements, 8 to a lane, so that a lane lies within a group.
"""

from __future__ import annotations

from llvmlite import ir

from ivl.cpu.kernels import features
from ivl.cpu.kernels.emitter import F32, F32S, I8, I16, I32, I32S, LANES, Emitter, Value
from ivl.cpu.kernels.rows import bias_at, norm_row, swiglu_row

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
        token = e.at(tokens, I8, e.b.mul(row.index, e.int(token_bytes(bits, width))))
        _prepare(e, e.at(x, I16, e.b.mul(row.index, x_stride)), token, bits, bool(zero), width)


def quant_gemv(e: Emitter, bits: int, groups: int, zero: int, width: int, num_tokens: int, before: str, plus: int) -> None:
    """y[c, r] = sum_i x[c, i] w[r, i] + bias[r] for num_tokens prepared tokens c, or for one row of bfloat16.

    The single row may be normalized or gated `before`, by every thread for itself, and a residual added to the result.
    """
    x, w, scales, y = e.pointer(1, I8), e.pointer(2, I8), e.pointer(3), e.pointer(6)
    bias_address, rows = e.argument(5), e.argument(7)
    token_size = token_bytes(bits, width)
    if num_tokens == 1:
        row = e.pointer(1)
        if before:
            prepared = e.b.alloca(I16, size=e.int(width))
            if before == "norm":
                norm_row(e, row, e.pointer(8), prepared, e.int(width), e.argument(9))
            else:
                swiglu_row(e, row, prepared, e.int(width))
            row = prepared
        x = e.memory(I8, token_size)
        _prepare(e, row, x, bits, bool(zero), width)
    added = e.pointer(10) if plus else None
    zeros = e.pointer(4, I8) if zero else None
    row_bytes = width * bits // 8
    together = features.rows_at_once()
    with e.blocks(rows, together) as first:
        row_ids = [e.b.add(first, e.int(r)) for r in range(together)]
        w_rows = [e.at(w, I8, e.b.mul(row, e.int(row_bytes))) for row in row_ids]
        scale_rows = [e.at(scales, I16, e.b.mul(row, e.int(groups))) for row in row_ids]
        zero_rows = [zeros and e.at(zeros, I8, e.b.mul(row, e.int(groups))) for row in row_ids]
        for block in range(0, num_tokens, COLUMN_BLOCK):
            tokens = [e.at(x, I8, e.int(c * token_size)) for c in range(block, min(block + COLUMN_BLOCK, num_tokens))]
            if bits == 8:
                totals = _sums8(e, w_rows, tokens, width, fetch=block == 0)
                totals = [[e.b.fmul(total, e.load_one(scale)) for total in row]
                          for row, scale in zip(totals, scale_rows, strict=True)]  # fmt: skip
            else:
                totals = _sums4(e, w_rows, scale_rows, zero_rows, tokens, width, groups, fetch=block == 0)
            for r, row_id in enumerate(row_ids):
                bias = bias_at(e, bias_address, row_id)
                for c, token in enumerate(tokens):
                    scale = e.b.load(e.at(e.at(token, I8, e.int(128)), F32, e.int(0)), typ=F32)
                    total = e.b.fadd(e.b.fmul(totals[r][c], scale), bias)
                    if added is not None:
                        total = e.b.fadd(total, e.load_one(e.at(added, I16, row_id)))
                    e.store_one(e.at(y, I16, e.b.add(e.b.mul(rows, e.int(block + c)), row_id)), total)


def dequantize(e: Emitter, bits: int, groups: int, zero: int, width: int) -> None:
    """w[r, i] = (q - z) scale as bfloat16, rounded half up."""
    w, scales, zeros, out = e.pointer(1, I8), e.pointer(2), e.pointer(3, I8), e.pointer(4)
    rows = e.argument(5)
    group, row_bytes = width // groups, width * bits // 8
    kind = ir.VectorType(I16 if bits == 8 else I8, LANES)
    with e.claimed(rows, 1) as (start, stop), e.loop(start, stop, 1) as row:
        w_row, out_row = e.at(w, I8, e.b.mul(row.index, e.int(row_bytes))), e.at(out, I16, e.b.mul(row.index, e.int(width)))
        with e.loop(e.int(0), e.int(groups), 1) as part:
            place = e.b.add(e.b.mul(row.index, e.int(groups)), part.index)
            scale = e.load_one(e.at(scales, I16, place))
            middle = ir.Constant(F32, float(2 ** (bits - 1)))
            if zero:
                middle = e.b.uitofp(e.b.load(e.at(zeros, I8, place), typ=I8), F32)
            factor, offset = e.splat(scale), e.splat(e.b.fneg(e.b.fmul(scale, middle)))
            base = e.b.mul(part.index, e.int(group))
            with e.loop(e.int(0), e.int(group), 2 * LANES) as column:
                at = e.b.add(base, column.index)
                lanes = e.b.zext(e.read(kind, w_row, I8, e.b.lshr(at, e.int(1)) if bits == 4 else at), I32S)
                pair = (e.b.and_(lanes, e.ints(2**bits - 1)), e.b.lshr(lanes, e.ints(bits)))
                even, odd = (e.fma(e.b.sitofp(q, F32S), factor, offset) for q in pair)
                e.store_small(out_row, at, (even, odd))


def row_scale(e: Emitter, x: Value, width: int, top_value: int) -> tuple[Value, Value]:
    """Return what a row is divided by so that its largest element becomes top_value, and one over it in every lane."""
    nothing = e.splat(0.0)
    with e.loop(e.int(0), e.int(width), 2 * LANES, nothing, nothing) as column:
        top, bad = column.values
        for half in e.load(x, column.index):
            size = e.b.bitcast(e.b.and_(e.b.bitcast(half, I32S), e.ints(0x7FFFFFFF)), F32S)
            top, bad = e.larger(size, top), e.fma(half, nothing, bad)
        column.carry([top, bad])
    largest = e.greatest(column.values[0])
    # Infinity or NaN makes the scale NaN, and so every result of the row.
    scale = e.b.fadd(e.b.fmul(largest, ir.Constant(F32, 1 / top_value)), e.total(column.values[1]))
    positive = e.b.fcmp_ordered(">", largest, ir.Constant(F32, 0.0))
    inverse = e.b.select(positive, e.b.fdiv(ir.Constant(F32, float(top_value)), largest), ir.Constant(F32, 0.0))
    return scale, e.splat(inverse)


def _prepare(e: Emitter, x: Value, token: Value, bits: int, zero: bool, width: int) -> None:
    scale, factor = row_scale(e, x, width, TOP)
    steps = -(-width // step_of(bits))
    if width % step_of(bits):  # what the last step lacks is zero
        last = e.int(HEAD + (steps - 1) * step_bytes(bits))
        for at in range(0, step_bytes(bits), 64):
            e.write(ir.Constant(BYTES, [0] * 64), token, I8, e.b.add(last, e.int(at)))
    quarter = ir.VectorType(I8, LANES)
    with e.loop(e.int(0), e.int(width), 2 * LANES) as column:
        pairs = []
        for half in e.load(x, column.index):
            whole = e.b.fptosi(e.call("llvm.rint.v16f32", F32S, e.b.fmul(half, factor)), I32S)
            high = e.b.ashr(e.b.add(whole, e.ints(128)), e.ints(8))
            pairs.append((high, e.b.sub(whole, e.b.shl(high, e.ints(8)))))
        step = e.b.mul(e.b.udiv(column.index, e.int(step_of(bits))), e.int(step_bytes(bits)))
        place, within = e.b.add(step, e.int(HEAD)), e.b.urem(column.index, e.int(step_of(bits)))
        for part, (even, odd) in enumerate(zip(*pairs, strict=True)):
            if bits == 8:
                both = e.b.or_(e.b.and_(even, e.ints(255)), e.b.shl(odd, e.ints(8)))
                both = e.b.trunc(both, ir.VectorType(I16, LANES))
                e.write(both, token, I8, e.b.add(e.b.add(place, within), e.int(64 * part)))
            else:
                for odds, values in enumerate((even, odd)):
                    at = e.b.add(place, e.b.add(e.b.lshr(within, e.int(1)), e.int(128 * part + 64 * odds)))
                    e.write(e.b.trunc(values, quarter), token, I8, at)
    e.write(e.splat(scale), token, I8, e.int(128))
    offset = ir.Constant(BYTES, [128 if bits == 8 else 1 if zero else 8] * 64)
    none = e.ints(0)
    with e.loop(e.int(0), e.int(steps), 1, none, none) as step:
        place = e.b.add(e.b.mul(step.index, e.int(step_bytes(bits))), e.int(HEAD))
        parts = [e.read(BYTES, token, I8, e.b.add(place, e.int(64 * n))) for n in range(2 if bits == 8 else 4)]
        if bits == 8:
            step.carry([_dot(e, total, offset, part, small=False) for total, part in zip(step.values, parts, strict=True)])
        else:
            high, low = (_dot(e, _dot(e, none, offset, parts[n], small=True), offset, parts[n + 1], small=True) for n in (0, 2))
            sums = e.b.sub(none, e.b.add(e.b.shl(high, e.ints(8)), low))
            e.write(e.b.sitofp(sums, F32S) if zero else sums, token, I8, e.b.add(place, e.int(256)))
    if bits == 8:
        for part, total in enumerate(step.values):
            e.write(e.b.sub(none, total), token, I8, e.int(64 * part))


def _sums8(e: Emitter, w_rows: list[Value], tokens: list[Value], width: int, *, fetch: bool) -> list[list[Value]]:
    """Return sums of 16-bit inputs times 8-bit weights, as float32, by row and token."""
    cells = [(r, c) for r in range(len(w_rows)) for c in range(len(tokens))]
    starts = [e.read(I32S, tokens[c], I8, e.int(64 * part)) for _, c in cells for part in (0, 1)]

    def step(at: Value, place: Value, size: int, sums: list[Value]) -> list[Value]:
        weights = [weight_bytes(e, row, at, size) for row in w_rows]
        inputs = [[e.read(BYTES, t, I8, e.b.add(place, e.int(64 * part))) for part in (0, 1)] for t in tokens]
        old = iter(sums)
        return [_dot(e, next(old), weights[r], inputs[c][part], small=False) for r, c in cells for part in (0, 1)]

    sums = starts
    if width >= 64:
        with e.loop(e.int(0), e.int(width // 64), 1, *starts) as inner:
            at = e.b.mul(inner.index, e.int(64))
            if fetch:
                for row in w_rows:
                    e.prefetch(e.at(row, I8, e.b.add(at, e.int(PREFETCH))))
            inner.carry(step(at, e.b.add(e.b.mul(inner.index, e.int(128)), e.int(HEAD)), 64, inner.values))
        sums = inner.values
    if width % 64:
        done = width // 64
        sums = step(e.int(done * 64), e.int(HEAD + done * 128), width % 64, sums)
    by_cell = iter(sums)
    totals: list[list[Value]] = [[] for _ in w_rows]
    for r, _ in cells:
        high, low = (e.b.sitofp(_int_total(e, next(by_cell)), F32) for _ in range(2))
        totals[r].append(e.b.fadd(e.b.fmul(high, ir.Constant(F32, 256.0)), low))
    return totals


def _sums4(
    e: Emitter, w_rows: list[Value], scale_rows: list[Value], zero_rows: list[Value], tokens: list[Value], width: int,
    groups: int, *, fetch: bool,
) -> list[list[Value]]:  # fmt: skip
    """Return sums of 16-bit inputs times 4-bit weights and their scales, by row and token."""
    cells = [(r, c) for r in range(len(w_rows)) for c in range(len(tokens))]
    group = width // groups
    low_half = ir.Constant(BYTES, [15] * 64)

    def step(number: Value, size: int, sums: list[Value]) -> list[Value]:
        place = e.b.add(e.b.mul(number, e.int(step_bytes(4))), e.int(HEAD))
        inputs = [[e.read(BYTES, t, I8, e.b.add(place, e.int(64 * n))) for n in range(4)] for t in tokens]
        offsets = [e.read(F32S if zero_rows[0] else I32S, t, I8, e.b.add(place, e.int(256))) for t in tokens]
        first_group = e.b.mul(number, e.int(128 // group))
        old, new = iter(sums), []
        for r, row in enumerate(w_rows):
            both = weight_bytes(e, row, e.b.mul(number, e.int(64)), size // 2)
            shifted = e.b.lshr(e.b.bitcast(both, I32S), e.ints(4))
            halves = (e.b.and_(both, low_half), e.b.and_(e.b.bitcast(shifted, BYTES), low_half))
            scale = _by_group(e, scale_rows[r], I16, first_group, size // group, group)
            scale = e.b.bitcast(e.b.shl(scale, e.ints(16)), F32S)
            zero = zero_rows[r] and e.b.sitofp(_by_group(e, zero_rows[r], I8, first_group, size // group, group), F32S)
            for c in range(len(tokens)):
                high, low = e.ints(0), e.ints(0) if zero else offsets[c]
                for half, part in zip(halves, inputs[c][:2], strict=True):
                    high = _dot(e, high, half, part, small=True)
                for half, part in zip(halves, inputs[c][2:], strict=True):
                    low = _dot(e, low, half, part, small=True)
                product = e.b.sitofp(e.b.add(e.b.shl(high, e.ints(8)), low), F32S)
                if zero:
                    product = e.fma(zero, offsets[c], product)
                new.append(e.fma(product, scale, next(old)))
        return new

    sums = [e.splat(0.0) for _ in cells]
    if width >= 128:
        with e.loop(e.int(0), e.int(width // 128), 1, *sums) as inner:
            if fetch:
                ahead = e.int(PREFETCH)
                for row in w_rows:
                    e.prefetch(e.at(row, I8, e.b.add(e.b.mul(inner.index, e.int(64)), ahead)))
            inner.carry(step(inner.index, 128, inner.values))
        sums = inner.values
    if width % 128:
        sums = step(e.int(width // 128), width % 128, sums)
    by_cell = iter(sums)
    totals: list[list[Value]] = [[] for _ in w_rows]
    for r, _ in cells:
        totals[r].append(e.total(next(by_cell)))
    return totals


def weight_bytes(e: Emitter, row: Value, at: Value, size: int) -> Value:
    """Read 64 bytes of weight; those beyond `size` become zero."""
    present = e.read(ir.VectorType(I8, size), row, I8, at)
    return present if size == 64 else _filled(e, present, list(range(64)), 64)


def _by_group(e: Emitter, row: Value, element: ir.Type, first: Value, count: int, group: int) -> Value:
    """row[first], ... of `count` groups, each in the lanes of its elements (8 to a lane), zero beyond, as int32."""
    lanes = group // 8
    if count * lanes == LANES and count == 1:
        return e.int_splat(e.b.zext(e.b.load(e.at(row, element, first), typ=element), I32))
    values = e.b.zext(e.read(ir.VectorType(element, count), row, element, first), ir.VectorType(I32, count))
    return _filled(e, values, [lane // lanes for lane in range(LANES)], LANES)


def _filled(e: Emitter, values: Value, order: list[int], size: int) -> Value:
    """Return values[order], with zero where the order leads beyond."""
    count, element = values.type.count, values.type.element
    index = ir.Constant(ir.VectorType(I32, size), [min(i, count) for i in order])
    return e.b.shuffle_vector(values, ir.Constant(ir.VectorType(element, count), [0] * count), index)


def _dot(e: Emitter, total: Value, weights: Value, inputs: Value, *, small: bool) -> Value:
    """Return total + the sum of 4 unsigned weights times signed inputs, by lane. small: weights have 4 bits."""
    if features.has_vnni():
        return e.call("llvm.x86.avx512.vpdpbusd.512", I32S, total, *(e.b.bitcast(x, I32S) for x in (weights, inputs)))
    if features.has_avx_vnni():
        halves = [[_half(e, e.b.bitcast(x, I32S), part) for x in (total, weights, inputs)] for part in (0, 1)]
        return _joined(e, [e.call("llvm.x86.avx512.vpdpbusd.256", half[0].type, *half) for half in halves])
    kind, ones = ir.VectorType(I32, LANES // 2), ir.Constant(ir.VectorType(I16, LANES), [1] * LANES)
    if small:  # two products fit into 16 bits
        pairs = [e.call("llvm.x86.avx2.pmadd.ub.sw", ones.type, _half(e, weights, n), _half(e, inputs, n)) for n in (0, 1)]
        return e.b.add(total, _joined(e, [e.call("llvm.x86.avx2.pmadd.wd", kind, pair, ones) for pair in pairs]))
    # Even and odd bytes are multiplied as 16-bit numbers, into sums of 32 bits.
    words, eight = [e.b.bitcast(x, WORDS) for x in (weights, inputs)], ir.Constant(WORDS, [8] * 32)
    even = e.b.and_(words[0], ir.Constant(WORDS, [255] * 32)), e.b.ashr(e.b.shl(words[1], eight), eight)
    odd = e.b.lshr(words[0], eight), e.b.ashr(words[1], eight)
    for pair in (even, odd):
        halves = [[_half(e, x, part) for x in pair] for part in (0, 1)]
        total = e.b.add(total, _joined(e, [e.call("llvm.x86.avx2.pmadd.wd", kind, *half) for half in halves]))
    return total


def _half(e: Emitter, x: Value, part: int) -> Value:
    """Return the lower or the upper half of a vector."""
    size = x.type.count // 2
    return e.b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, size), list(range(part * size, (part + 1) * size))))


def _joined(e: Emitter, halves: list[Value]) -> Value:
    low, high = halves
    return e.b.shuffle_vector(low, high, ir.Constant(I32S, list(range(LANES))))


def _int_total(e: Emitter, x: Value) -> Value:
    return e.call("llvm.vector.reduce.add.v16i32", I32, x)
