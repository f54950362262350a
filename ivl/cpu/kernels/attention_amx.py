"""Attention of many queries with AMX. See emitter.py for the terms.

32 queries at a time see all their keys: scores, then softmax, then values. Their scores fit into the second-level cache
for any sensible length, so nothing is rescaled on the way. Scores and sums are float32; probabilities are rounded to
bfloat16 before they meet the values, as in torch's own kernel.

Both products use all 8 registers: four sums (2 x 2 blocks of 16 x 16), two left and two right operands. Four loads serve
four products; with a single sum, eight would. Keys and values are right operands, so a head's are laid out in pairs once
(_pack_keys, _pack_values) and then serve all its queries.
"""

from __future__ import annotations

from llvmlite import ir

from ivl.cpu.kernels.emitter import AMX_ROWS, F32, F32S, I8, I16, I32, I32S, LANES, Emitter, Value
from ivl.cpu.kernels.rows import transposed

BLOCK = 2 * AMX_ROWS
"""Keys whose probabilities meet their values together, in pairs."""
QUERIES = 2 * AMX_ROWS
"""Queries that share every load of keys and values."""
AMX_WORDS = AMX_ROWS * AMX_ROWS
"""32-bit elements of a register."""
ROW_GAP = 32
"""Elements between rows of scores, lest rows of a power of two all meet in the same few lines of the cache."""
HIDDEN = -3e38


