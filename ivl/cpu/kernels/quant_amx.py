"""Products of several tokens with quantized weights, with AMX. See emitter.py for the terms.

GEMMs (quant_gemm, w8a8_gemm): a thread unpacks 32 rows of the weight, laid out as second operands, and multiplies them with
all tokens while they are in its cache. In 8 bits the integers themselves are unpacked, without loss, and the scale is
applied to the sums. Small batches (quant_small_batch8, quant_small_batch4): at most 16 tokens, bound by reading the weight,
which stays in integers and is the first operand; the tokens are laid out instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from llvmlite import ir

from ivl.cpu.kernels.emitter import AMX_ROWS, F32, F32S, I8, I16, I16S, I32, I32S, LANES, Emitter, Value
from ivl.cpu.kernels.quant import BYTES, HEAD, row_scale, step_bytes, step_of, token_bytes, weight_bytes
from ivl.cpu.kernels.rows import bias_vector, gelu, transposed

ROWS = 2 * AMX_ROWS
AMX_BYTES = 1024
AHEAD = 4096
"""Bytes ahead that are fetched."""


def scratch_bytes(width: int) -> int:
    """Return what one thread needs for 32 unpacked rows."""
    return width // 32 * 2 * AMX_BYTES


def quant_gemm(e: Emitter, bits: int, groups: int, zero: int, width: int, height: int, together: int) -> None:
    """y[t, r] = sum_i x[t, i] w[r, i] + bias[r] for tokens t in registers of `height` rows, `together` (1 or 2) at a time."""
    scratch = e.thread_scratch()
    x, w, scales, zeros = e.pointer(4), e.pointer(5, I8), e.pointer(6), e.pointer(7, I8)
    biases, y = e.pointer(8, F32), e.pointer(9)
    rows, tokens, x_stride = e.argument(10), e.argument(11), e.argument(12)
    row_bytes, x_bytes = width * bits // 8, x_stride * 2
    e.amx_configure([(height, 64)] * 6 + [(AMX_ROWS, 64)] * 2)
    block = together * height
    corner = e.memory(F32, block * ROWS)
    with e.blocks(rows, ROWS) as first:
        for part in range(2):
            row_ids = [first + (part * AMX_ROWS + r) for r in range(AMX_ROWS)]
            w_rows = [e.at(w, I8, row * row_bytes) for row in row_ids]
            places = [row * groups for row in row_ids]
            _unpack(e, e.at(scratch, I8, part * AMX_BYTES), w_rows, scales, zeros if zero else None, places, bits,
                    groups, width)  # fmt: skip
        offsets = [e.read(F32S, biases, F32, first + part * AMX_ROWS) for part in range(2)]
        factors = [e.floats(scales, first + part * AMX_ROWS) for part in range(2)] if bits == 8 else None
        with e.loop(0, tokens, block) as column:
            token = e.smaller(column.index, tokens - block)
            x_blocks = [e.at(x, I16, (token + n * height) * x_stride) for n in range(together)]
            e.amx_zero(range(2 * together))
            with e.loop(0, width, 32) as inner:
                place = e.at(scratch, I8, inner.index * (AMX_BYTES // AMX_ROWS))
                _multiply(e, "tdpbf16ps", together, (e.at(x_block, I16, inner.index) for x_block in x_blocks), x_bytes, place)
            _store_block(e, together, height, corner, F32)
            with e.loop(0, block, 1) as line:
                out = (token + line.index) * rows + first
                for part in range(2):
                    total = e.read(F32S, corner, F32, line.index * ROWS + part * AMX_ROWS)
                    total = e.fma(total, factors[part], offsets[part]) if factors else total + offsets[part]
                    e.store_floats(y, out + part * AMX_ROWS, total)
    e.amx_release()


def w8a8_round(e: Emitter, width: int) -> None:
    """Round rows of bfloat16 to 8 bits: int8 [width], then scale (float32) and -128 times the sum (int32) in 64 bytes."""
    x, out, rows, x_stride = e.pointer(1), e.pointer(2, I8), e.argument(3), e.argument(4)
    with e.claimed(rows, 1) as (start, stop), e.loop(start, stop, 1) as row:
        source, target = e.at(x, I16, row.index * x_stride), e.at(out, I8, row.index * (width + 64))
        scale, factor = row_scale(e, source, width, 127)
        with e.loop(0, width, 2 * LANES, e.ints(0)) as column:
            even, odd = (
                e.b.fptosi(e.call("llvm.rint.v16f32", F32S, half * factor), I32S) for half in e.load(source, column.index)
            )
            both = (even & 255) | (odd << 8)
            e.write(e.b.trunc(both, I16S), target, I8, column.index)
            column.carry([column.values[0] + (even + odd)])
        total = e.call("llvm.vector.reduce.add.v16i32", I32, column.values[0])
        end = e.at(target, I8, width)
        e.b.store(scale, e.at(end, F32, 0))
        e.b.store(total * -128, e.at(end, I32, 1))


def w8a8_gemm(e: Emitter, width: int, height: int, together: int, after: str) -> None:
    """y[t, r] = sum_i x[t, i] w[r, i] + bias[r] for tokens from w8a8_round and weights of 8 bits; sums are exact.

    after: "gelu" applies GELU to y, "add" gives plus[t, r] + factor[r] * y, "" is y itself.
    """
    scratch = e.thread_scratch()
    x, w, scales, biases, y = e.pointer(4, I8), e.pointer(5, I8), e.pointer(6), e.pointer(7, F32), e.pointer(8)
    rows, tokens = e.argument(9), e.argument(10)
    plus, factor = (e.pointer(11), e.pointer(12)) if after == "add" else (None, None)
    size, steps, block = width + 64, -(-width // 64), together * height
    e.amx_configure([(height, 64)] * 6 + [(AMX_ROWS, 64)] * 2)
    corner = e.memory(I32, block * ROWS)
    with e.blocks(rows, ROWS) as first:
        for part in range(2):
            w_rows = [e.at(w, I8, (first + (part * AMX_ROWS + r)) * width) for r in range(AMX_ROWS)]

            def laid_out(number: Value, count: int, _: list[Value], w_rows: list[Value] = w_rows, part: int = part) -> None:
                words = (e.b.bitcast(weight_bytes(e, row, number * 64, count), I32S) for row in w_rows)
                for j, word in enumerate(transposed(e, list(words))):
                    e.write(word, scratch, I8, number * (2 * AMX_BYTES) + (part * AMX_BYTES + j * 64))

            e.in_steps(width, 64, laid_out)
        offsets = [e.read(F32S, biases, F32, first + part * AMX_ROWS) for part in range(2)]
        factors = [e.floats(scales, first + part * AMX_ROWS) for part in range(2)]
        with e.loop(0, tokens, block) as column:
            token = e.smaller(column.index, tokens - block)
            x_blocks = [e.at(x, I8, (token + n * height) * size) for n in range(together)]
            e.amx_zero(range(2 * together))
            with e.loop(0, steps, 1) as inner:
                place = e.at(scratch, I8, inner.index * (2 * AMX_BYTES))
                x_steps = (e.at(x_block, I8, inner.index * 64) for x_block in x_blocks)
                _multiply(e, "tdpbsud", together, x_steps, e.int(size), place)
            _store_block(e, together, height, corner, I32)
            with e.loop(0, block, 1) as line:
                number = token + line.index
                end = e.at(x, I8, number * size + width)
                scale, offset = e.splat(e.element(end, F32, 0)), e.splat(e.element(end, I32, 1))
                out = number * rows + first
                for part in range(2):
                    place, at = out + part * AMX_ROWS, line.index * ROWS + part * AMX_ROWS
                    total = e.b.sitofp(e.read(I32S, corner, I32, at) + offset, F32S)
                    total = e.fma(total * scale, factors[part], offsets[part])
                    if after == "gelu":
                        total = gelu(e, total)
                    elif plus is not None and factor is not None:
                        scaled = e.floats(factor, first + part * AMX_ROWS)
                        total = e.fma(total, scaled, e.floats(plus, place))
                    e.store_floats(y, place, total)
    e.amx_release()


def _multiply(e: Emitter, dot: str, together: int, inputs: Iterable[Value], row_bytes: Value, weights: Value) -> None:
    """Multiply one or two registers of tokens with two registers of weights.

    Registers 0 to 3 are sums, with a row for each token: a pair for each register of tokens. Registers 4 and 5 are tokens, 6
    and 7 weights, with a row for each pair or four of elements. With two registers of tokens, four loads serve four products.
    """
    for register, place in enumerate(inputs, 4):
        e.amx_load(register, place, row_bytes)
    for part in range(2):
        e.amx_load(6 + part, e.at(weights, I8, part * AMX_BYTES), 64)
    for n in range(2 * together):
        e.amx_dot(dot, n, 4 + n // 2, 6 + n % 2)


def _store_block(e: Emitter, together: int, height: int, corner: Value, kind: ir.Type) -> None:
    """Store the sums as corner[token, 32 rows]."""
    for n in range(2 * together):
        place = e.at(corner, kind, n // 2 * height * ROWS + n % 2 * AMX_ROWS)
        e.amx_store(n, place, 4 * ROWS)


def _unpack(
    e: Emitter, out: Value, w_rows: list[Value], scales: Value, zeros: Value | None, places: list[Value], bits: int,
    groups: int, width: int,
) -> None:  # fmt: skip
    """Unpack 16 rows to bfloat16: out[i / 32][i % 32 / 2][row] holds elements i and i + 1.

    Blocks of 32 elements are two registers apart, for the other 16 rows of a block of 32 lie between.
    """
    step = step_of(bits)
    per_lane, group = step // LANES, width // groups

    def unpacked(number: Value, size: int, _: list[Value]) -> None:
        ahead = e.int(len(w_rows) * 2 * width * bits // 8)
        for row in w_rows if size == step else ():
            e.prefetch(e.at(row, I8, number * 64 + ahead))
        words = transposed(e, [e.b.bitcast(weight_bytes(e, row, number * 64, size * bits // 8), I32S) for row in w_rows])
        factor = offset = None
        for j in range(size // per_lane):
            if bits == 4 and j % (group // 8) == 0:
                part = number * (step // group) + j * 8 // group
                factor, offset = _affine(e, scales, zeros, [place + part for place in places])
            for h in range(per_lane // 2):
                shifted = (words[j] >> shift if shift else words[j] for shift in (2 * h * bits, (2 * h + 1) * bits))
                digits = [e.b.sitofp(digit & (2**bits - 1), F32S) for digit in shifted]
                if bits == 8:  # whole numbers up to 128 fit bfloat16
                    even, odd = (e.b.bitcast(digit - 128.0, I32S) for digit in digits)
                else:
                    assert factor is not None and offset is not None
                    even, odd = (e.b.bitcast(e.fma(digit, factor, offset), I32S) + 0x8000 for digit in digits)
                index = j * per_lane // 2 + h  # of the pair within the step
                at = index // 16 * 2 * AMX_BYTES + index % 16 * 64
                e.write(e.words(even, odd), out, I8, number * (step // 32 * 2 * AMX_BYTES) + at)

    e.in_steps(width, step, unpacked)


def _affine(e: Emitter, scales: Value, zeros: Value | None, places: list[Value]) -> tuple[Value, Value]:
    """Return scale and -scale * zero of one group of every row, in the lanes of the rows."""
    factor = offset = Value(e.b, ir.Constant(I32S, ir.Undefined))
    for r, place in enumerate(places):
        bits = e.b.zext(e.element(scales, I16, place), I32)
        factor = e.b.insert_element(factor, bits, ir.Constant(I32, r))
        if zeros is not None:
            zero = e.b.zext(e.element(zeros, I8, place), I32)
            offset = e.b.insert_element(offset, zero, ir.Constant(I32, r))
    factor = e.b.bitcast(factor << 16, F32S)
    middle = e.splat(8.0) if zeros is None else e.b.sitofp(offset, F32S)
    return factor, -(factor * middle)


class _SmallBatch(NamedTuple):
    """What both small-batch kernels work on."""

    x: Value
    """The tokens as quant.py prepares them, transposed: x[word, token] in words of 4 bytes."""
    w: Value
    scales: Value
    zeros: Value
    bias_address: Value
    y: Value
    rows: Value
    residual: Value | None
    given: Value
    """The number of tokens; the others of the 16 repeat the last one."""
    token_scales: Value
    sums: Value
    """Memory for the four sum registers."""
    digits: Value
    """Memory for 32 rows of 4-bit weights, a byte each: 64 bytes of even elements per row, then those of odd ones."""
    totals: Value
    """Memory for float32 sums [row, token]."""

    def word(self, e: Emitter, row: Value) -> Value:
        """Return where a word of every token is."""
        return e.at(self.x, I32, row * AMX_ROWS)


# Integer products of a small batch use all 8 AMX registers: sums of h (0, 2) and of l (1, 3) for rows 0-15 and 16-31 of a
# block, weight bytes (4, 5) of its two halves, and the tokens' bytes h and l (6, 7). Two weight registers against two token
# registers make four products from four loads.
SUMS, LEFT, RIGHT = ((0, 1), (2, 3)), (4, 5), (6, 7)


def _begin_batch(e: Emitter, bits: int, width: int, step: int, plus: int) -> _SmallBatch:
    """Read the arguments, transpose the tokens, and describe the registers. step: bytes of a weight row in a register."""
    x = e.b.bitcast(e.thread_scratch(), I32.as_pointer())
    tokens, w, scales, zeros = e.pointer(4, I32), e.pointer(5, I8), e.pointer(6), e.pointer(7, I8)
    bias_address, y, rows = e.argument(8), e.pointer(9), e.argument(10)
    residual, given = e.pointer(11) if plus else None, e.argument(12)
    words = token_bytes(bits, width) // 4
    starts = [e.smaller(t, given - 1) * words for t in range(LANES)]
    with e.loop(0, words, LANES) as column:
        lines = [e.read(I32S, tokens, I32, column.index + start) for start in starts]
        for n, line in enumerate(transposed(e, lines)):
            e.write(line, x, I32, (column.index + n) * AMX_ROWS)
    token_scales = e.read(F32S, x, I32, 32 * AMX_ROWS)
    e.amx_configure([(AMX_ROWS, 64)] * 4 + [(AMX_ROWS, step)] * 2 + [(step // 4, 64)] * 2)
    memory = (e.memory(I32, 4 * AMX_ROWS * AMX_ROWS), e.memory(I8, 4 * AMX_BYTES), e.memory(F32, ROWS * AMX_ROWS))
    return _SmallBatch(x, w, scales, zeros, bias_address, y, rows, residual, given, token_scales, *memory)


def _multiply_integers(e: Emitter, left: list[Value], stride: int, right: list[Value]) -> None:
    """Add the products of unsigned weight bytes and the tokens' signed bytes to the sum registers."""
    for register, place in zip(RIGHT, right, strict=True):
        e.amx_load(register, place, 64)
    for part, place in enumerate(left):
        e.amx_load(LEFT[part], place, stride)
        for total, register in zip(SUMS[part], RIGHT, strict=True):
            e.amx_dot("tdpbusd", total, LEFT[part], register)


