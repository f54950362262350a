"""What JPEG does to the pixels of a tile, without the file in between.

Saving and opening again changes pixels by colour conversion, halved chroma, and rounding the cosine transform of each 8 x 8
block to multiples of the quality's table. The entropy coding in between, most of the time, gives back what it was given, so it
is left out. Everything is the arithmetic of libjpeg-turbo in its default mode (the "islow" transform in whole numbers, triangle
interpolation of chroma), and gives its pixels bit for bit.
"""

from __future__ import annotations

from llvmlite import ir

from ivl.cpu.kernels.emitter import F32, F32S, I8, I32, I32S, I64, LANES, Emitter, Value
from ivl.cpu.pixel_kernels import clipped, floats, load_bytes, shuffle, store_bytes, transposed

BLOCK = 8
STEP = 2 * LANES
"""A tile's side is a multiple of this many pixels."""
FRACTION = 13
"""Bits after the point of the transform's constants."""
EXTRA = 2
"""Bits after the point that are kept between rows and columns."""
RED, GREEN, BLUE = (
    (19595, -11059, 32768),
    (38470, -21709, -27439),
    (7471, 32768, -5329),
)
"""Shares in luma, blue and red difference, in 2^-16."""


def degraded(e: Emitter) -> None:
    """A tile of RGB bytes through JPEG, in place.

    Arguments: 1 tile, 2 its side, 3 scratch for two rows of chroma sums (int32); then for each of luma, blue and red
    difference: plane, width and height, 1/divisor, half a divisor and a half, multiplier: 8 rows of LANES float32.
    """
    tile, side, sums = e.pointer(1, I8), e.argument(2), e.pointer(3, I32)
    planes = [e.pointer(4 + 6 * n, I8) for n in range(3)]
    _to_planes(e, tile, side, planes)
    with e.loop(e.int(0), e.int(3), 1) as plane:
        base = e.b.add(e.int(4), e.b.mul(plane.index, e.int(6)))
        values = [e.b.load(e.at(e.function.args[0], I64, e.b.add(base, e.int(n))), typ=I64) for n in range(6)]
        pixels = e.b.inttoptr(values[0], I8.as_pointer())
        _quantise(e, pixels, values[1], values[2], [e.b.inttoptr(value, F32.as_pointer()) for value in values[3:]])
    _to_pixels(e, tile, side, planes, sums)


