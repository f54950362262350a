"""Kernels on 8-bit pixels, in the assembler of the model's (see ivl/cpu/kernels/emitter.py).

All numbers are integers. Where they fit into the 24 bits that a float32 holds exactly, they are added and multiplied as floats,
which takes half the time of 32-bit integers.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from ivl.cpu.kernels.build import finish
from ivl.cpu.kernels.emitter import F32, F32S, I8, I32, I32S, I64, LANES, Emitter, Value

I8S = ir.VectorType(I8, LANES)
SEGMENT = 64
"""Fewest bytes of a tile's row: what the vertical pass works on at a time."""
SHIFT, DIGIT = 22, 8
"""Weights are fractions of 2^SHIFT, given as two digits: high * 2^DIGIT + low."""


def load_bytes(e: Emitter, pointer: Value, index: Value) -> Value:
    """LANES bytes."""
    return e.b.load(e.b.bitcast(e.at(pointer, I8, index), I8S.as_pointer()), typ=I8S, align=1)


def store_bytes(e: Emitter, value: Value, pointer: Value, index: Value) -> None:
    e.b.store(value, e.b.bitcast(e.at(pointer, I8, index), value.type.as_pointer()), align=1)


def floats(e: Emitter, bytes_: Value) -> Value:
    return e.b.sitofp(e.b.zext(bytes_, I32S), F32S)


def shuffle(e: Emitter, x: Value, y: Value, lanes: list[int]) -> Value:
    return e.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def transposed(e: Emitter, rows: list[Value]) -> list[Value]:
    """Transpose a square of LANES vectors."""
    half = LANES // 2
    while half:
        # Of two rows half a square apart, the upper right quarter changes places with the lower left one.
        out = list(rows)
        for r in range(LANES):
            if r & half:
                continue
            upper = [i if not i & half else LANES + (i ^ half) for i in range(LANES)]
            lower = [i | half if not i & half else LANES + i for i in range(LANES)]
            out[r] = shuffle(e, rows[r], rows[r | half], upper)
            out[r | half] = shuffle(e, rows[r], rows[r | half], lower)
        rows, half = out, half // 2
    return rows


def clipped(e: Emitter, x: Value) -> Value:
    """Clip integers to bytes, 0 to 255."""
    x = e.b.select(e.b.icmp_signed(">", x, e.ints(0)), x, e.ints(0))
    x = e.b.select(e.b.icmp_signed("<", x, e.ints(255)), x, e.ints(255))
    return e.b.trunc(x, I8S)


def _weighed(e: Emitter, high: Value, low: Value) -> Value:
    """Combine the sums of both digits to a byte, halves rounded up."""
    total = e.b.add(e.b.shl(e.b.fptosi(high, I32S), e.ints(DIGIT)), e.b.fptosi(low, I32S))
    return clipped(e, e.b.ashr(e.b.add(total, e.ints(1 << SHIFT - 1)), e.ints(SHIFT)))


def across(e: Emitter, num_targets: int) -> None:
    """Emit the kernel that resizes rows of RGB to another length, or to two lengths at once.

    LANES rows at a time are transposed, so that a vector holds one byte of every row and weights are scalars.
    Arguments: 1 source, 2 its bytes per row, 3 bytes used, 4 rows, 5 scratch; then for each target address, bytes per row,
    pixels, scratch, starts (pixel), counts, taps per pixel in the tables, high digits, low digits.
    """
    source, turned = e.pointer(1, I8), e.pointer(5, F32)
    source_stride, num_bytes, num_rows = (e.argument(i) for i in (2, 3, 4))
    with e.loop(e.int(0), num_rows, LANES) as strip:
        last_row = e.b.sub(num_rows, e.int(1))
        rows = [e.smaller(e.b.add(strip.index, e.int(r)), last_row) for r in range(LANES)]
        lines = [e.at(source, I8, e.b.mul(row, source_stride)) for row in rows]
        with e.loop(e.int(0), num_bytes, LANES) as column:
            first = e.smaller(column.index, e.b.sub(num_bytes, e.int(LANES)))
            for n, line in enumerate(transposed(e, [load_bytes(e, line, first) for line in lines])):
                e.write(floats(e, line), turned, F32, e.b.mul(e.b.add(first, e.int(n)), e.int(LANES)))
        for target in range(num_targets):
            _across_one(e, turned, rows, 6 + 9 * target)


