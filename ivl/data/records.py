"""One row of a file <-> Record (spec 3.2). No media is opened here.

A row is read by its own keys: turns are under `conversations` (reference, LLaVA, ShareGPT), `messages` (OpenAI, ms-swift,
LLaMA-Factory) or `texts` (FineVision). A row may hold several conversations about the same media, as a list of lists (our
extension): they become one Record, share tiles and never see each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ivl.data.layouts import from_record
from ivl.data.media import RowMedia, Slot
from ivl.data.pairs import as_conversations, is_pair
from ivl.errors import DataError, short
from ivl.types import Conversation, Message, Part, Record, Role, Text

__all__ = ["DataError", "Layout", "describe", "from_record", "parse_row", "to_record"]

Layout = Literal["reference", "openai", "sharegpt", "swift", "finevision"]
"""How a row says its turns and media."""

KEYS: dict[Layout | None, tuple[str, ...]] = {
    None: ("conversations", "messages", "texts"),
    "reference": ("conversations",),
    "openai": ("messages",),
    "sharegpt": ("conversations", "messages"),
    "swift": ("messages",),
    "finevision": ("texts",),
}
"""Where the turns of a layout are."""
ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
}  # fmt: skip
REFUSED = {
    "audio": "audio is not supported", "audios": "audio is not supported", "tools": "tool calls are not supported",
    "objects": "boxes are not put into the text; write <ref>name</ref><box>[[x1, y1, x2, y2]]</box> there, 0 to 1000",
}  # fmt: skip
"""Keys whose content a Record cannot hold; empty ones are fine."""


def parse_row(text: bytes, *, source: str) -> dict[str, Any]:
    """The JSON object of one row.

    Raises:
        DataError: naming `source`, if it is not valid JSON, not text or no object.
    """
    try:
        row = json.loads(text)
        _check_surrogates(text, row)
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise DataError(source, "broken_json", f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(source, "bad_row", f"expected an object, got {type(row).__name__}")
    return row


def to_record(
    row: bytes | dict[str, Any], *, source: str, root: Path, dataset: str = "", layout: Layout | None = None
) -> Record:
    """Read one row. Relative media paths are taken from `root`; `layout` forces how the row is read.

    Raises:
        DataError: naming `source` (a `file:line`), for broken JSON, wrong roles, empty answers, or marks and media that do
            not agree in number.
    """
    if isinstance(row, bytes):
        row = parse_row(row, source=source)
    try:
        return _record(row, source, root, dataset, layout)
    except RecursionError:
        raise DataError(source, "bad_row", "nested too deep") from None


def _record(row: dict[str, Any], source: str, root: Path, dataset: str, layout: Layout | None) -> Record:
    for key, why in REFUSED.items():
        if not _empty(row.get(key)):
            raise DataError(source, "bad_row", f"`{key}`: {why}")
    pair = is_pair(row)
    if pair:
        row, layout = as_conversations(row, source), None
    key, nested = _turns(row, layout, source)
    media = RowMedia(row, source=source, root=root)
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(source, "bad_row", f"`system` must be a string, got {short(system)}")
    return Record(
        id=_id(row.get("id"), source),
        conversations=tuple(_conversation(turns, media, source, system or "", key == "texts") for turns in nested),
        source=source,
        dataset=dataset,
        is_pair=pair,
    )


def describe(container: str, first_row: bytes | dict[str, Any], layout: Layout | None = None) -> str:
    """The format of a file in a few words, for people. Every row is read by its own keys, whatever the first one has."""
    try:
        row = parse_row(first_row, source="") if isinstance(first_row, bytes) else first_row
    except DataError:
        row = {}
    listed = any(row.get(key) is not None for key in ("images", "videos", "system"))
    if layout is not None:
        words = {"openai": "OpenAI messages", "sharegpt": "ShareGPT", "swift": "ms-swift", "finevision": "FineVision"}
        return f"{words.get(layout, layout)} {container}, as told"
    if row.get("conversations") is not None:
        name = "ShareGPT" if listed else "reference" if container == "jsonl" else "LLaVA"
        return f"{name} {container}"
    if row.get("messages") is not None:
        return f"{'ShareGPT' if listed else 'OpenAI messages'} {container}"
    return f"FineVision {container}" if row.get("texts") is not None else f"{container} of unknown rows"


def _turns(row: dict[str, Any], layout: Layout | None, source: str) -> tuple[str, list[Any]]:
    """The key that holds the turns, and a list of conversations."""
    keys = [key for key in KEYS[layout] if row.get(key) is not None]
    if not keys:
        wanted = " or ".join(f"`{key}`" for key in KEYS[layout])
        raise DataError(source, "bad_row", f"no {wanted} among the keys {short(sorted(row), 200)}")
    if len(keys) > 1 and layout is None:
        raise DataError(
            source, "bad_row", f"both {' and '.join(f'`{key}`' for key in keys)}; name the format to say which counts"
        )
    turns = row[keys[0]]
    if isinstance(turns, dict):  # a list of structs that was stored as a struct of lists
        turns = _transposed(turns)
    if not isinstance(turns, list) or not turns:
        raise DataError(source, "bad_row", f"`{keys[0]}` must be a list of turns, got {short(turns)}")
    return keys[0], turns if isinstance(turns[0], list) else [turns]


def _transposed(columns: dict[str, Any]) -> Any:
    lists = list(columns.values())
    if not lists or not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists):
        return columns
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def _id(value: Any, source: str) -> str:
    if value is None:
        return source
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(source, "bad_row", f"`id` must be a string or a number, got {short(value)}")
    return str(value)


def _conversation(turns: Any, media: RowMedia, source: str, system: str, pairs: bool) -> Conversation:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(source, "bad_row", f"a conversation must be a list of turns, got {short(turns)}")
    if pairs:
        turns = [_half(turn, role, source) for turn in turns for role in ("user", "assistant")]
    roles: list[Role] = [_role(turn, source) for turn in turns]
    contents = [_content(turn, source) for turn in turns]
    if system:
        roles.insert(0, "system")
        contents.insert(0, system)
    _check_roles(roles, source)
    items = [media.items(content, role) for role, content in zip(roles, contents, strict=True)]
    for role, each in zip(roles, items, strict=True):
        if role != "user" and any(not isinstance(item, Text) for item in each):
            raise DataError(source, "placeholder_mismatch", f"media in a turn of role {role!r}; only the user shows media")
    _show_first(items[roles.index("user")], items, media, several=pairs)
    messages = tuple(Message(role, parts) for role, parts in zip(roles, media.fill(items), strict=True))
    for number, message in enumerate(messages):
        if message.role == "assistant" and not message.text.strip():
            raise DataError(source, "empty_answer", f"answer {number} is empty")
    return messages


def _show_first(first: list[Part | Slot], items: list[list[Part | Slot]], media: RowMedia, *, several: bool) -> None:
    """A lone image or video without a mark stands before the first question; in FineVision's pairs, any number does."""
    lead: list[Part | Slot] = []
    for kind, refs in (("image", media.images), ("video", media.videos)):
        marked = any(isinstance(item, Slot) and item.kind == kind for each in items for item in each)
        if not marked and (len(refs) == 1 or several):
            lead += [item for _ in refs for item in (Slot(kind), Text("\n"))]
    first[:0] = lead