def _store_sums(e: Emitter, batch: _SmallBatch) -> None:
    for register in range(4):
        e.amx_store(register, e.at(batch.sums, I32, register * AMX_ROWS * AMX_ROWS), 64)


def _row_sums(e: Emitter, batch: _SmallBatch, part: int, r: int, offsets: list[Value]) -> list[Value]:
    """Return sums of h and of l for a weight row, by token."""
    places = ((register * AMX_ROWS + r) * AMX_ROWS for register in SUMS[part])
    return [e.read(I32S, batch.sums, I32, place) + offset for place, offset in zip(places, offsets, strict=True)]


def _offset(e: Emitter, batch: _SmallBatch, zero: Value, first: int, count: int, base: Value) -> Value:
    """Return what the weights' offset adds, by token: the sum of `count` words of the tokens, and of `zero`."""
    total = zero
    for n in range(first, first + count):
        total = total + e.read(zero.type, batch.word(e, base + n), I32, 0)
    return total


def _store_batch(e: Emitter, batch: _SmallBatch, first: Value, totals: list[Value]) -> None:
    """y[t, first + r] = totals[r][t] * scale of the token + bias + residual."""
    for part in range(2):
        bias = bias_vector(e, batch.bias_address, first + part * AMX_ROWS)
        outs = [total * batch.token_scales for total in totals[part * AMX_ROWS : (part + 1) * AMX_ROWS]]
        for t, total in enumerate(transposed(e, outs)):
            with e.b.if_then(batch.given > t):
                place = batch.rows * t + (first + part * AMX_ROWS)
                total = total + bias
                added = batch.residual
                e.store_floats(batch.y, place, total if added is None else total + e.floats(added, place))


