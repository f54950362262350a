"""Preference rows -> rows of two conversations about the same media, chosen first (spec 3.2; TRL; LLaMA-Factory)."""

from __future__ import annotations

from typing import Any

from ivl.errors import DataError, short


def is_pair(row: dict[str, Any]) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def as_conversations(row: dict[str, Any], source: str) -> dict[str, Any]:
    """The row with `conversations` of a chosen and a rejected reply in place of its own keys.

    The prompt is `question`, or `prompt` as text or turns, or turns under `conversations` or `messages`; where there is none,
    both replies are whole conversations. A reply is text, one turn, or a list of turns.

    Raises:
        DataError: for a reply that is empty or no text, or where the two are the same.
    """
    sides = [_turns(row[side], side, source) for side in ("chosen", "rejected")]
    if sides[0] == sides[1]:
        raise DataError(source, "bad_row", f"chosen and rejected are the same: {short(row['chosen'])}")
    key = next((key for key in ("question", "prompt", "conversations", "messages") if row.get(key) is not None), None)
    history = [] if key is None else [_turn("user", row[key])] if isinstance(row[key], str) else row[key]
    if not isinstance(history, list) or (not history and len(sides[0]) < 2):
        raise DataError(source, "bad_row", "a preference row needs `question`, `prompt` or turns before its replies")
    if sides[0][:-1] != sides[1][:-1]:
        raise DataError(source, "bad_row", "chosen and rejected differ before their last turn: a pair has one prompt")
    rest = {k: v for k, v in row.items() if k not in ("question", "prompt", "conversations", "messages", "chosen", "rejected")}
    return rest | {"conversations": [[*history, *turns] for turns in sides]}


def from_conversations(row: dict[str, Any], key: str) -> dict[str, Any]:
    """The other direction: a row whose `key` holds two conversations, with their prompt there and each last turn by itself."""
    chosen, rejected = row[key]
    return row | {key: chosen[:-1], "chosen": chosen[-1], "rejected": rejected[-1]}


def _turns(reply: Any, side: str, source: str) -> list[Any]:
    if isinstance(reply, str):
        if not reply.strip():
            raise DataError(source, "empty_answer", f"the {side} reply is empty")
        return [_turn("assistant", reply)]
    turns = [reply] if isinstance(reply, dict) else reply
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(source, "bad_row", f"`{side}` must be text or turns, got {short(reply)}")
    return turns


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
