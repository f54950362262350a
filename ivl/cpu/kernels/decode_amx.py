"""One query token against the keys and values of its sequence, with AMX. See emitter.py for the terms.

A register takes 16 keys as they lie in the cache, and multiplies them with the queries of all heads that share them: the
result holds one position's scores for up to 16 heads in each row. Values have to be second operands, for probabilities are
the first: so 32 positions of values are interleaved in pairs, position i with position i + 16, and the probabilities alike.
Probabilities are rounded to bfloat16 before they meet the values, as in torch's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ivl.cpu.kernels.emitter import AMX_ROWS, F32, F32S, I16, I32, I32S, LANES, Emitter, Pair, Value
from ivl.cpu.kernels.rows import transposed

HIDDEN = -3e38
CHUNK = 2 * AMX_ROWS
"""Positions whose probabilities meet their values together: the first 16 in the even halves of words, the others in the odd."""
AMX_WORDS = AMX_ROWS * AMX_ROWS
SUMS, SCORES, PROBS, MEMORY, QUERIES = (0, 1, 2, 3), 4, 5, 6, 7
"""AMX registers. MEMORY holds keys, later values."""


class Stored(NamedTuple):
    """Keys and values of a sequence: where the row of a position is. 16 rows of a block are slot_size elements apart."""

    key_at: Callable[[Value], Value]
    value_at: Callable[[Value], Value]
    slot_size: Value
    length: Value


def scratch_bytes(head_size: int, longest: int) -> int:
    """Return what one thread needs: queries, scores and probabilities, values of a chunk, the result, one over the sums."""
    room = -(-longest // CHUNK) * CHUNK
    return 4 * (AMX_ROWS * head_size // 2 + room * (AMX_ROWS + AMX_ROWS // 2) + 4 * AMX_WORDS + AMX_ROWS * 64 + AMX_ROWS)


def amx_shapes(e: Emitter, group: int) -> None:
    e.amx_configure([(rows, 64) for rows in [group] * len(SUMS) + [AMX_ROWS, group, AMX_ROWS, AMX_ROWS]])


def attend(e: Emitter, scratch: Value, queries: list[list[Pair]], stored: Stored, head_size: int, out: Value) -> None:
    """out[member, H] = softmax(q . k / sqrt(H)) v. queries: pairs of 32 elements of every member of the group."""
    key_at, value_at, slot_size, length = stored
    group, steps = len(queries), head_size // (2 * LANES)
    words = e.b.bitcast(scratch, I32.as_pointer())
    room = (length + (CHUNK - 1)) & -CHUNK
    scores = e.at(words, I32, AMX_ROWS * head_size // 2)
    probs = e.at(scores, I32, room * AMX_ROWS)
    values = e.at(probs, I32, room * (AMX_ROWS // 2))
    outcome = e.at(values, I32, 4 * AMX_WORDS)
    sums_at = e.at(outcome, I32, AMX_ROWS * 64)
    for step in range(steps):
        vectors = [e.rounded_words(member[step]) for member in queries] + [e.ints(0)] * (AMX_ROWS - group)
        for row, vector in enumerate(transposed(e, vectors)):
            e.write(vector, words, I32, step * AMX_WORDS + row * AMX_ROWS)
    _scores(e, words, scores, key_at, slot_size, length, steps)
    _probabilities(e, scores, probs, sums_at, length, room, group, head_size)
    last = length - 1
    for half in range(0, head_size, 64):
        e.amx_zero(SUMS)
        with e.loop(0, room, CHUNK) as chunk:
            with e.loop(0, AMX_ROWS, 1) as i:
                both = [chunk.index + i.index + part * AMX_ROWS for part in range(2)]
                rows = [value_at(e.smaller(place, last)) for place in both]
                for part in range(2):
                    first, second = (e.read(I32S, row, I16, half + part * 2 * LANES) for row in rows)
                    even = (first & 0xFFFF) | (second << 16)
                    odd = (first >> 16) | (second & -65536)
                    for n, vector in enumerate((even, odd)):
                        at = i.index * AMX_ROWS + (2 * part + n) * AMX_WORDS
                        e.write(vector, values, I32, at)
            e.amx_load(PROBS, e.at(probs, I32, chunk.index * (AMX_ROWS // 2)), 64)
            for n, register in enumerate(SUMS):
                e.amx_load(MEMORY, e.at(values, I32, n * AMX_WORDS), 64)
                e.amx_dot("tdpbf16ps", register, PROBS, MEMORY)
        for n, register in enumerate(SUMS):
            e.amx_store(register, e.at(outcome, F32, n * AMX_ROWS), 4 * 64)
        for member in range(group):
            scale = e.splat(e.element(sums_at, F32, member))
            for part in range(2):
                place = member * 64 + part * 2 * LANES
                even, odd = (e.read(F32S, outcome, F32, place + n * LANES) * scale for n in range(2))
                e.store(out, member * head_size + half + part * 2 * LANES, (even, odd))


def _scores(
    e: Emitter, queries: Value, scores: Value, key_at: Callable[[Value], Value], slot_size: Value, length: Value, steps: int
) -> None:
    """Write scores[position, member]. Those beyond the length, of the last 16, come from whatever lies there."""
    with e.loop(0, length, AMX_ROWS) as block:
        keys = key_at(block.index)
        e.amx_zero([SCORES])
        for step in range(steps):
            e.amx_load(MEMORY, e.at(keys, I16, step * 2 * LANES), slot_size * 2)
            e.amx_load(QUERIES, e.at(queries, I32, step * AMX_WORDS), 64)
            e.amx_dot("tdpbf16ps", SCORES, MEMORY, QUERIES)
        e.amx_store(SCORES, e.at(scores, F32, block.index * AMX_ROWS), 64)


def _probabilities(
    e: Emitter, scores: Value, probs: Value, sums_at: Value, length: Value, room: Value, group: int, head_size: int
) -> None:
    """Write probs, [member, word] for every chunk, and one over the sums of exp(score - maximum) by member."""

    def score(position: Value) -> Value:
        return e.read(F32S, scores, F32, position * AMX_ROWS)

    with e.loop(0, length, 1, e.splat(HIDDEN)) as position:
        position.carry([e.larger(score(position.index), position.values[0])])
    scale = head_size**-0.5 * 1.4426950408889634  # powers of two are cheaper than of e
    minus_top = position.values[0] * e.splat(-scale)
    with e.loop(length, room + 1, 1) as position:  # one more than there are, so that there is one
        e.write(e.splat(HIDDEN), scores, F32, position.index * AMX_ROWS)
    with e.loop(0, room, CHUNK, e.splat(0.0)) as chunk:
        with e.loop(0, AMX_ROWS, 1, chunk.values[0]) as i:
            both = [chunk.index + i.index + part * AMX_ROWS for part in range(2)]
            pair = [e.small_exp2(e.fma(score(place), e.splat(scale), minus_top)) for place in both]
            i.carry([i.values[0] + e.b.fadd(*pair)])
            # Written in place of the first score, which has been read.
            e.write(e.rounded_words((pair[0], pair[1])), scores, I32, both[0] * AMX_ROWS)
        total = i.values[0]
        words = [e.read(I32S, scores, I32, (chunk.index + i) * AMX_ROWS) for i in range(AMX_ROWS)]
        for member, vector in enumerate(transposed(e, words)[:group]):
            e.write(vector, probs, I32, chunk.index * (AMX_ROWS // 2) + member * AMX_ROWS)
        chunk.carry([total])
    e.write(1.0 / chunk.values[0], sums_at, F32, 0)