def quant_small_batch8(e: Emitter, width: int, plus: int) -> None:
    """y[t, r] of at most 16 tokens and weights of 8 bits, with AMX on integers. The sums of a row are exact.

    Weight bytes are multiplied as they lie in memory: 16 rows of 64 bytes fill a register.
    """
    batch = _begin_batch(e, 8, width, 64, plus)
    with e.blocks(batch.rows, ROWS) as first:
        row_ids = [first + r for r in range(ROWS)]
        totals: list[Value] = []
        e.amx_zero(range(4))
        with e.loop(0, width // 64, 1) as inner:
            at = inner.index * 64
            left = [e.at(batch.w, I8, row_ids[part * AMX_ROWS] * width + at) for part in range(2)]
            base = inner.index * 32 + HEAD // 4
            for row in row_ids:
                e.prefetch(e.at(batch.w, I8, row * width + (at + AHEAD)))
            _multiply_integers(e, left, width, [batch.word(e, base), batch.word(e, base + AMX_ROWS)])
        _store_sums(e, batch)
        offsets = [_offset(e, batch, e.ints(0), part * AMX_ROWS, AMX_ROWS, e.int(0)) for part in range(2)]
        for part in range(2):
            for r in range(AMX_ROWS):
                high, low = (e.b.sitofp(total, F32S) for total in _row_sums(e, batch, part, r, offsets))
                total = high * 256.0 + low
                scale = e.load_one(e.at(batch.scales, I16, row_ids[part * AMX_ROWS + r]))
                totals.append(total * e.splat(scale))
        _store_batch(e, batch, first, totals)
    e.amx_release()


def quant_small_batch4(e: Emitter, groups: int, zero: int, width: int, plus: int) -> None:
    """y[t, r] of at most 16 tokens and weights of 4 bits, with AMX on integers. The sums of a group are exact.

    A step unpacks 128 elements of 32 rows to bytes, even and odd ones apart, and multiplies them group by group: a group's
    sums leave the registers to be scaled and added in float32.
    """
    group = width // groups
    step = group // 2
    batch = _begin_batch(e, 4, width, step, plus)
    with e.blocks(batch.rows, ROWS) as first:
        row_ids = [first + r for r in range(ROWS)]
        for r in range(ROWS):
            e.write(e.splat(0.0), batch.totals, F32, r * AMX_ROWS)
        w_rows = [e.at(batch.w, I8, row * (width // 2)) for row in row_ids]
        scale_rows = [e.at(batch.scales, I16, row * groups) for row in row_ids]
        zero_rows = [e.at(batch.zeros, I8, row * groups) for row in row_ids]
        with e.loop(0, width // 128, 1) as inner:
            _unpack_digits(e, batch, w_rows, inner.index)
            base = inner.index * (step_bytes(4) // 4) + HEAD // 4
            for g in range(128 // group):
                e.amx_zero(range(4))
                within = g * step
                for odd in range(2):
                    left = [e.at(batch.digits, I8, (odd * 2 + part) * AMX_BYTES + within) for part in range(2)]
                    words = [(2 * low + odd) * AMX_ROWS + within // 4 for low in range(2)]
                    _multiply_integers(e, left, 64, [batch.word(e, base + word) for word in words])
                _store_sums(e, batch)
                offset = _offset(e, batch, e.splat(0.0) if zero else e.ints(0), 4 * AMX_ROWS + within // 4, step // 4, base)
                place = inner.index * (128 // group) + g
                _add_group(e, batch, scale_rows, zero_rows if zero else None, place, offset)
        totals = [e.read(F32S, batch.totals, F32, r * AMX_ROWS) for r in range(ROWS)]
        _store_batch(e, batch, first, totals)
    e.amx_release()


def _unpack_digits(e: Emitter, batch: _SmallBatch, w_rows: list[Value], number: Value) -> None:
    """Write 128 elements of 32 rows to batch.digits."""
    mask = ir.Constant(BYTES, [15] * 64)
    for r, row in enumerate(w_rows):
        e.prefetch(e.at(row, I8, number * 64 + AHEAD))
        both = e.read(BYTES, row, I8, number * 64)
        shifted = e.b.bitcast(e.b.bitcast(both, I32S) >> 4, BYTES)
        e.write(both & mask, batch.digits, I8, r * 64)
        e.write(shifted & mask, batch.digits, I8, 2 * AMX_BYTES + r * 64)


def _add_group(
    e: Emitter, batch: _SmallBatch, scale_rows: list[Value], zero_rows: list[Value] | None, place: Value, offset: Value
) -> None:
    """totals[r, t] += scale[r] * the sum of a group. offset: -8 times the inputs' sum, or minus that sum with zero points."""
    for r in range(ROWS):
        high, low = _row_sums(e, batch, r // AMX_ROWS, r % AMX_ROWS, [e.ints(0), e.ints(0) if zero_rows else offset])
        term = e.b.sitofp((high << 8) + low, F32S)
        if zero_rows:
            middle = e.b.uitofp(e.element(zero_rows[r], I8, place), F32)
            term = e.fma(e.splat(middle), offset, term)
        total = e.read(F32S, batch.totals, F32, r * AMX_ROWS)
        scale = e.splat(e.load_one(e.at(scale_rows[r], I16, place)))
        e.write(e.fma(term, scale, total), batch.totals, F32, r * AMX_ROWS)
