"""Rows of every layout as rows of turns: dicts in, dicts out.

Turns lie under `conversations` (reference, LLaVA, ShareGPT), `messages` (OpenAI, ms-swift, LLaMA-Factory) or `texts`
(FineVision). A row of one question (Alpaca, older ms-swift) and a preference pair are rewritten to `conversations`.
"""

from __future__ import annotations

import base64
import re
from typing import Any, TypeGuard

from ivl.errors import DataError, short
from ivl.formats.base import RowLayout

TURN_KEYS: dict[RowLayout | None, tuple[str, ...]] = {
    None: ("conversations", "messages", "texts"),
    "reference": ("conversations",),
    "openai": ("messages",),
    "sharegpt": ("conversations", "messages"),
    "swift": ("messages",),
    "alpaca": (),
    "finevision": ("texts",),
}
"""Keys that hold the turns in a layout."""
QUESTION_KEYS: dict[RowLayout | None, tuple[str, ...]] = {
    "alpaca": ("instruction", "output", "response", "chosen"),
    "swift": ("query", "response", "rejected_response"),
    None: ("prompt", "completion", "response"),
}
"""Key of the question of a row of one question, and of its answers: one of these says that the row is one. The last are of
TRL, and have no layout of their own."""
ROW_KEYS = ("conversations", "messages", "texts", "instruction", "query", "chosen", "completion", "response")
"""Keys of which a row has one, with a text or a list. A data set of that name in a meta JSON is an object."""
PAIR_KEYS = ("question", "prompt", "conversations", "messages")
"""Keys that may hold the prompt of a preference pair, the first that is there."""
_SHOWN = re.compile(r"<img>([^<>]+)</img>")


def with_turns(row: dict[str, Any], layout: RowLayout | None, source: str) -> tuple[dict[str, Any], RowLayout | None, bool]:
    """Rewrite a row of one question, or a preference pair, to `conversations`; other rows stay.

    Returns:
        The row, the layout that its turns have now, and whether it is a pair, with two conversations.

    Raises:
        DataError: for a pair without a prompt or with an empty reply.
    """
    if all(is_empty(row.get(key)) for key in TURN_KEYS[layout]):
        for question, *answers in [keys for kind, keys in QUESTION_KEYS.items() if layout in (None, kind)]:
            if isinstance(row.get(question), str) and any(row.get(answer) is not None for answer in answers):
                row, layout = _asked_once(row, source), None
                break
        if layout is None and is_list(prompt := row.get("prompt")) and not is_empty(row.get("completion")):  # TRL's turns
            rest = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
            row = rest | {"conversations": [*prompt, *_reply(row["completion"], "completion", source)]}
    if "messages" in TURN_KEYS[layout]:
        row = _last_turn_chosen(row)
    if row.get("chosen") is None or row.get("rejected") is None:
        return row, layout, False
    return _pair(row, source), None, True


def find_turns(row: dict[str, Any], layout: RowLayout | None, source: str) -> tuple[str, list[Any]]:
    """The key that holds the turns, and a list of conversations, each a list of turns.

    Raises:
        DataError: where no key holds turns, or several do.
    """
    known = TURN_KEYS[layout]
    keys = [key for key in known if not is_empty(row.get(key))] or [key for key in known if row.get(key) is not None]
    if not keys:
        names = [f"`{key}`" for key in known] + [
            f"`{q}` with `{a}`" for k, (q, a, *_) in QUESTION_KEYS.items() if layout in (None, k)
        ]
        raise DataError(source, "bad_row", f"no {' or '.join(names)} among the keys {short(sorted(row), 200)}")
    if len(keys) > 1 and layout is None:
        both = " and ".join(f"`{key}`" for key in keys)
        raise DataError(source, "bad_row", f"both {both}; name the format to say which counts")
    turns = row[keys[0]]
    if is_object(turns):
        turns = _transposed(turns)
    if not is_list(turns) or not turns:
        raise DataError(source, "bad_row", f"`{keys[0]}` must be a list of turns, got {short(turns)}")
    return keys[0], turns if isinstance(turns[0], list) else [turns]