def _across_one(e: Emitter, turned: Value, rows: list[Value], at: int) -> None:
    stride, num_pixels, max_taps = (e.argument(at + i) for i in (1, 2, 6))
    out, scratch = e.pointer(at, I8), e.pointer(at + 3, I8)
    starts, counts = e.pointer(at + 4, I64), e.pointer(at + 5, I64)
    highs, lows = e.pointer(at + 7, F32), e.pointer(at + 8, F32)
    with e.loop(e.int(0), num_pixels, 1) as pixel:
        start, count = (e.b.load(e.at(table, I64, pixel.index), typ=I64) for table in (starts, counts))
        weights = e.b.mul(pixel.index, max_taps)
        with e.loop(e.int(0), count, 1, *[e.splat(0.0)] * 6) as tap:
            index = e.b.add(weights, tap.index)
            high, low = (e.splat(e.b.load(e.at(table, F32, index), typ=F32)) for table in (highs, lows))
            place = e.b.mul(e.b.add(start, tap.index), e.int(3 * LANES))
            sums = []
            for c in range(3):
                x = e.read(F32S, turned, F32, e.b.add(place, e.int(c * LANES)))
                sums += [e.fma(x, high, tap.values[2 * c]), e.fma(x, low, tap.values[2 * c + 1])]
            tap.carry(sums)
        for c in range(3):
            value = _weighed(e, tap.values[2 * c], tap.values[2 * c + 1])
            store_bytes(e, value, scratch, e.b.mul(e.b.add(e.b.mul(pixel.index, e.int(3)), e.int(c)), e.int(LANES)))
    num_bytes = e.b.mul(num_pixels, e.int(3))
    lines = [e.at(out, I8, e.b.mul(row, stride)) for row in rows]
    with e.loop(e.int(0), num_bytes, LANES) as column:
        first = e.smaller(column.index, e.b.sub(num_bytes, e.int(LANES)))
        found = [load_bytes(e, scratch, e.b.mul(e.b.add(first, e.int(n)), e.int(LANES))) for n in range(LANES)]
        for line, value in zip(lines, transposed(e, found), strict=True):
            store_bytes(e, value, line, first)


def down(e: Emitter) -> None:
    """Emit the kernel that resizes columns to another length and writes tiles.

    Arguments: 1 source, 2 its bytes per row, 3 out, 4 rows out, 5 tiles side by side, 6 rows of a tile, 7 bytes of a tile's
    row, 8 starts, 9 counts, 10 taps per row in the tables, 11 high digits, 12 low digits.
    """
    source, stride, out = e.pointer(1, I8), e.argument(2), e.pointer(3, I8)
    num_rows, columns, size, width, max_taps = (e.argument(i) for i in (4, 5, 6, 7, 10))
    starts, counts, highs, lows = e.pointer(8, I64), e.pointer(9, I64), e.pointer(11, F32), e.pointer(12, F32)
    with e.loop(e.int(0), num_rows, 1) as row:
        start, count = (e.b.load(e.at(table, I64, row.index), typ=I64) for table in (starts, counts))
        weights, top = e.b.mul(row.index, max_taps), e.b.mul(start, stride)
        tile_row = e.b.mul(e.b.udiv(row.index, size), columns)
        with e.loop(e.int(0), columns, 1) as column:
            tile = e.b.add(tile_row, column.index)
            line = e.b.mul(e.b.add(e.b.mul(tile, size), e.b.urem(row.index, size)), width)
            left = e.b.add(top, e.b.mul(column.index, width))
            with e.loop(e.int(0), width, SEGMENT) as segment:
                first = e.smaller(segment.index, e.b.sub(width, e.int(SEGMENT)))
                parts = range(0, SEGMENT, LANES)
                with e.loop(e.int(0), count, 1, *[e.splat(0.0)] * 2 * len(parts)) as tap:
                    index = e.b.add(weights, tap.index)
                    high, low = (e.splat(e.b.load(e.at(table, F32, index), typ=F32)) for table in (highs, lows))
                    place = e.b.add(e.b.add(left, e.b.mul(tap.index, stride)), first)
                    sums = []
                    for n, part in enumerate(parts):
                        x = floats(e, load_bytes(e, source, e.b.add(place, e.int(part))))
                        sums += [e.fma(x, high, tap.values[2 * n]), e.fma(x, low, tap.values[2 * n + 1])]
                    tap.carry(sums)
                for n, part in enumerate(parts):
                    value = _weighed(e, tap.values[2 * n], tap.values[2 * n + 1])
                    store_bytes(e, value, out, e.b.add(e.b.add(line, first), e.int(part)))


def build(name: str, emit: Callable[..., None], *shape: int) -> int:
    """Compile a kernel and return its address."""
    e = Emitter(name)
    emit(e, *shape)
    return finish(e)
