"""Products of a few rows, norms, gates and rotary positions. See emitter.py for the terms."""

from __future__ import annotations

from llvmlite import ir

from ivl.cpu.kernels.emitter import AMX_ROWS, F32, F32S, I8, I16, I32, I32S, I64, LANES, Emitter
from ivl.cpu.kernels.features import rows_at_once
from ivl.cpu.kernels.rows import bias_at, bias_vector, norm_row, prepared_row, swiglu_row, transposed

COLUMN_BLOCK = 4
"""Input rows multiplied together with `rows_at_once` weight rows: their sums fill half of the vector registers."""
PREFETCH = 8192
"""Elements ahead."""


def linear(e: Emitter, num_columns: int, before: str = "", plus: bool = False) -> None:
    """y[c, r] = sum_i x[c, i] w[r, i] + bias[r] for num_columns input rows c.

    A single input row may be normalized or gated `before`, by every thread for itself, and a residual added to the result.
    """
    x, w, y = e.pointer(1), e.pointer(2), e.pointer(4)
    bias_address, width, rows, x_stride = (e.argument(i) for i in (3, 5, 6, 7))
    x = prepared_row(e, x, width, before)
    added = e.pointer(10) if plus else None
    together = rows_at_once()
    ahead = e.smaller(width * together, PREFETCH)
    with e.blocks(rows, together) as first:
        row_ids = [first + r for r in range(together)]
        w_rows = [e.at(w, I16, row * width) for row in row_ids]
        for block in range(0, num_columns, COLUMN_BLOCK):
            columns = range(block, min(block + COLUMN_BLOCK, num_columns))
            x_rows = [e.at(x, I16, x_stride * c) for c in columns]
            cells = [(r, c) for r in range(together) for c in range(len(columns))]
            with e.loop(0, width, 2 * LANES, *[e.splat(0.0) for _ in cells]) as inner:
                if block == 0:
                    for row in w_rows:
                        e.prefetch(e.at(row, I16, inner.index + ahead))
                x_pairs = [e.load(row, inner.index) for row in x_rows]
                w_pairs = [e.load(row, inner.index) for row in w_rows]
                sums = [e.fma(w_pairs[r][0], x_pairs[c][0], s) for (r, c), s in zip(cells, inner.values, strict=True)]
                inner.carry([e.fma(w_pairs[r][1], x_pairs[c][1], s) for (r, c), s in zip(cells, sums, strict=True)])
            biases = [bias_at(e, bias_address, row) for row in row_ids]
            for (r, c), s in zip(cells, inner.values, strict=True):
                index = rows * (block + c) + row_ids[r]
                total = e.total(s) + biases[r]
                if added is not None:
                    total = total + e.load_one(e.at(added, I16, row_ids[r]))
                e.store_one(e.at(y, I16, index), total)


def linear_amx(e: Emitter, num_columns: int, before: str = "", plus: bool = False) -> None:
    """The same with AMX, where even 16 columns cost no more than reading the weight.

    There may be fewer input rows than columns: compiling a kernel for every number of them would take longer than it saves.

    The weight is multiplied as it lies in memory: a register takes 32 elements of 16 rows. The inputs are the second operand
    of the product, so every thread first lays them out in pairs[i / 2, column]. A step multiplies two weight registers with
    one register of pairs: two loads of weight for two products, which is all that a product bound by memory needs.
    """
    scratch = e.thread_scratch()
    x, w, y = e.pointer(4), e.pointer(5), e.pointer(7)
    bias_address, width, rows, x_stride, given = (e.argument(i) for i in (6, 8, 9, 10, 14))
    pairs = e.b.bitcast(scratch, I32.as_pointer())
    if before:
        normed = e.at(scratch, I16, width * num_columns + 2 * LANES)
        with e.loop(0, given, 1) as row:
            source, target = e.at(x, I16, x_stride * row.index), e.at(normed, I16, width * row.index)
            norm_row(e, source, e.pointer(11), target, width, e.argument(12))
        x, x_stride = normed, width
    columns = [e.smaller(c, given - 1) for c in range(num_columns)]
    x_rows = [e.at(x, I16, x_stride * column) for column in columns]
    with e.loop(0, width, 2 * LANES) as column:
        vectors = [e.read(I32S, row, I16, column.index) for row in x_rows]
        start = (column.index >> 1) * num_columns
        for p, vector in enumerate(transposed(e, vectors + [e.ints(0)] * (LANES - num_columns))):
            # Lanes beyond the columns spill into the next row of pairs, which is written next.
            e.write(vector, pairs, I32, start + p * num_columns)
    added = e.pointer(13) if plus else None
    row_bytes, pair_bytes = width * 2, e.int(4 * num_columns)
    block = 2 * AMX_ROWS
    sums, weights, inputs = (0, 1), (2, 3), 4
    e.amx_configure([(AMX_ROWS, 4 * num_columns)] * 2 + [(AMX_ROWS, 64)] * 2 + [(AMX_ROWS, 4 * num_columns)])
    corner = e.b.alloca(F32, size=block * num_columns + LANES)  # the last rows are read beyond their end
    with e.blocks(rows, block) as first:
        w_block = e.at(w, I16, first * width)
        e.amx_zero(sums)
        with e.loop(0, width, 2 * LANES) as inner:
            e.amx_load(inputs, e.at(pairs, I32, (inner.index >> 1) * num_columns), pair_bytes)
            for part, (target, weight) in enumerate(zip(sums, weights, strict=True)):
                place = width * (part * AMX_ROWS) + inner.index
                e.amx_load(weight, e.at(w_block, I16, place), row_bytes)
                e.amx_dot("tdpbf16ps", target, weight, inputs)
        for part, register in enumerate(sums):
            e.amx_store(register, e.at(corner, F32, part * AMX_ROWS * num_columns), pair_bytes)
        for part in range(2):
            place = first + part * AMX_ROWS
            lines = [e.read(F32S, corner, F32, (part * AMX_ROWS + row) * num_columns) for row in range(AMX_ROWS)]
            bias = bias_vector(e, bias_address, place)
            for c, total in enumerate(transposed(e, [e.b.bitcast(line, I32S) for line in lines])[:num_columns]):
                with e.b.if_then(given > c):
                    total = e.b.bitcast(total, F32S) + bias
                    if added is not None:
                        total = total + e.floats(added, rows * c + place)
                    e.store_floats(y, rows * c + place, total)
    e.amx_release()


