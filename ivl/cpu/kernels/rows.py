"""Parts of several kernels: a row's norm and gate, the bias of an output. See emitter.py for the terms."""

from __future__ import annotations

from llvmlite import ir

from ivl.cpu.kernels.emitter import F32, F32S, I16, I32, I32S, I64, LANES, Emitter, Value


def bias_at(e: Emitter, address: Value, row: Value) -> Value:
    """Return bias[row] as float32, or 0 if there is no bias."""
    given, pointer = _bias_pointer(e, address, row)
    return e.b.select(given, e.load_one(pointer), ir.Constant(F32, 0.0))


def bias_vector(e: Emitter, address: Value, row: Value) -> Value:
    """Return bias[row : row + 16] as float32, or zeros if there is no bias."""
    given, pointer = _bias_pointer(e, address, row)
    return e.b.select(given, e.floats(pointer, 0), e.splat(0.0))


def _bias_pointer(e: Emitter, address: Value, row: Value) -> tuple[Value, Value]:
    """Return whether there is a bias, and where to read: without a bias, from the arguments, which are always there."""
    given = e.b.icmp_signed("!=", address, e.int(0))
    source = e.b.select(given, address + row * 2, e.b.ptrtoint(e.arguments, I64))
    return given, e.b.inttoptr(source, I16.as_pointer())


def norm_row(e: Emitter, x_row: Value, weight: Value, y_row: Value, width: Value, eps_bits: Value) -> None:
    eps = e.b.bitcast(e.b.trunc(eps_bits, I32), F32)
    with e.loop(0, width, 2 * LANES, e.splat(0.0), e.splat(0.0)) as squares:
        pair = e.load(x_row, squares.index)
        squares.carry([e.fma(p, p, s) for p, s in zip(pair, squares.values, strict=True)])
    mean = e.total(e.b.fadd(*squares.values)) / e.b.sitofp(width, F32)
    root = e.call("llvm.sqrt.f32", F32, mean + eps)
    scale = e.splat(1.0 / root)
    with e.loop(0, width, 2 * LANES) as column:
        pair, weights = e.load(x_row, column.index), e.load(weight, column.index)
        even, odd = (p * scale * w for p, w in zip(pair, weights, strict=True))
        e.store(y_row, column.index, (even, odd))


def swiglu_row(e: Emitter, gate_row: Value, y_row: Value, width: Value) -> None:
    up_row = e.at(gate_row, I16, width)
    with e.loop(0, width, 2 * LANES) as column:
        gates, ups = e.load(gate_row, column.index), e.load(up_row, column.index)
        even, odd = (g * u / (1.0 + e.exp(-g)) for g, u in zip(gates, ups, strict=True))
        e.store(y_row, column.index, (even, odd))


def prepared_row(e: Emitter, row: Value, width: Value, before: str) -> Value:
    """Return an input row as it is multiplied: normalized, gated, or as it is. Arguments: 8 norm weight, 9 bits of eps."""
    if not before:
        return row
    prepared = e.b.alloca(I16, size=width)
    if before == "norm":
        norm_row(e, row, e.pointer(8), prepared, width, e.argument(9))
    else:
        swiglu_row(e, row, prepared, width)
    return prepared


def gelu(e: Emitter, x: Value) -> Value:
    """x times the share of a normal distribution below x, with AVX-512. The share below -|x| is a polynomial of 1 / (1 + p |x|)
    times e^(-x^2 / 2) (Abramowitz and Stegun, 7.1.26), to 1e-4 of itself where it matters in bfloat16."""
    size = e.b.bitcast(e.b.bitcast(x, I32S) & 0x7FFFFFFF, F32S)
    size = e.b.select(size > 100.0, e.splat(100.0), size)  # infinity times 0 would be NaN
    below = e.fma(size, e.splat(0.3275911 * 0.5**0.5), e.splat(1.0))
    t = e.call("llvm.x86.avx512.rcp14.ps.512", F32S, below, below, ir.Constant(I16, -1))
    y = e.splat(0.5 * 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = e.fma(y, t, e.splat(0.5 * coefficient))
    power = e.small_exp2(size * size * (-0.5 * 1.4426950408889634))
    tail = y * t * power * size
    positive = e.b.select(x < 0.0, e.splat(0.0), x)
    return positive - tail


def transposed(e: Emitter, rows: list[Value]) -> list[Value]:
    """Transpose 16 vectors of 16 lanes: lane i of vector j becomes lane j of vector i.

    In four rounds, vectors whose numbers differ in one bit swap the lanes whose numbers differ in that bit.
    """
    for distance in (1, 2, 4, 8):
        new = list(rows)
        for i in range(LANES):
            if i & distance:
                continue
            low = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
            high = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
            for at, order in ((i, low), (i + distance, high)):
                new[at] = e.b.shuffle_vector(rows[i], rows[i + distance], ir.Constant(I32S, order))
        rows = new
    return rows