def scratch_bytes(num_keys: int, head_size: int) -> int:
    """Return what one thread needs: packed keys and values of a head, scores and probabilities of 32 queries, the result."""
    keys = -(-num_keys // BLOCK) * BLOCK
    return keys * head_size * 4 + (keys + ROW_GAP) * QUERIES * 6 + QUERIES * head_size * 4 + 1024


def attention(e: Emitter, head_size: int, causal: int) -> None:
    """out[q, n] = softmax(q . k / sqrt(H)) v for every query head n; with causal, the last query sees the last key."""
    scratch = e.thread_scratch()
    num_queries, num_keys, num_heads, group = (e.argument(i) for i in (8, 9, 10, 11))
    queries, keys, values, outs = (e.pointer(i) for i in (4, 5, 6, 7))
    (q_token, q_head), (k_token, k_head), (v_token, v_head), (out_token, out_head) = (
        (e.argument(i), e.argument(i + 1)) for i in (12, 14, 16, 18)
    )
    all_keys = (num_keys + (BLOCK - 1)) & -BLOCK
    half = all_keys * (2 * head_size)
    packed_k, packed_v = scratch, e.at(scratch, I8, half)
    scores = e.at(packed_v, I8, half)
    row_size = all_keys + ROW_GAP
    probs = e.at(scores, I8, row_size * (4 * QUERIES))
    outcome = e.at(probs, I8, row_size * (2 * QUERIES))
    e.amx_configure([(AMX_ROWS, 4 * AMX_ROWS)] * 8)
    with e.claimed(num_heads, 1) as (first, stop), e.loop(first, stop, 1) as head:
        kv_head = head.index // group
        _pack_keys(e, e.at(keys, I16, kv_head * k_head), k_token, num_keys, packed_k, head_size)
        _pack_values(e, e.at(values, I16, kv_head * v_head), v_token, num_keys, packed_v, head_size)
        q = e.at(queries, I16, head.index * q_head)
        out = e.at(outs, I16, head.index * out_head)
        with e.loop(0, num_queries, QUERIES) as block:
            # The last block moves back to end with the last query.
            start = e.smaller(block.index, num_queries - QUERIES)
            seen = num_keys - num_queries + start if causal else num_keys - 1
            limit = e.smaller(seen + QUERIES, num_keys)
            _scores(e, e.at(q, I16, start * q_token), q_token, packed_k, scores, limit, row_size, head_size)
            _hide(e, seen, bool(causal), limit, row_size, scores)
            sums = e.at(outcome, F32, QUERIES * head_size)
            with e.loop(0, QUERIES, 1) as row:
                total = _softmax(e, row.index, limit, row_size, scores, probs, head_size)
                e.b.store(total, e.at(sums, F32, row.index))
            _weighted_values(e, probs, packed_v, outcome, limit, row_size, head_size)
            with e.loop(0, QUERIES, 1) as row:
                scale = e.splat(1.0 / e.element(sums, F32, row.index))
                target = e.at(out, I16, (start + row.index) * out_token)
                for part in range(0, head_size, LANES):
                    place = row.index * head_size + part
                    e.store_floats(target, part, e.read(F32S, outcome, F32, place) * scale)
    e.amx_release()


def _pack_keys(e: Emitter, keys: Value, stride: Value, num_keys: Value, packed: Value, head_size: int) -> None:
    """Lay keys out in registers [key block, H / 32] of pairs along the head.

    Row i, column j of a register holds elements 2 i and 2 i + 1 of key j.
    """
    steps = head_size // (2 * LANES)
    with e.loop(0, num_keys, BLOCK) as block:
        for register in range(2):
            ids = [block.index + (register * AMX_ROWS + row) for row in range(AMX_ROWS)]
            rows = [e.at(keys, I16, e.smaller(i, num_keys - 1) * stride) for i in ids]
            for step in range(steps):
                vectors = transposed(e, [e.read(I32S, row, I16, 2 * LANES * step) for row in rows])
                register_index = block.index // AMX_ROWS * steps + (register * steps + step)
                target = e.at(packed, I32, register_index * AMX_WORDS)
                for i, vector in enumerate(vectors):
                    e.write(vector, target, I32, i * AMX_ROWS)


def _pack_values(e: Emitter, values: Value, stride: Value, num_keys: Value, packed: Value, head_size: int) -> None:
    """Lay values out in registers [key block, H / 16] of pairs of keys.

    Row i of a register holds key 2 i in the lower halves of words, key 2 i + 1 in the upper ones.
    """
    shorts, last = ir.VectorType(I16, LANES), num_keys - 1
    with e.loop(0, num_keys, BLOCK) as block, e.loop(0, AMX_ROWS, 1) as row:
        first = block.index + row.index * 2
        ids = (e.smaller(first, last), e.smaller(first + 1, last))
        even_row, odd_row = (e.at(values, I16, i * stride) for i in ids)
        for part in range(head_size // AMX_ROWS):
            even, odd = (e.b.zext(e.read(shorts, r, I16, part * AMX_ROWS), I32S) for r in (even_row, odd_row))
            place = block.index * (head_size // 2) + row.index * AMX_ROWS
            pairs = even | (odd << 16)
            e.write(pairs, packed, I32, place + part * AMX_WORDS)


def _scores(
    e: Emitter, q: Value, q_stride: Value, packed_k: Value, scores: Value, limit: Value, row_size: Value, head_size: int
) -> None:
    """Write scores[32, keys] of 32 queries with all keys below limit, in whole blocks."""
    steps = head_size // (2 * LANES)
    q_bytes, row_bytes, register_bytes = q_stride * 2, row_size * 4, e.int(4 * AMX_ROWS)
    q_blocks = [e.at(q, I16, q_stride * (part * AMX_ROWS)) for part in range(2)]
    with e.loop(0, limit, BLOCK) as block:
        k_blocks = e.at(packed_k, I32, block.index * (head_size // 2))
        e.amx_zero(range(4))
        for step in range(steps):
            for part in range(2):
                e.amx_load(4 + part, e.at(q_blocks[part], I16, 2 * LANES * step), q_bytes)
                e.amx_load(6 + part, e.at(k_blocks, I32, (part * steps + step) * AMX_WORDS), register_bytes)
            for register in range(4):
                e.amx_dot("tdpbf16ps", register, 4 + register // 2, 6 + register % 2)
        for register in range(4):
            row = e.at(scores, F32, row_size * (register // 2 * AMX_ROWS))
            e.amx_store(register, e.at(row, F32, block.index + register % 2 * AMX_ROWS), row_bytes)


def _hide(e: Emitter, seen: Value, causal: bool, limit: Value, row_size: Value, scores: Value) -> None:
    """Make scores of keys that a query does not see very small. Only the last two blocks have such keys."""
    lanes = ir.Constant(I32S, list(range(LANES)))
    start = seen & -BLOCK
    with e.loop(0, QUERIES, 1) as row, e.loop(start, limit, BLOCK) as block:
        last = e.splat(e.b.trunc(seen + row.index if causal else seen, I32))
        for part in range(2):
            index = block.index + part * AMX_ROWS
            place = row.index * row_size + index
            visible = e.b.icmp_signed("<=", e.splat(e.b.trunc(index, I32)) + lanes, last)
            e.write(e.b.select(visible, e.read(F32S, scores, F32, place), e.splat(HIDDEN)), scores, F32, place)


def _softmax(e: Emitter, row: Value, limit: Value, row_size: Value, scores: Value, probs: Value, head_size: int) -> Value:
    """probs[row] = exp((scores[row] - their maximum) / sqrt(H)). Returns their sum."""
    offset = row * row_size

    def score(block: Value, part: int) -> Value:
        return e.read(F32S, scores, F32, offset + block + part * AMX_ROWS)

    with e.loop(0, limit, BLOCK, e.splat(HIDDEN), e.splat(HIDDEN)) as block:
        pairs = ((score(block.index, part), top) for part, top in enumerate(block.values))
        tops = [e.larger(s, top) for s, top in pairs]
        block.carry(tops)
    top = e.greatest(e.larger(tops[0], tops[1]))
    scale = head_size**-0.5 * 1.4426950408889634  # powers of two are cheaper than of e
    minus_top = e.splat(top * -scale)
    with e.loop(0, limit, BLOCK, e.splat(0.0), e.splat(0.0)) as block:
        pair = [e.small_exp2(e.fma(score(block.index, part), e.splat(scale), minus_top)) for part in range(2)]
        block.carry([total + part for total, part in zip(block.values, pair, strict=True)])
        e.write(e.narrowed(*pair), probs, I16, offset + block.index)
    return e.total(e.b.fadd(*block.values))


def _weighted_values(
    e: Emitter, probs: Value, packed_v: Value, outcome: Value, limit: Value, row_size: Value, head_size: int
) -> None:
    """outcome[32, H] = probs @ values."""
    row_bytes, out_bytes = row_size * 2, e.int(4 * head_size)
    p_blocks = [e.at(probs, I16, row_size * (part * AMX_ROWS)) for part in range(2)]
    for pair in range(0, head_size // AMX_ROWS, 2):
        e.amx_zero(range(4))
        with e.loop(0, limit, BLOCK) as block:
            v_blocks = e.at(packed_v, I32, block.index * (head_size // 2))
            for part in range(2):
                e.amx_load(4 + part, e.at(p_blocks[part], I16, block.index), row_bytes)
                e.amx_load(6 + part, e.at(v_blocks, I32, (pair + part) * AMX_WORDS), 4 * AMX_ROWS)
            for register in range(4):
                e.amx_dot("tdpbf16ps", register, 4 + register // 2, 6 + register % 2)
        for register in range(4):
            place = register // 2 * AMX_ROWS * head_size + (pair + register % 2) * AMX_ROWS
            e.amx_store(register, e.at(outcome, F32, place), out_bytes)
