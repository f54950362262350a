"""Attention of one new token per sequence over a paged cache, for any processor. See emitter.py for the terms.

A thread takes one key/value head of one sequence: it turns the new key and the queries to their position, stores key and
value in the cache, and reads every key and every value once for all query heads that share them. Sums are float32.
"""

from __future__ import annotations

from functools import partial

from ivl.cpu.kernels import decode_amx
from ivl.cpu.kernels.emitter import F32, F32S, I16, I64, LANES, Emitter, Pair, Value

HIDDEN = -3e38
HEADS_AT_ONCE = 4
"""Query heads that share a load of a value: their sums stay in registers."""


def scratch_bytes(group: int, head_size: int, longest: int) -> int:
    """Return what one thread needs, in whole cache lines: with vectors its queries and their scores, float32."""
    most = max(4 * group * (head_size + longest + LANES), decode_amx.scratch_bytes(head_size, longest))
    return -(-most // 64) * 64


def decode_attention(e: Emitter, head_size: int, group: int, block_size: int, amx: int) -> None:
    """out[s, n] = softmax(q . k / sqrt(H)) v of sequence s and query head n, with the new key and value in the cache.
    With AMX, which wants blocks of a multiple of 16, keys and values meet all heads at once."""
    scratch = e.thread_scratch()
    qkv, cos, sin, keys, values, outs = (e.pointer(i, kind) for i, kind in zip(range(4, 10), _KINDS, strict=True))
    tables, pasts = e.pointer(10, I64), e.pointer(11, I64)
    num_seqs, num_kv_heads, row_size, table_size = (e.argument(i) for i in (12, 13, 14, 15))
    num_heads = num_kv_heads * group
    slot_size = num_kv_heads * head_size
    if amx:
        decode_amx.amx_shapes(e, group)
    with e.claimed(num_seqs * num_kv_heads, 1) as (start, stop), e.loop(start, stop, 1) as item:
        seq, head = item.index // num_kv_heads, item.index % num_kv_heads
        past = e.element(pasts, I64, seq)
        table = e.at(tables, I64, seq * table_size)
        row = e.at(qkv, I16, seq * row_size)
        turn = [e.at(factors, F32, seq * head_size) for factors in (cos, sin)]

        def head_at(index: Value, row: Value = row) -> Value:
            return e.at(row, I16, index * head_size)

        def slot(pages: Value, position: Value, table: Value = table, head: Value = head) -> Value:
            block = e.element(table, I64, position // block_size)
            place = block * block_size + position % block_size
            return e.at(pages, I16, place * slot_size + head * head_size)

        new_key, new_value = slot(keys, past), slot(values, past)
        for part, pair in enumerate(_rotated(e, head_at(num_heads + head), turn, head_size)):
            e.store(new_key, part * 2 * LANES, pair)
        v = head_at(num_heads + num_kv_heads + head)
        for at in range(0, head_size, 2 * LANES):
            e.store(new_value, at, e.load(v, at))
        queries = [head_at(head * group + member) for member in range(group)]
        pairs = [_rotated(e, q, turn, head_size) for q in queries]
        out = e.at(outs, I16, (seq * num_heads + head * group) * head_size)
        attend = decode_amx.attend if amx else _attend
        stored = decode_amx.Stored(partial(slot, keys), partial(slot, values), slot_size, past + 1)
        attend(e, scratch, pairs, stored, head_size, out)
    if amx:
        e.amx_release()


def _attend(
    e: Emitter, scratch: Value, queries: list[list[Pair]], stored: decode_amx.Stored, head_size: int, out: Value
) -> None:
    """Do what decode_amx.attend does, with vectors."""
    key_at, value_at, _, length = stored
    group = len(queries)
    for member, q in enumerate(queries):
        for part, vector in enumerate(vector for pair in q for vector in pair):
            scaled = vector * e.splat(head_size**-0.5)
            e.write(scaled, scratch, F32, member * head_size + part * LANES)
    scores = e.at(scratch, F32, group * head_size)
    room = (length + (LANES - 1)) & -LANES
    rows = [e.at(scores, F32, room * member) for member in range(group)]
    for scores_row in rows:
        e.write(e.splat(HIDDEN), scores_row, F32, room - LANES)
    with e.loop(0, length, 1) as position:
        key = key_at(position.index)
        pairs = [e.load(key, at) for at in range(0, head_size, 2 * LANES)]
        for member, scores_row in enumerate(rows):
            total = e.splat(0.0)
            for part, vector in enumerate(vector for pair in pairs for vector in pair):
                total = e.fma(e.read(F32S, scratch, F32, member * head_size + part * LANES), vector, total)
            e.b.store(e.total(total), e.at(scores_row, F32, position.index))
    scales = [_softmax(e, scores_row, room) for scores_row in rows]
    for first in range(0, group, HEADS_AT_ONCE):
        members = range(first, min(first + HEADS_AT_ONCE, group))
        for half in range(0, head_size, 64):
            zeros = [e.splat(0.0) for _ in members for _ in range(64 // LANES)]
            with e.loop(0, length, 1, *zeros) as position:
                value = value_at(position.index)
                vectors = [v for at in (0, 2 * LANES) for v in e.load(value, half + at)]
                sums = iter(position.values)
                added = []
                for member in members:
                    weight = e.splat(e.element(rows[member], F32, position.index))
                    added += [e.fma(weight, vector, next(sums)) for vector in vectors]
                position.carry(added)
            sums = iter(position.values)
            for member in members:
                for at in (0, 2 * LANES):
                    even, odd = (next(sums) * scales[member] for _ in range(2))
                    e.store(out, member * head_size + half + at, (even, odd))


_KINDS = (I16, F32, F32, I16, I16, I16)


def _rotated(e: Emitter, row: Value, turn: list[Value], head_size: int) -> list[Pair]:
    """Rotate a head to its position. Returns even and odd elements of each 32; the halves of cos and of sin are equal."""
    first_half, second_half = [], []
    for at in range(0, head_size // 2, 2 * LANES):
        firsts, seconds = e.load(row, at), e.load(row, at + head_size // 2)
        coss, sins = (e.deinterleaved(factors, at) for factors in turn)
        parts = list(zip(firsts, seconds, coss, sins, strict=True))
        first_half.append(tuple(e.fma(a, c, -(b * s)) for a, b, c, s in parts))
        second_half.append(tuple(e.fma(b, c, a * s) for a, b, c, s in parts))
    return first_half + second_half


def _softmax(e: Emitter, row: Value, room: Value) -> Value:
    """Replace scores by exp(score - maximum). Returns one over their sum, in every lane."""
    with e.loop(0, room, LANES, e.splat(HIDDEN)) as block:
        block.carry([e.larger(e.read(F32S, row, F32, block.index), block.values[0])])
    top = e.splat(e.greatest(block.values[0]))
    with e.loop(0, room, LANES, e.splat(0.0)) as block:
        weights = e.exp(e.read(F32S, row, F32, block.index) - top)
        e.write(weights, row, F32, block.index)
        block.carry([block.values[0] + weights])
    return e.splat(1.0 / e.total(block.values[0]))
