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
    scratch = e.thread_scratch(1, 6, 7)
    num_queries, num_keys, num_heads, group = (e.argument(i) for i in (8, 9, 10, 11))
    queries, keys, values, outs = (e.pointer(i) for i in (2, 3, 4, 5))
    (q_token, q_head), (k_token, k_head), (v_token, v_head), (out_token, out_head) = (
        (e.argument(i), e.argument(i + 1)) for i in (12, 14, 16, 18)
    )
    all_keys = e.b.and_(e.b.add(num_keys, e.int(BLOCK - 1)), e.int(-BLOCK))
    half = e.b.mul(all_keys, e.int(2 * head_size))
    packed_k, packed_v = scratch, e.at(scratch, I8, half)
    scores = e.at(packed_v, I8, half)
    row_size = e.b.add(all_keys, e.int(ROW_GAP))
    probs = e.at(scores, I8, e.b.mul(row_size, e.int(4 * QUERIES)))
    outcome = e.at(probs, I8, e.b.mul(row_size, e.int(2 * QUERIES)))
    e.amx_configure([(AMX_ROWS, 4 * AMX_ROWS)] * 8)
    with e.claimed(num_heads, 1) as (first, stop), e.loop(first, stop, 1) as head:
        kv_head = e.b.udiv(head.index, group)
        _pack_keys(e, e.at(keys, I16, e.b.mul(kv_head, k_head)), k_token, num_keys, packed_k, head_size)
        _pack_values(e, e.at(values, I16, e.b.mul(kv_head, v_head)), v_token, num_keys, packed_v, head_size)
        q = e.at(queries, I16, e.b.mul(head.index, q_head))
        out = e.at(outs, I16, e.b.mul(head.index, out_head))
        with e.loop(e.int(0), num_queries, QUERIES) as block:
            # The last block moves back to end with the last query.
            start = e.smaller(block.index, e.b.sub(num_queries, e.int(QUERIES)))
            seen = e.b.add(e.b.sub(num_keys, num_queries), start) if causal else e.b.sub(num_keys, e.int(1))
            limit = e.smaller(e.b.add(seen, e.int(QUERIES)), num_keys)
            _scores(e, e.at(q, I16, e.b.mul(start, q_token)), q_token, packed_k, scores, limit, row_size, head_size)
            _hide(e, seen, bool(causal), limit, row_size, scores)
            sums = e.at(outcome, F32, e.int(QUERIES * head_size))
            with e.loop(e.int(0), e.int(QUERIES), 1) as row:
                total = _softmax(e, row.index, limit, row_size, scores, probs, head_size)
                e.b.store(total, e.at(sums, F32, row.index))
            _weighted_values(e, probs, packed_v, outcome, limit, row_size, head_size)
            with e.loop(e.int(0), e.int(QUERIES), 1) as row:
                scale = e.splat(e.b.fdiv(ir.Constant(F32, 1.0), e.b.load(e.at(sums, F32, row.index), typ=F32)))
                target = e.at(out, I16, e.b.mul(e.b.add(start, row.index), out_token))
                for part in range(0, head_size, LANES):
                    place = e.b.add(e.b.mul(row.index, e.int(head_size)), e.int(part))
                    e.store_floats(target, e.int(part), e.b.fmul(e.read(F32S, outcome, F32, place), scale))
    e.amx_release()


def _pack_keys(e: Emitter, keys: Value, stride: Value, num_keys: Value, packed: Value, head_size: int) -> None:
    """Lay keys out in registers [key block, H / 32] of pairs along the head.

    Row i, column j of a register holds elements 2 i and 2 i + 1 of key j.
    """
    steps = head_size // (2 * LANES)
    with e.loop(e.int(0), num_keys, BLOCK) as block:
        for register in range(2):
            ids = [e.b.add(block.index, e.int(register * AMX_ROWS + row)) for row in range(AMX_ROWS)]
            rows = [e.at(keys, I16, e.b.mul(e.smaller(i, e.b.sub(num_keys, e.int(1))), stride)) for i in ids]
            for step in range(steps):
                vectors = transposed(e, [e.read(I32S, row, I16, e.int(2 * LANES * step)) for row in rows])
                register_index = e.b.add(
                    e.b.mul(e.b.udiv(block.index, e.int(AMX_ROWS)), e.int(steps)), e.int(register * steps + step)
                )
                target = e.at(packed, I32, e.b.mul(register_index, e.int(AMX_WORDS)))
                for i, vector in enumerate(vectors):
                    e.write(vector, target, I32, e.int(i * AMX_ROWS))