def _half(pair: dict[str, Any], role: Role, source: str) -> dict[str, Any]:
    if role not in pair:
        raise DataError(source, "bad_row", f"a pair of `texts` must have user and assistant, got {short(pair)}")
    return {"role": role, "content": pair[role]}


def _role(turn: dict[str, Any], source: str) -> Role:
    name = turn.get("from", turn.get("role"))
    if not isinstance(name, str) or name not in ROLES:
        raise DataError(source, "bad_roles", f"unknown role {short(name)}; roles are {', '.join(ROLES)}")
    return ROLES[name]


def _content(turn: dict[str, Any], source: str) -> Any:
    for key in ("loss", "weight"):
        if turn.get(key) not in (None, True, 1):
            raise DataError(source, "bad_row", f"a turn has {key} {short(turn[key])}; every answer of a row is trained alike")
    return turn.get("value", turn.get("content"))


def _check_roles(roles: list[Role], source: str) -> None:
    """At most one system turn, first; then user and assistant in turn, the assistant last."""
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        said = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "") if roles else "none"
        raise DataError(source, "bad_roles", f"roles must alternate from user to assistant, got {said}")


def _check_surrogates(text: bytes, row: Any) -> None:
    """Half of a surrogate pair, written as an escape, is valid JSON but no text; raises UnicodeEncodeError."""
    if b"\\ud" in text or b"\\uD" in text:
        json.dumps(row, ensure_ascii=False).encode()


def _empty(value: Any) -> bool:
    """Whether nothing is said: columns of a table hold null, "" and {"ref": [], "bbox": []} where a row has none."""
    return value in (None, "", [], {}) or (isinstance(value, dict) and all(_empty(each) for each in value.values()))