def _to_planes(e: Emitter, tile: Value, side: Value, planes: list[Value]) -> None:
    """RGB to luma, and to chroma of half the width and height."""
    half = e.b.udiv(side, e.int(2))
    with e.loop(e.int(0), side, 2) as row, e.loop(e.int(0), side, STEP) as column:
        blue, red = [], []
        for part in (0, LANES):
            chroma = []
            for line in (0, 1):
                at = e.b.add(e.b.mul(e.b.add(row.index, e.int(line)), side), e.b.add(column.index, e.int(part)))
                luma, *rest = _differences(e, tile, e.b.mul(at, e.int(3)))
                store_bytes(e, e.b.trunc(luma, ir.VectorType(I8, LANES)), planes[0], at)
                chroma.append(rest)
            blue.append(e.b.add(chroma[0][0], chroma[1][0]))
            red.append(e.b.add(chroma[0][1], chroma[1][1]))
        at = e.b.add(e.b.mul(e.b.udiv(row.index, e.int(2)), half), e.b.udiv(column.index, e.int(2)))
        bias = ir.Constant(I32S, [1, 2] * (LANES // 2))  # rounds up and down in turns
        for plane, (left, right) in zip(planes[1:], (blue, red), strict=True):
            evens, odds = (shuffle(e, left, right, list(range(n, 2 * LANES, 2))) for n in (0, 1))
            mean = e.b.lshr(e.b.add(e.b.add(evens, odds), bias), e.ints(2))
            store_bytes(e, e.b.trunc(mean, ir.VectorType(I8, LANES)), plane, at)


def _differences(e: Emitter, tile: Value, at: Value) -> list[Value]:
    """Luma, blue and red difference of LANES pixels, as whole numbers."""
    kind = ir.VectorType(I8, 3 * LANES)
    pixels = e.b.load(e.b.bitcast(e.at(tile, I8, at), kind.as_pointer()), typ=kind, align=1)
    red, green, blue = (floats(e, shuffle(e, pixels, pixels, list(range(n, 3 * LANES, 3)))) for n in range(3))
    out = []
    for n in range(3):
        start = 1 << 15 if n == 0 else (128 << 16) + (1 << 15) - 1
        value = e.splat(float(start))
        for channel, shares in ((red, RED), (green, GREEN), (blue, BLUE)):
            value = e.fma(channel, e.splat(float(shares[n])), value)
        out.append(e.b.ashr(e.b.fptosi(value, I32S), e.ints(16)))
    return out


def _quantise(e: Emitter, plane: Value, width: Value, height: Value, tables: list[Value]) -> None:
    """Every 8 x 8 block to cosines, rounded to multiples of the table, and back. Two blocks at a time lie side by side."""
    with e.loop(e.int(0), height, BLOCK) as row, e.loop(e.int(0), width, LANES) as column:
        places = [e.b.add(e.b.mul(e.b.add(row.index, e.int(r)), width), column.index) for r in range(BLOCK)]
        x = [e.b.sub(e.b.zext(load_bytes(e, plane, at), I32S), e.ints(128)) for at in places]
        x = transposed(e, _forward(e, transposed(e, x, BLOCK), first=True), BLOCK)
        x = _forward(e, x, first=False)
        x = [_rounded(e, value, [e.read(F32S, table, F32, e.int(r * LANES)) for table in tables]) for r, value in enumerate(x)]
        x = transposed(e, _inverse(e, x, FRACTION - EXTRA), BLOCK)
        x = transposed(e, _inverse(e, x, FRACTION + EXTRA + 3), BLOCK)
        for value, at in zip(x, places, strict=True):
            store_bytes(e, clipped(e, e.b.add(value, e.ints(128))), plane, at)


def _rounded(e: Emitter, x: Value, table: list[Value]) -> Value:
    """To the nearest multiple, halves away from 0."""
    reciprocal, half, multiplier = table
    x = e.b.sitofp(x, F32S)
    size = e.b.fmul(e.b.fadd(e.call("llvm.fabs.v16f32", F32S, x), half), reciprocal)
    times = e.call("llvm.copysign.v16f32", F32S, e.call("llvm.trunc.v16f32", F32S, size), x)
    return e.b.fptosi(e.b.fmul(times, multiplier), I32S)


class _Sums:
    """Sums of products with constants, written as such."""

    def __init__(self, e: Emitter) -> None:
        self.b, self.ints = e.b, e.ints

    def times(self, x: Value, constant: float) -> Value:
        return self.b.mul(x, self.ints(int(abs(constant) * (1 << FRACTION) + 0.5) * (1 if constant > 0 else -1)))

    def shifted(self, x: Value, bits: int) -> Value:
        """Divided by 2^bits, halves rounded up."""
        return self.b.ashr(self.b.add(x, self.ints(1 << bits - 1)), self.ints(bits))


def _odd(s: _Sums, a: Value, c: Value, f: Value, g: Value) -> list[Value]:
    """The four odd outputs, or their share of the four pairs of pixels: the same sums both ways."""
    b = s.b
    z3, z4 = b.add(a, f), b.add(c, g)
    z5 = s.times(b.add(z3, z4), 1.175875602)
    z1, z2 = s.times(b.add(a, g), -0.899976223), s.times(b.add(c, f), -2.562915447)
    z3, z4 = b.add(s.times(z3, -1.961570560), z5), b.add(s.times(z4, -0.390180644), z5)
    return [
        b.add(s.times(a, 0.298631336), b.add(z1, z3)), b.add(s.times(c, 2.053119869), b.add(z2, z4)),
        b.add(s.times(f, 3.072711026), b.add(z2, z3)), b.add(s.times(g, 1.501321110), b.add(z1, z4)),
    ]  # fmt: skip


def _forward(e: Emitter, x: list[Value], *, first: bool) -> list[Value]:
    """Eight cosine sums of eight vectors, of scale sqrt(8); the first pass keeps EXTRA bits, the second rounds them off."""
    s, b = _Sums(e), e.b
    plus = [b.add(x[n], x[7 - n]) for n in range(4)]
    minus = [b.sub(x[n], x[7 - n]) for n in range(4)]
    outer, outer_minus = b.add(plus[0], plus[3]), b.sub(plus[0], plus[3])
    inner, inner_minus = b.add(plus[1], plus[2]), b.sub(plus[1], plus[2])
    z1 = s.times(b.add(inner_minus, outer_minus), 0.541196100)
    whole = [b.add(outer, inner), b.sub(outer, inner)]
    parts = [b.add(z1, s.times(outer_minus, 0.765366865)), b.add(z1, s.times(inner_minus, -1.847759065))]
    seven, five, three, one = _odd(s, minus[3], minus[2], minus[1], minus[0])
    bits = FRACTION - EXTRA if first else FRACTION + EXTRA
    y0, y4 = (b.shl(value, e.ints(EXTRA)) if first else s.shifted(value, EXTRA) for value in whole)
    y2, y6, y1, y3, y5, y7 = (s.shifted(value, bits) for value in (*parts, one, three, five, seven))
    return [y0, y1, y2, y3, y4, y5, y6, y7]


def _inverse(e: Emitter, y: list[Value], bits: int) -> list[Value]:
    """Eight vectors from their cosine sums, divided by 2^(bits - FRACTION)."""
    s, b = _Sums(e), e.b
    z1 = s.times(b.add(y[2], y[6]), 0.541196100)
    low, high = b.add(z1, s.times(y[6], -1.847759065)), b.add(z1, s.times(y[2], 0.765366865))
    plus, minus = (b.shl(value, e.ints(FRACTION)) for value in (b.add(y[0], y[4]), b.sub(y[0], y[4])))
    even = [b.add(plus, high), b.add(minus, low), b.sub(minus, low), b.sub(plus, high)]
    odd = _odd(s, y[7], y[5], y[3], y[1])[::-1]
    first = [s.shifted(b.add(x, z), bits) for x, z in zip(even, odd, strict=True)]
    last = [s.shifted(b.sub(x, z), bits) for x, z in zip(even, odd, strict=True)]
    return first + last[::-1]


def _to_pixels(e: Emitter, tile: Value, side: Value, planes: list[Value], sums: Value) -> None:
    """Chroma interpolated to full size, 3 parts of the nearer and 1 of the farther value each way, and RGB of it."""
    half = e.b.udiv(side, e.int(2))
    room = e.b.add(half, e.int(2))  # one beyond each end
    with e.loop(e.int(0), side, 1) as row:
        near = e.b.udiv(row.index, e.int(2))
        odd = e.b.urem(row.index, e.int(2))
        far = e.b.sub(e.b.add(near, e.b.mul(odd, e.int(2))), e.int(1))
        far = e.b.select(e.b.icmp_signed("<", far, e.int(0)), e.int(0), e.smaller(far, e.b.sub(half, e.int(1))))
        lines = [e.at(sums, I32, e.b.mul(room, e.int(n))) for n in range(2)]
        for plane, line in zip(planes[1:], lines, strict=True):
            with e.loop(e.int(0), half, LANES) as column:
                one, other = (
                    e.b.zext(load_bytes(e, plane, e.b.add(e.b.mul(r, half), column.index)), I32S) for r in (near, far)
                )
                e.write(e.b.add(e.b.mul(one, e.ints(3)), other), line, I32, e.b.add(column.index, e.int(1)))
            for end, inside in ((e.int(0), e.int(1)), (e.b.add(half, e.int(1)), half)):
                e.b.store(e.b.load(e.at(line, I32, inside), typ=I32), e.at(line, I32, end))
        with e.loop(e.int(0), half, LANES) as column:
            wide = [_interpolated(e, line, column.index) for line in lines]
            for part in (0, 1):
                at = e.b.add(e.b.mul(row.index, side), e.b.add(e.b.mul(column.index, e.int(2)), e.int(part * LANES)))
                luma = e.b.zext(load_bytes(e, planes[0], at), I32S)
                _store_pixels(e, luma, wide[0][part], wide[1][part], tile, e.b.mul(at, e.int(3)))


def _interpolated(e: Emitter, line: Value, index: Value) -> list[Value]:
    """LANES sums and their neighbours to 2 LANES values around 0, as floats."""
    before, here, after = (e.read(I32S, line, I32, e.b.add(index, e.int(n))) for n in range(3))
    three = e.b.mul(here, e.ints(3))
    even = e.b.lshr(e.b.add(e.b.add(three, before), e.ints(8)), e.ints(4))
    odd = e.b.lshr(e.b.add(e.b.add(three, after), e.ints(7)), e.ints(4))
    mixed = (shuffle(e, even, odd, [n // 2 + LANES * (n % 2) for n in range(s, s + LANES)]) for s in (0, LANES))
    return [e.b.sitofp(e.b.sub(value, e.ints(128)), F32S) for value in mixed]


def _store_pixels(e: Emitter, luma: Value, blue: Value, red: Value, tile: Value, at: Value) -> None:
    def share(*terms: tuple[Value, float]) -> Value:
        total = e.splat(32768.0)
        for value, constant in terms:
            total = e.fma(value, e.splat(constant), total)
        return clipped(e, e.b.add(luma, e.b.ashr(e.b.fptosi(total, I32S), e.ints(16))))

    r, g, b = share((red, 91881.0)), share((blue, -22554.0), (red, -46802.0)), share((blue, 116130.0))
    red_green = shuffle(e, r, g, list(range(2 * LANES)))
    blue_twice = shuffle(e, b, b, list(range(2 * LANES)))
    pixels = shuffle(e, red_green, blue_twice, [n % 3 * LANES + n // 3 for n in range(3 * LANES)])
    store_bytes(e, pixels, tile, at)
