"""Products of several tokens with quantised weights on matrix tiles (AMX). See emitter.py for the terms.

A thread unpacks 32 rows of the weight to bfloat16, laid out as the tiles want it, and multiplies them with all tokens while
they are in its cache. In 8 bits the integers themselves are unpacked, without loss, and the scale is applied to the sums.
"""

from __future__ import annotations

from llvmlite import ir

from ivl.cpu.kernels.emitter import F32, F32S, I8, I16, I16S, I32, I32S, LANES, TILE, Emitter, Value
from ivl.cpu.kernels.quant import BYTES, HEAD, row_scale, step_bytes, step_of, token_bytes, weight_bytes
from ivl.cpu.kernels.rows import bias_vector, gelu, transposed

ROWS = 2 * TILE
TILE_BYTES = 1024
AHEAD = 4096
"""Bytes ahead that are fetched."""


def scratch_bytes(width: int) -> int:
    """What one thread needs for 32 unpacked rows."""
    return width // 32 * 2 * TILE_BYTES


def quant_matmul(e: Emitter, bits: int, groups: int, zero: int, width: int, height: int, together: int) -> None:
    """y[t, r] = sum_i x[t, i] w[r, i] + bias[r] for tokens t in tiles of `height`, `together` (1 or 2) of them at a time."""
    scratch = e.thread_scratch(1, 2, 3)
    x, w, scales, zeros = e.pointer(4), e.pointer(5, I8), e.pointer(6), e.pointer(7, I8)
    biases, y = e.pointer(8, F32), e.pointer(9)
    rows, tokens, x_stride = e.argument(10), e.argument(11), e.argument(12)
    row_bytes, x_bytes = width * bits // 8, e.b.mul(x_stride, e.int(2))
    sums, inputs, weights = [0, 1, 2, 3][: 2 * together], [4, 5][:together], (6, 7)
    # Sums and inputs have a row for each token, weights one for each pair of elements.
    e.tiles([(height, 64)] * 6 + [(TILE, 64)] * 2)
    block = together * height
    corner = e.b.alloca(F32, size=e.int(block * ROWS))
    corner.align = 64  # type: ignore[misc]
    with e.claimed(rows, ROWS) as (start, stop), e.loop(start, stop, ROWS) as outer:
        first = e.smaller(outer.index, e.b.sub(rows, e.int(ROWS)))
        for part in range(2):
            row_ids = [e.b.add(first, e.int(part * TILE + r)) for r in range(TILE)]
            w_rows = [e.at(w, I8, e.b.mul(row, e.int(row_bytes))) for row in row_ids]
            places = [e.b.mul(row, e.int(groups)) for row in row_ids]
            _unpack(e, e.at(scratch, I8, e.int(part * TILE_BYTES)), w_rows, scales, zeros if zero else None, places, bits,
                    groups, width)  # fmt: skip
        offsets = [e.read(F32S, biases, F32, e.b.add(first, e.int(part * TILE))) for part in range(2)]
        factors = None
        if bits == 8:
            factors = [e.floats(scales, e.b.add(first, e.int(part * TILE))) for part in range(2)]
        with e.loop(e.int(0), tokens, block) as column:
            token = e.smaller(column.index, e.b.sub(tokens, e.int(block)))
            x_tiles = [e.at(x, I16, e.b.mul(e.b.add(token, e.int(n * height)), x_stride)) for n in range(together)]
            for tile in sums:
                e.tile_zero(tile)
            with e.loop(e.int(0), e.int(width), 32) as inner:
                place = e.at(scratch, I8, e.b.mul(inner.index, e.int(TILE_BYTES // TILE)))
                for tile, start_x in zip(inputs, x_tiles, strict=True):
                    e.tile_load(tile, e.at(start_x, I16, inner.index), x_bytes)
                for part, tile in enumerate(weights):
                    e.tile_load(tile, e.at(place, I8, e.int(part * TILE_BYTES)), e.int(64))
                for n, tile in enumerate(sums):
                    e.tile_product(tile, inputs[n // 2], weights[n % 2])
            for n, tile in enumerate(sums):
                e.tile_store(tile, e.at(corner, F32, e.int(n // 2 * height * ROWS + n % 2 * TILE)), e.int(4 * ROWS))
            with e.loop(e.int(0), e.int(block), 1) as line:
                out = e.b.add(e.b.mul(e.b.add(token, line.index), rows), first)
                for part in range(2):
                    at = e.b.add(e.b.mul(line.index, e.int(ROWS)), e.int(part * TILE))
                    total = e.read(F32S, corner, F32, at)
                    total = e.fma(total, factors[part], offsets[part]) if factors else e.b.fadd(total, offsets[part])
                    e.store_floats(y, e.b.add(out, e.int(part * TILE)), total)
    e.tiles_done()


def quant_round(e: Emitter, width: int) -> None:
    """Rows of bfloat16 to 8 bits: int8 [width], then scale (float32) and -128 times the sum (int32) in 64 bytes."""
    x, out, rows, x_stride = e.pointer(1), e.pointer(2, I8), e.argument(3), e.argument(4)
    with e.claimed(rows, 1) as (start, stop), e.loop(start, stop, 1) as row:
        source, target = e.at(x, I16, e.b.mul(row.index, x_stride)), e.at(out, I8, e.b.mul(row.index, e.int(width + 64)))
        scale, factor = row_scale(e, source, width, 127)
        with e.loop(e.int(0), e.int(width), 2 * LANES, e.ints(0)) as column:
            even, odd = (
                e.b.fptosi(e.call("llvm.rint.v16f32", F32S, e.b.fmul(half, factor)), I32S)
                for half in e.load(source, column.index)
            )
            both = e.b.or_(e.b.and_(even, e.ints(255)), e.b.shl(odd, e.ints(8)))
            e.write(e.b.trunc(both, I16S), target, I8, column.index)
            column.carry([e.b.add(column.values[0], e.b.add(even, odd))])
        total = e.call("llvm.vector.reduce.add.v16i32", I32, column.values[0])
        end = e.at(target, I8, e.int(width))
        e.b.store(scale, e.at(end, F32, e.int(0)))
        e.b.store(e.b.mul(total, ir.Constant(I32, -128)), e.at(end, I32, e.int(1)))


def quant_rounded(e: Emitter, width: int, height: int, together: int, after: str) -> None:
    """y[t, r] = sum_i x[t, i] w[r, i] + bias[r] for tokens from quant_round and weights of 8 bits; sums are exact. `after`:
    "gelu" of it, "add" for plus[t, r] + factor[r] times it, or nothing."""
    scratch = e.thread_scratch(1, 2, 3)
    x, w, scales, biases, y = e.pointer(4, I8), e.pointer(5, I8), e.pointer(6), e.pointer(7, F32), e.pointer(8)
    rows, tokens = e.argument(9), e.argument(10)
    plus, factor = (e.pointer(11), e.pointer(12)) if after == "add" else (None, None)
    size, steps, block = width + 64, -(-width // 64), together * height
    sums, inputs, weights = [0, 1, 2, 3][: 2 * together], [4, 5][:together], (6, 7)
    e.tiles([(height, 64)] * 6 + [(TILE, 64)] * 2)
    corner = e.b.alloca(I32, size=e.int(block * ROWS))
    corner.align = 64  # type: ignore[misc]
    with e.claimed(rows, ROWS) as (start, stop), e.loop(start, stop, ROWS) as outer:
        first = e.smaller(outer.index, e.b.sub(rows, e.int(ROWS)))
        for part in range(2):
            w_rows = [e.at(w, I8, e.b.mul(e.b.add(first, e.int(part * TILE + r)), e.int(width))) for r in range(TILE)]

            def some(number: Value, count: int, w_rows: list[Value] = w_rows, part: int = part) -> None:
                at = e.b.mul(number, e.int(64))
                words = transposed(e, [e.b.bitcast(weight_bytes(e, row, at, count), I32S) for row in w_rows])
                for j, word in enumerate(words):
                    place = e.b.add(e.b.mul(number, e.int(2 * TILE_BYTES)), e.int(part * TILE_BYTES + j * 64))
                    e.write(word, scratch, I8, place)

            if width >= 64:
                with e.loop(e.int(0), e.int(width // 64), 1) as number:
                    some(number.index, 64)
            if width % 64:
                some(e.int(width // 64), width % 64)
        offsets = [e.read(F32S, biases, F32, e.b.add(first, e.int(part * TILE))) for part in range(2)]
        factors = [e.floats(scales, e.b.add(first, e.int(part * TILE))) for part in range(2)]
        with e.loop(e.int(0), tokens, block) as column:
            token = e.smaller(column.index, e.b.sub(tokens, e.int(block)))
            x_tiles = [e.at(x, I8, e.b.mul(e.b.add(token, e.int(n * height)), e.int(size))) for n in range(together)]
            for tile in sums:
                e.tile_zero(tile)
            with e.loop(e.int(0), e.int(steps), 1) as inner:
                place = e.at(scratch, I8, e.b.mul(inner.index, e.int(2 * TILE_BYTES)))
                for tile, start_x in zip(inputs, x_tiles, strict=True):
                    e.tile_load(tile, e.at(start_x, I8, e.b.mul(inner.index, e.int(64))), e.int(size))
                for part, tile in enumerate(weights):
                    e.tile_load(tile, e.at(place, I8, e.int(part * TILE_BYTES)), e.int(64))
                for n, tile in enumerate(sums):
                    numbers = (tile, inputs[n // 2], weights[n % 2])
                    e.call("llvm.x86.tdpbsud", ir.VoidType(), *(ir.Constant(I8, number) for number in numbers))
            for n, tile in enumerate(sums):
                e.tile_store(tile, e.at(corner, I32, e.int(n // 2 * height * ROWS + n % 2 * TILE)), e.int(4 * ROWS))
            with e.loop(e.int(0), e.int(block), 1) as line:
                number = e.b.add(token, line.index)
                end = e.at(x, I8, e.b.add(e.b.mul(number, e.int(size)), e.int(width)))
                scale = e.splat(e.b.load(e.at(end, F32, e.int(0)), typ=F32))
                offset = e.int_splat(e.b.load(e.at(end, I32, e.int(1)), typ=I32))
                out = e.b.add(e.b.mul(number, rows), first)
                for part in range(2):
                    at = e.b.add(e.b.mul(line.index, e.int(ROWS)), e.int(part * TILE))
                    total = e.b.sitofp(e.b.add(e.read(I32S, corner, I32, at), offset), F32S)
                    total = e.fma(e.b.fmul(total, scale), factors[part], offsets[part])
                    place = e.b.add(out, e.int(part * TILE))
                    if after == "gelu":
                        total = gelu(e, total)
                    elif plus is not None:
                        scaled = e.floats(factor, e.b.add(first, e.int(part * TILE)))
                        total = e.fma(total, scaled, e.floats(plus, place))
                    e.store_floats(y, place, total)
    e.tiles_done()


def _unpack(
    e: Emitter, out: Value, w_rows: list[Value], scales: Value, zeros: Value | None, places: list[Value], bits: int,
    groups: int, width: int,
) -> None:  # fmt: skip
    """16 rows as bfloat16: out[i / 32][i % 32 / 2][row] holds elements i and i + 1; blocks of 32 elements are 2 tiles apart."""
    step = step_of(bits)
    per_lane, group = step // LANES, width // groups

    def some(number: Value, size: int) -> None:
        words = [e.b.bitcast(weight_bytes(e, row, e.b.mul(number, e.int(64)), size * bits // 8), I32S) for row in w_rows]
        words = transposed(e, words)
        factor = offset = None
        for j in range(size // per_lane):
            if bits == 4 and j % (group // 8) == 0:
                part = e.b.add(e.b.mul(number, e.int(step // group)), e.int(j * 8 // group))
                factor, offset = _affine(e, scales, zeros, [e.b.add(place, part) for place in places])
            for h in range(per_lane // 2):
                digits = []
                for odd in range(2):
                    shift = (2 * h + odd) * bits
                    digit = e.b.lshr(words[j], e.ints(shift)) if shift else words[j]
                    digits.append(e.b.sitofp(e.b.and_(digit, e.ints(2**bits - 1)), F32S))
                if bits == 8:  # whole numbers up to 128 fit bfloat16
                    even, odd = (e.b.bitcast(e.b.fsub(digit, e.splat(128.0)), I32S) for digit in digits)
                else:
                    assert factor is not None and offset is not None
                    even, odd = (e.b.bitcast(e.fma(digit, factor, offset), I32S) for digit in digits)
                    even, odd = (e.b.add(bit, e.ints(0x8000)) for bit in (even, odd))
                pair = e.b.or_(e.b.lshr(even, e.ints(16)), e.b.and_(odd, e.ints(-65536)))
                index = j * per_lane // 2 + h  # of the pair within the step
                at = index // 16 * 2 * TILE_BYTES + index % 16 * 64
                e.write(pair, out, I8, e.b.add(e.b.mul(number, e.int(step // 32 * 2 * TILE_BYTES)), e.int(at)))

    if width >= step:
        with e.loop(e.int(0), e.int(width // step), 1) as number:
            ahead = e.int(len(w_rows) * 2 * width * bits // 8)
            for row in w_rows:
                e.prefetch(e.at(row, I8, e.b.add(e.b.mul(number.index, e.int(64)), ahead)))
            some(number.index, step)
    if width % step:
        some(e.int(width // step), width % step)


def _affine(e: Emitter, scales: Value, zeros: Value | None, places: list[Value]) -> tuple[Value, Value]:
    """scale and - scale * zero of one group of every row, in the lanes of the rows."""
    factor = offset = ir.Constant(I32S, ir.Undefined)
    for r, place in enumerate(places):
        bits = e.b.zext(e.b.load(e.at(scales, I16, place), typ=I16), I32)
        factor = e.b.insert_element(factor, bits, ir.Constant(I32, r))
        if zeros is not None:
            zero = e.b.zext(e.b.load(e.at(zeros, I8, place), typ=I8), I32)
            offset = e.b.insert_element(offset, zero, ir.Constant(I32, r))
    factor = e.b.bitcast(e.b.shl(factor, e.ints(16)), F32S)
    middle = e.splat(8.0) if zeros is None else e.b.sitofp(offset, F32S)
    return factor, e.b.fneg(e.b.fmul(factor, middle))


def quant_few(e: Emitter, bits: int, groups: int, zero: int, width: int, plus: int) -> None:
    """y[t, r] of at most 16 tokens, with integer tiles: 16 weight rows times the bytes h and l of 16 tokens.

    Tokens come as quant.py prepares them; every thread transposes them for itself, x[word, token] in words of 4 bytes.
    Sums of a group are exact.
    """
    x = e.b.bitcast(e.thread_scratch(1, 2, 3), I32.as_pointer())
    tokens, w, scales, zeros = e.pointer(4, I32), e.pointer(5, I8), e.pointer(6), e.pointer(7, I8)
    bias_address, y, rows = e.argument(8), e.pointer(9), e.argument(10)
    added_to, given = e.pointer(11) if plus else None, e.argument(12)
    words = token_bytes(bits, width) // 4
    starts = [e.b.mul(e.smaller(e.int(t), e.b.sub(given, e.int(1))), e.int(words)) for t in range(LANES)]
    with e.loop(e.int(0), e.int(words), LANES) as column:
        lines = [e.read(I32S, tokens, I32, e.b.add(column.index, start)) for start in starts]
        for n, line in enumerate(transposed(e, lines)):
            e.write(line, x, I32, e.b.mul(e.b.add(column.index, e.int(n)), e.int(TILE)))
    size = width * bits // 8
    group = width // groups
    step = 64 if bits == 8 else group // 2  # bytes of a weight row in a tile
    token_scales = e.read(F32S, x, I32, e.int(32 * TILE))
    sums = [(0, 1), (2, 3)]
    e.tiles([(TILE, 64)] * 4 + [(TILE, step)] * 2 + [(step // 4, 64)] * 2)
    corners = e.b.alloca(I32, size=e.int(4 * TILE * TILE))
    corners.align = 64  # type: ignore[misc]
    nibbles = e.b.alloca(I8, size=e.int(4 * TILE_BYTES))
    nibbles.align = 64  # type: ignore[misc]
    sums_at = e.b.alloca(F32, size=e.int(ROWS * TILE))
    sums_at.align = 64  # type: ignore[misc]
    body = HEAD // 4

    def word(row: Value) -> Value:
        """Where a word of every token is."""
        return e.at(x, I32, e.b.mul(row, e.int(TILE)))

    def products(left: list[Value], stride: int, right: list[Value]) -> None:
        for tile, place in zip((6, 7), right, strict=True):
            e.tile_load(tile, place, e.int(64))
        for part, place in enumerate(left):
            e.tile_load(4 + part, place, e.int(stride))
            for total, tile in zip(sums[part], (6, 7), strict=True):
                call = "llvm.x86.tdpbusd"
                e.call(call, ir.VoidType(), *(ir.Constant(I8, number) for number in (total, 4 + part, tile)))

    def totals(part: int, r: int, offsets: list[Value]) -> list[Value]:
        """Sums of h and of l for a row, by token."""
        both = []
        for tile, offset in zip(sums[part], offsets, strict=True):
            both.append(e.b.add(e.read(I32S, corners, I32, e.int((tile * TILE + r) * TILE)), offset))
        return both

    def store_tiles() -> None:
        for tile in range(4):
            e.tile_store(tile, e.at(corners, I32, e.int(tile * TILE * TILE)), e.int(64))

    def added(first: int, count: int, base: Value) -> Value:
        total = e.ints(0) if bits == 8 or not zero else e.splat(0.0)
        for n in range(first, first + count):
            term = e.read(total.type, word(e.b.add(base, e.int(n))), I32, e.int(0))  # type: ignore[union-attr]
            total = e.b.fadd(total, term) if total.type == F32S else e.b.add(total, term)  # type: ignore[union-attr]
        return total

    with e.claimed(rows, ROWS) as (start, stop), e.loop(start, stop, ROWS) as outer:
        first = e.smaller(outer.index, e.b.sub(rows, e.int(ROWS)))
        row_ids = [e.b.add(first, e.int(r)) for r in range(ROWS)]
        found: list[Value] = []
        if bits == 8:
            for tile in range(4):
                e.tile_zero(tile)
            with e.loop(e.int(0), e.int(width // 64), 1) as inner:
                at = e.b.mul(inner.index, e.int(64))
                left = [e.at(w, I8, e.b.add(e.b.mul(row_ids[part * TILE], e.int(size)), at)) for part in range(2)]
                base = e.b.add(e.b.mul(inner.index, e.int(32)), e.int(body))
                for row in row_ids:
                    e.prefetch(e.at(w, I8, e.b.add(e.b.mul(row, e.int(size)), e.b.add(at, e.int(AHEAD)))))
                products(left, size, [word(base), word(e.b.add(base, e.int(TILE)))])
            store_tiles()
            offsets = [added(part * TILE, TILE, e.int(0)) for part in range(2)]
            for part in range(2):
                for r in range(TILE):
                    high, low = (e.b.sitofp(total, F32S) for total in totals(part, r, offsets))
                    total = e.b.fadd(e.b.fmul(high, e.splat(256.0)), low)
                    scale = e.load_one(e.at(scales, I16, row_ids[part * TILE + r]))
                    found.append(e.b.fmul(total, e.splat(scale)))
        else:
            for r in range(ROWS):
                e.write(e.splat(0.0), sums_at, F32, e.int(r * TILE))
            mask = ir.Constant(BYTES, [15] * 64)
            w_rows = [e.at(w, I8, e.b.mul(row, e.int(size))) for row in row_ids]
            scale_rows = [e.at(scales, I16, e.b.mul(row, e.int(groups))) for row in row_ids]
            zero_rows = [e.at(zeros, I8, e.b.mul(row, e.int(groups))) for row in row_ids]
            with e.loop(e.int(0), e.int(width // 128), 1) as inner:
                for r, row in enumerate(w_rows):
                    e.prefetch(e.at(row, I8, e.b.add(e.b.mul(inner.index, e.int(64)), e.int(AHEAD))))
                    both = e.read(BYTES, row, I8, e.b.mul(inner.index, e.int(64)))
                    shifted = e.b.bitcast(e.b.lshr(e.b.bitcast(both, I32S), e.ints(4)), BYTES)
                    e.write(e.b.and_(both, mask), nibbles, I8, e.int(r * 64))
                    e.write(e.b.and_(shifted, mask), nibbles, I8, e.int(2 * TILE_BYTES + r * 64))
                base = e.b.add(e.b.mul(inner.index, e.int(step_bytes(4) // 4)), e.int(body))
                for g in range(128 // group):
                    for tile in range(4):
                        e.tile_zero(tile)
                    within = g * step
                    for odd in range(2):
                        left = [e.at(nibbles, I8, e.int((odd * 2 + part) * TILE_BYTES + within)) for part in range(2)]
                        right = [word(e.b.add(base, e.int((2 * low + odd) * TILE + within // 4))) for low in range(2)]
                        products(left, 64, right)
                    store_tiles()
                    offset = added(4 * TILE + within // 4, step // 4, base)
                    place = e.b.add(e.b.mul(inner.index, e.int(128 // group)), e.int(g))
                    for r in range(ROWS):
                        high, low = totals(r // TILE, r % TILE, [e.ints(0), e.ints(0) if zero else offset])
                        term = e.b.sitofp(e.b.add(e.b.shl(high, e.ints(8)), low), F32S)
                        if zero:
                            middle = e.b.uitofp(e.b.load(e.at(zero_rows[r], I8, place), typ=I8), F32)
                            term = e.fma(e.splat(middle), offset, term)
                        total = e.read(F32S, sums_at, F32, e.int(r * TILE))
                        scale = e.splat(e.load_one(e.at(scale_rows[r], I16, place)))
                        e.write(e.fma(term, scale, total), sums_at, F32, e.int(r * TILE))
            found = [e.read(F32S, sums_at, F32, e.int(r * TILE)) for r in range(ROWS)]
        for part in range(2):
            bias = bias_vector(e, bias_address, e.b.add(first, e.int(part * TILE)))
            outs = [e.b.fmul(total, token_scales) for total in found[part * TILE : (part + 1) * TILE]]
            for t, total in enumerate(transposed(e, outs)):
                with e.b.if_then(e.b.icmp_signed(">", given, e.int(t))):
                    place = e.b.add(e.b.mul(rows, e.int(t)), e.b.add(first, e.int(part * TILE)))
                    total = e.b.fadd(total, bias)
                    e.store_floats(y, place, total if added_to is None else e.b.fadd(total, e.floats(added_to, place)))
    e.tiles_done()
