"""Kernels on 8-bit pixels. See emitter.py for the terms.

All numbers are integers. Where they fit into the 24 bits that a float32 holds exactly, they are added and multiplied as floats,
which takes half the time of 32-bit integers.
"""

from __future__ import annotations

from llvmlite import ir

from ivl.cpu.kernels.emitter import F32, F32S, I8, I32S, I64, LANES, Emitter, Value
from ivl.cpu.kernels.rows import transposed

I8S = ir.VectorType(I8, LANES)
SEGMENT = 64
"""Fewest bytes of a tile's row: what the vertical pass works on at a time."""
SHIFT, DIGIT = 22, 8
"""Weights are fractions of 2^SHIFT, given as two digits: high * 2^DIGIT + low."""


def floats(e: Emitter, bytes_: Value) -> Value:
    return e.b.sitofp(e.b.zext(bytes_, I32S), F32S)


def clipped(e: Emitter, x: Value) -> Value:
    """Clip integers to bytes, 0 to 255."""
    x = e.b.select(x > 0, x, e.ints(0))
    x = e.b.select(x < 255, x, e.ints(255))
    return e.b.trunc(x, I8S)


def _weighed(e: Emitter, high: Value, low: Value) -> Value:
    """Combine the sums of both digits to a byte, halves rounded up."""
    total = (e.b.fptosi(high, I32S) << DIGIT) + e.b.fptosi(low, I32S)
    return clipped(e, e.b.ashr(total + (1 << SHIFT - 1), e.ints(SHIFT)))


def across(e: Emitter, num_targets: int) -> None:
    """Emit the kernel that resizes rows of RGB to another length, or to two lengths at once.

    LANES rows at a time are transposed, so that a vector holds one byte of every row and weights are scalars.
    Arguments: 1 source, 2 its bytes per row, 3 bytes used, 4 rows, 5 scratch; then for each target address, bytes per row,
    pixels, scratch, starts (pixel), counts, taps per pixel in the tables, high digits, low digits.
    """
    source, turned = e.pointer(1, I8), e.pointer(5, F32)
    source_stride, num_bytes, num_rows = (e.argument(i) for i in (2, 3, 4))
    with e.loop(0, num_rows, LANES) as strip:
        last_row = num_rows - 1
        rows = [e.smaller(strip.index + r, last_row) for r in range(LANES)]
        lines = [e.at(source, I8, row * source_stride) for row in rows]
        with e.loop(0, num_bytes, LANES) as column:
            first = e.smaller(column.index, num_bytes - LANES)
            for n, line in enumerate(transposed(e, [e.read(I8S, line, I8, first) for line in lines])):
                e.write(floats(e, line), turned, F32, (first + n) * LANES)
        for target in range(num_targets):
            _across_one(e, turned, rows, 6 + 9 * target)


def _across_one(e: Emitter, turned: Value, rows: list[Value], at: int) -> None:
    stride, num_pixels, max_taps = (e.argument(at + i) for i in (1, 2, 6))
    out, scratch = e.pointer(at, I8), e.pointer(at + 3, I8)
    starts, counts = e.pointer(at + 4, I64), e.pointer(at + 5, I64)
    highs, lows = e.pointer(at + 7, F32), e.pointer(at + 8, F32)
    with e.loop(0, num_pixels, 1) as pixel:
        start, count = (e.element(table, I64, pixel.index) for table in (starts, counts))
        weights = pixel.index * max_taps
        with e.loop(0, count, 1, *[e.splat(0.0)] * 6) as tap:
            index = weights + tap.index
            high, low = (e.splat(e.element(table, F32, index)) for table in (highs, lows))
            place = (start + tap.index) * (3 * LANES)
            sums = []
            for c in range(3):
                x = e.read(F32S, turned, F32, place + c * LANES)
                sums += [e.fma(x, high, tap.values[2 * c]), e.fma(x, low, tap.values[2 * c + 1])]
            tap.carry(sums)
        for c in range(3):
            value = _weighed(e, tap.values[2 * c], tap.values[2 * c + 1])
            e.write(value, scratch, I8, (pixel.index * 3 + c) * LANES)
    num_bytes = num_pixels * 3
    lines = [e.at(out, I8, row * stride) for row in rows]
    with e.loop(0, num_bytes, LANES) as column:
        first = e.smaller(column.index, num_bytes - LANES)
        found = [e.read(I8S, scratch, I8, (first + n) * LANES) for n in range(LANES)]
        for line, value in zip(lines, transposed(e, found), strict=True):
            e.write(value, line, I8, first)


def down(e: Emitter) -> None:
    """Emit the kernel that resizes columns to another length and writes tiles.

    Arguments: 1 source, 2 its bytes per row, 3 out, 4 rows out, 5 tiles side by side, 6 rows of a tile, 7 bytes of a tile's
    row, 8 starts, 9 counts, 10 taps per row in the tables, 11 high digits, 12 low digits.
    """
    source, stride, out = e.pointer(1, I8), e.argument(2), e.pointer(3, I8)
    num_rows, columns, size, width, max_taps = (e.argument(i) for i in (4, 5, 6, 7, 10))
    starts, counts, highs, lows = e.pointer(8, I64), e.pointer(9, I64), e.pointer(11, F32), e.pointer(12, F32)
    with e.loop(0, num_rows, 1) as row:
        start, count = (e.element(table, I64, row.index) for table in (starts, counts))
        weights, top = row.index * max_taps, start * stride
        tile_row = row.index // size * columns
        with e.loop(0, columns, 1) as column:
            tile = tile_row + column.index
            line = (tile * size + row.index % size) * width
            left = top + column.index * width
            with e.loop(0, width, SEGMENT) as segment:
                first = e.smaller(segment.index, width - SEGMENT)
                parts = range(0, SEGMENT, LANES)
                with e.loop(0, count, 1, *[e.splat(0.0)] * 2 * len(parts)) as tap:
                    index = weights + tap.index
                    high, low = (e.splat(e.element(table, F32, index)) for table in (highs, lows))
                    place = left + tap.index * stride + first
                    sums = []
                    for n, part in enumerate(parts):
                        x = floats(e, e.read(I8S, source, I8, place + part))
                        sums += [e.fma(x, high, tap.values[2 * n]), e.fma(x, low, tap.values[2 * n + 1])]
                    tap.carry(sums)
                for n, part in enumerate(parts):
                    value = _weighed(e, tap.values[2 * n], tap.values[2 * n + 1])
                    e.write(value, out, I8, line + first + part)