def _pack_values(e: Emitter, values: Value, stride: Value, num_keys: Value, packed: Value, head_size: int) -> None:
    """Lay values out in registers [key block, H / 16] of pairs of keys.

    Row i of a register holds key 2 i in the lower halves of words, key 2 i + 1 in the upper ones.
    """
    shorts, last = ir.VectorType(I16, LANES), e.b.sub(num_keys, e.int(1))
    with e.loop(e.int(0), num_keys, BLOCK) as block, e.loop(e.int(0), e.int(AMX_ROWS), 1) as row:
        first = e.b.add(block.index, e.b.mul(row.index, e.int(2)))
        ids = (e.smaller(first, last), e.smaller(e.b.add(first, e.int(1)), last))
        even_row, odd_row = (e.at(values, I16, e.b.mul(i, stride)) for i in ids)
        for part in range(head_size // AMX_ROWS):
            even, odd = (e.b.zext(e.read(shorts, r, I16, e.int(part * AMX_ROWS)), I32S) for r in (even_row, odd_row))
            place = e.b.add(e.b.mul(block.index, e.int(head_size // 2)), e.b.mul(row.index, e.int(AMX_ROWS)))
            pairs = e.b.or_(even, e.b.shl(odd, e.ints(16)))
            e.write(pairs, packed, I32, e.b.add(place, e.int(part * AMX_WORDS)))


def _scores(
    e: Emitter, q: Value, q_stride: Value, packed_k: Value, scores: Value, limit: Value, row_size: Value, head_size: int
) -> None:
    """Write scores[32, keys] of 32 queries with all keys below limit, in whole blocks."""
    steps = head_size // (2 * LANES)
    q_bytes, row_bytes, register_bytes = e.b.mul(q_stride, e.int(2)), e.b.mul(row_size, e.int(4)), e.int(4 * AMX_ROWS)
    q_blocks = [e.at(q, I16, e.b.mul(q_stride, e.int(part * AMX_ROWS))) for part in range(2)]
    with e.loop(e.int(0), limit, BLOCK) as block:
        k_blocks = e.at(packed_k, I32, e.b.mul(block.index, e.int(head_size // 2)))
        for register in range(4):
            e.amx_zero(register)
        for step in range(steps):
            for part in range(2):
                e.amx_load(4 + part, e.at(q_blocks[part], I16, e.int(2 * LANES * step)), q_bytes)
                e.amx_load(6 + part, e.at(k_blocks, I32, e.int((part * steps + step) * AMX_WORDS)), register_bytes)
            for register in range(4):
                e.amx_dot("tdpbf16ps", register, 4 + register // 2, 6 + register % 2)
        for register in range(4):
            row = e.at(scores, F32, e.b.mul(row_size, e.int(register // 2 * AMX_ROWS)))
            e.amx_store(register, e.at(row, F32, e.b.add(block.index, e.int(register % 2 * AMX_ROWS))), row_bytes)


def _hide(e: Emitter, seen: Value, causal: bool, limit: Value, row_size: Value, scores: Value) -> None:
    """Make scores of keys that a query does not see very small. Only the last two blocks have such keys."""
    lanes = ir.Constant(I32S, list(range(LANES)))
    start = e.b.and_(seen, e.int(-BLOCK))
    with e.loop(e.int(0), e.int(QUERIES), 1) as row, e.loop(start, limit, BLOCK) as block:
        last = e.int_splat(e.b.trunc(e.b.add(seen, row.index) if causal else seen, I32))
        for part in range(2):
            index = e.b.add(block.index, e.int(part * AMX_ROWS))
            place = e.b.add(e.b.mul(row.index, row_size), index)
            visible = e.b.icmp_signed("<=", e.b.add(e.int_splat(e.b.trunc(index, I32)), lanes), last)
            e.write(e.b.select(visible, e.read(F32S, scores, F32, place), e.splat(HIDDEN)), scores, F32, place)


def _softmax(e: Emitter, row: Value, limit: Value, row_size: Value, scores: Value, probs: Value, head_size: int) -> Value:
    """probs[row] = exp((scores[row] - their maximum) / sqrt(H)). Returns their sum."""
    offset = e.b.mul(row, row_size)

    def score(block: Value, part: int) -> Value:
        return e.read(F32S, scores, F32, e.b.add(e.b.add(offset, block), e.int(part * AMX_ROWS)))

    with e.loop(e.int(0), limit, BLOCK, e.splat(HIDDEN), e.splat(HIDDEN)) as block:
        pairs = ((score(block.index, part), top) for part, top in enumerate(block.values))
        tops = [e.larger(s, top) for s, top in pairs]
        block.carry(tops)
    top = e.greatest(e.larger(tops[0], tops[1]))
    scale = head_size**-0.5 * 1.4426950408889634  # powers of two are cheaper than of e
    minus_top = e.splat(e.b.fmul(top, ir.Constant(F32, -scale)))
    with e.loop(e.int(0), limit, BLOCK, e.splat(0.0), e.splat(0.0)) as block:
        pair = [e.small_exp2(e.fma(score(block.index, part), e.splat(scale), minus_top)) for part in range(2)]
        block.carry([e.b.fadd(total, part) for total, part in zip(block.values, pair, strict=True)])
        e.write(e.narrowed(*pair), probs, I16, e.b.add(offset, block.index))
    return e.total(e.b.fadd(*block.values))


def _weighted_values(
    e: Emitter, probs: Value, packed_v: Value, outcome: Value, limit: Value, row_size: Value, head_size: int
) -> None:
    """outcome[32, H] = probs @ values."""
    row_bytes, out_bytes = e.b.mul(row_size, e.int(2)), e.int(4 * head_size)
    p_blocks = [e.at(probs, I16, e.b.mul(row_size, e.int(part * AMX_ROWS))) for part in range(2)]
    for pair in range(0, head_size // AMX_ROWS, 2):
        for register in range(4):
            e.amx_zero(register)
        with e.loop(e.int(0), limit, BLOCK) as block:
            v_blocks = e.at(packed_v, I32, e.b.mul(block.index, e.int(head_size // 2)))
            for part in range(2):
                e.amx_load(4 + part, e.at(p_blocks[part], I16, block.index), row_bytes)
                e.amx_load(6 + part, e.at(v_blocks, I32, e.int((pair + part) * AMX_WORDS)), e.int(4 * AMX_ROWS))
            for register in range(4):
                e.amx_dot("tdpbf16ps", register, 4 + register // 2, 6 + register % 2)
        for register in range(4):
            place = register // 2 * AMX_ROWS * head_size + (pair + register % 2) * AMX_ROWS
            e.amx_store(register, e.at(outcome, F32, e.int(place)), out_bytes)