def _asked_once(row: dict[str, Any], source: str) -> dict[str, Any]:
    """A row of one question with its turns: `history` holds earlier pairs of question and answer, `context` what a question of
    Dolly is about. In texts of older ms-swift, as of Qwen-VL, `<img>path</img>` shows a picture.
    """
    names = ("instruction", "context", "input", "output", "query", "prompt", "completion", "response", "history")
    rest = {key: value for key, value in row.items() if key not in (*names, "rejected_response")}
    asked = [row[key] for key in ("instruction", "query", "prompt", "context", "input") if not is_empty(row.get(key))]
    earlier = row.get("history") or []
    pairs = is_list(earlier) and all(is_list(pair) and len(pair) == 2 for pair in earlier)
    if not pairs or not all(isinstance(text, str) for text in asked):
        raise DataError(source, "bad_row", f"`input` is text and `history` a list of [question, answer], got {short(earlier)}")
    turns = [
        {"role": role, "content": text}
        for pair in [*earlier, ["\n".join(asked), None]]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ][:-1]
    if not is_empty(row.get("query")) and all(is_empty(row.get(key)) for key in ("image", "images")):
        rest["images"] = _SHOWN.findall("".join(str(turn["content"]) for turn in turns[::2]))
        for turn in turns[::2] if rest["images"] else ():
            turn["content"] = _SHOWN.sub("<image>", str(turn["content"]))
    answer = next((row[key] for key in ("response", "output", "completion") if row.get(key) is not None), None)
    rejected = row.get("rejected_response") if is_empty(row.get("rejected")) else row["rejected"]
    if not is_empty(rejected):
        return rest | {"messages": turns, "chosen": row.get("chosen") or answer, "rejected": rejected}
    return rest | {"conversations": [*turns, {"role": "assistant", "content": answer}]}


def _last_turn_chosen(row: dict[str, Any]) -> dict[str, Any]:
    """A preference pair of newer ms-swift as one with `chosen` and `rejected`; other rows stay.

    `messages` end with the chosen reply; `rejected_response` stands in its place, or `rejected_messages` for all of them.
    """
    turns, reply, others = (row.get(key) for key in ("messages", "rejected_response", "rejected_messages"))
    if not is_list(turns) or is_empty(turns) or (is_empty(reply) and is_empty(others)):
        return row
    rest = {key: value for key, value in row.items() if key not in ("messages", "rejected_response", "rejected_messages")}
    if is_empty(reply):
        return rest | {"chosen": turns, "rejected": others}
    return rest | {"messages": turns[:-1], "chosen": [turns[-1]], "rejected": reply}


def _pair(row: dict[str, Any], source: str) -> dict[str, Any]:
    """Replace the prompt and both replies by `conversations`: the prompt with the chosen and with the rejected reply.

    The prompt is text or turns. Without one, both replies are whole conversations. A reply is text, a turn, or turns.
    """
    chosen, rejected = (_reply(row[side], side, source) for side in ("chosen", "rejected"))
    prompts: list[Any] = [row[key] for key in PAIR_KEYS if not is_empty(row.get(key))]
    prompt: Any = prompts[0] if prompts else []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not is_list(prompt) or (not prompt and len(chosen) < 2):
        raise DataError(source, "bad_row", "a preference row needs `question`, `prompt` or turns before its replies")
    if chosen[:-1] != rejected[:-1]:
        raise DataError(source, "bad_row", "chosen and rejected differ before their last turn: a pair has one prompt")
    rest = {key: value for key, value in row.items() if key not in (*PAIR_KEYS, "chosen", "rejected")}
    return rest | {"conversations": [[*prompt, *reply] for reply in (chosen, rejected)]}


def _reply(reply: Any, side: str, source: str) -> list[Any]:
    if isinstance(reply, str):
        if not reply.strip():
            raise DataError(source, "empty_answer", f"the {side} reply is empty")
        return [{"role": "assistant", "content": reply}]
    turns = [reply] if is_object(reply) else reply
    if not is_list(turns) or not turns or not all(is_object(turn) for turn in turns):
        raise DataError(source, "bad_row", f"`{side}` must be text or turns, got {short(reply)}")
    return turns


def _transposed(columns: dict[str, Any]) -> Any:
    """A struct of lists, as some tables store a list of structs, as that list; other objects as they are."""
    lists = list(columns.values())
    if not lists or not all(is_list(column) and len(column) == len(lists[0]) for column in lists):
        return columns
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def data_of(url: str, source: str) -> bytes:
    """The bytes of a base64 data URL; raises DataError for another one, or an empty one."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError(source, "undecodable_media", f"not a base64 data URL: {short(url)}")
    try:
        data = base64.b64decode(body, validate=True)
    except ValueError as error:  # binascii.Error, and letters outside ASCII
        raise DataError(source, "undecodable_media", f"image data URL is not base64 ({error})") from None
    if not data:
        raise DataError(source, "undecodable_media", f"the data URL is empty: {short(url)}")
    return data


def is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: tables hold null, "" and {"ref": [], "bbox": []} where a row has none."""
    return value in (None, "", [], {}) or (is_object(value) and all(is_empty(inner) for inner in value.values()))