def rms_norm(e: Emitter) -> None:
    x, weight, y = (e.pointer(i) for i in (1, 2, 3))
    rows, width, stride = (e.argument(i) for i in (4, 5, 6))
    with e.claimed(rows, 1) as (start, stop), e.loop(start, stop, 1) as row:
        x_row, y_row = e.at(x, I16, row.index * stride), e.at(y, I16, row.index * width)
        norm_row(e, x_row, weight, y_row, width, e.argument(7))


def norm_heads(e: Emitter) -> None:
    """Normalize the query heads of every token by one weight and its key heads by another, in place."""
    x, q_weight, k_weight = (e.pointer(i) for i in (1, 2, 3))
    tokens, num_heads, num_normed, size, stride = (e.argument(i) for i in (4, 5, 6, 7, 8))
    with e.claimed(tokens, 1) as (start, stop), e.loop(start, stop, 1) as token:
        heads = e.at(x, I16, token.index * stride)
        for first, last, weight in ((e.int(0), num_heads, q_weight), (num_heads, num_normed, k_weight)):
            with e.loop(first, last, 1) as head:
                row = e.at(heads, I16, head.index * size)
                norm_row(e, row, weight, row, size, e.argument(9))


def swiglu(e: Emitter) -> None:
    x, y = e.pointer(1), e.pointer(2)
    rows, width, stride = (e.argument(i) for i in (3, 4, 5))
    with e.claimed(rows, 1) as (start, stop), e.loop(start, stop, 1) as row:
        gate_row, y_row = e.at(x, I16, row.index * stride), e.at(y, I16, row.index * width)
        swiglu_row(e, gate_row, y_row, width)


def rotate(e: Emitter) -> None:
    x, cos, sin = e.pointer(1), e.pointer(2, F32), e.pointer(3, F32)
    tokens, heads, size, token_stride, head_stride = (e.argument(i) for i in (4, 5, 6, 7, 8))
    half = size >> 1
    with e.claimed(tokens, 1) as (start, stop), e.loop(start, stop, 1) as token, e.loop(0, heads, 1) as head:
        row = e.at(x, I16, token.index * token_stride + head.index * head_stride)
        factors = token.index * size
        with e.loop(0, half, 2 * LANES) as column:
            other, place = column.index + half, factors + column.index
            firsts, seconds = e.load(row, column.index), e.load(row, other)
            coss, sins = e.deinterleaved(cos, place), e.deinterleaved(sin, place)
            turned = []
            for first, second, c, s in zip(firsts, seconds, coss, sins, strict=True):
                turned.append((e.fma(first, c, -(second * s)), e.fma(second, c, first * s)))
            e.store(row, column.index, (turned[0][0], turned[1][0]))
            e.store(row, other, (turned[0][1], turned[1][1]))


def repeat_calls(e: Emitter) -> None:
    """Make recorded calls. Each has an address, arguments, a number of threads, and whether argument 1 is a counter, too."""
    entries, count, parallel = e.pointer(0, I64), e.argument(1), e.argument(2)
    place = I8.as_pointer()
    kernel = ir.FunctionType(ir.VoidType(), [I64.as_pointer()])
    team = ir.FunctionType(ir.VoidType(), [place, place, I32, I32])
    with e.loop(0, count, 1) as call:
        fields = (e.element(entries, I64, call.index * 4 + n) for n in range(4))
        address, arguments, threads, counts_threads = fields
        pointer = e.b.inttoptr(arguments, I64.as_pointer())
        e.b.store(e.int(0), pointer)
        second = e.at(pointer, I64, 1)
        kept = e.b.load(second, typ=I64)
        e.b.store(e.b.select(e.b.icmp_signed("!=", counts_threads, e.int(0)), e.int(0), kept), second)
        with e.b.if_else(e.b.icmp_signed("==", threads, e.int(1))) as (alone, together):
            with alone:
                e.b.call(e.b.inttoptr(address, kernel.as_pointer()), [pointer])
            with together:
                where = [e.b.inttoptr(value, place) for value in (address, arguments)]
                numbers = [e.b.trunc(threads, I32), ir.Constant(I32, 0)]
                e.b.call(e.b.inttoptr(parallel, team.as_pointer()), [*where, *numbers])
