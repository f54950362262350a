"""Rows of a file -> Records. No media is opened here.

A row is read by its own keys (see ivl.formats.layouts). Two kinds of rows hold several conversations about the same media,
which become one Record, share tiles and never see each other: a list of lists of turns (our extension), and a preference pair
with `chosen` and `rejected` replies (TRL, LLaMA-Factory).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ivl.errors import DataError, DataFault, short
from ivl.formats.base import RowLayout, Rows
from ivl.formats.layouts import data_of, find_turns, is_empty, is_list, is_object, with_turns
from ivl.processing.chat import MediumKind, open_lines, pieces
from ivl.types import Conversation, ImageRef, Message, Part, Record, Role, Text, VideoRef
from ivl.utils.budgets import MAX_ROW_CHARS
from ivl.utils.files import is_bare_base64

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
}  # fmt: skip
REFUSED = {
    "audio": "audio is not supported", "audios": "audio is not supported",
    **dict.fromkeys(("tools", "tool_calls", "function_call"), "tool calls are not supported"),
    "reasoning_content": "no template writes it; write <think>...</think> before the answer",
    "objects": "boxes are not put into the text; write <ref>name</ref><box>[[x1, y1, x2, y2]]</box> there, 0 to 1000",
}  # fmt: skip
"""Keys of a row or a turn whose content a Record cannot hold; empty values are fine."""
PART_KINDS = ("text", "image_url", "image", "video_url", "video")


def read_record(rows: Rows, index: int, *, root: Path, dataset: str = "") -> Record:
    """Read one row of an opened file; raises DataError if it is damaged, or not what it should be."""
    return to_record(rows[index], source=rows.source(index), root=root, dataset=dataset, layout=rows.layout)


def to_record(
    row: dict[str, Any], *, source: str, root: Path, dataset: str = "", layout: RowLayout | None = None
) -> Record:  # fmt: skip
    """Read one row.

    Args:
        source: the row's place, such as `file:line`; every error starts with it.
        root: the folder of relative media paths.
        layout: forces how the row is read; None reads it by its own keys.

    Raises:
        DataError: for wrong types, wrong roles, empty answers, or marks and media that differ in number.
    """
    try:
        return _RowReader(row, source, root).record(dataset, layout)
    except RecursionError:
        raise DataError(source, "bad_row", "nested too deep") from None


def media_of(record: Record) -> list[ImageRef | VideoRef]:
    """List every medium of a record once, in order."""
    parts = (part for conversation in record.conversations for message in conversation for part in message.content)
    return list(dict.fromkeys(part for part in parts if isinstance(part, ImageRef | VideoRef)))


@dataclass(frozen=True)
class _Slot:
    """A place in a turn that shows the next medium of its kind, or the one with this number."""

    kind: MediumKind
    number: int | None = None


class _RowReader:
    """Reads one row. Turns are first lists of texts, media and slots; then the slots are filled with the row's media."""

    def __init__(self, row: dict[str, Any], source: str, root: Path) -> None:
        self.row, self.source, self.root = row, source, root
        self.media: list[tuple[MediumKind, list[Any]]] = []

    def record(self, dataset: str, layout: RowLayout | None) -> Record:
        for key in ("kto_tag", "label"):
            if self.row.get(key) is False:
                raise self._bad(f"`{key}` is false: the reply is one not to learn from; drop the row")
        self._check_keys(self.row)
        self.row, layout, is_pair = with_turns(self.row, layout, self.source)
        key, conversations = find_turns(self.row, layout, self.source)
        self._read_media()
        system = self.row.get("system")
        if system is not None and not isinstance(system, str):
            raise self._bad(f"`system` must be a string, got {short(system)}")
        read = tuple(self._conversation(turns, system or "", key == "texts") for turns in conversations)
        if (size := sum(len(message.text) for conversation in read for message in conversation)) > MAX_ROW_CHARS:
            raise self._bad(f"{size:,} characters, the limit of a row is {MAX_ROW_CHARS:,}", "too_long")
        if is_pair and len({conversation[-1].text.strip() for conversation in read}) == 1:
            raise self._bad(f"chosen and rejected are the same but for white space: {short(read[0][-1].text)}")
        return Record(id=self._id(), conversations=read, source=self.source, dataset=dataset, is_pair=is_pair)

    def _check_keys(self, values: dict[str, Any]) -> None:
        for key, why in REFUSED.items():
            if not is_empty(values.get(key)):
                raise self._bad(f"`{key}`: {why}")

    def _bad(self, problem: str, kind: DataFault = "bad_row") -> DataError:
        return DataError(self.source, kind, problem)

    def _id(self) -> str:
        value = self.row.get("id")
        if is_empty(value):
            return self.source
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self._bad(f"`id` must be a string or a number, got {short(value)}")
        return str(value)

    # -- turns

    def _conversation(self, turns: Any, system: str, question_answer: bool) -> Conversation:
        """Read one conversation.

        Args:
            turns: a list of turns, each an object; with question_answer (FineVision) each holds a question and its answer.
            system: the text of a system turn to put first; empty for none.
        """
        if not is_list(turns) or not all(is_object(turn) for turn in turns):
            raise self._bad(f"a conversation must be a list of turns, got {short(turns)}")
        if question_answer:
            turns = [self._half(turn, role) for turn in turns for role in ("user", "assistant")]
        roles: list[Role] = [self._role(turn) for turn in turns]
        contents = [self._content(turn) for turn in turns]
        contents = ["" if said is None and role == "system" else said for role, said in zip(roles, contents, strict=True)]
        if system:
            roles.insert(0, "system")
            contents.insert(0, system)
        self._check_roles(roles)
        items = [self._items(content, role) for role, content in zip(roles, contents, strict=True)]
        for role, turn in zip(roles, items, strict=True):
            if role != "user" and any(not isinstance(item, Text) for item in turn):
                raise self._bad(f"media in a turn of role {role!r}; only the user shows media", "placeholder_mismatch")
        first = items[roles.index("user")]
        first[:0] = self._unmarked(items, several=question_answer)
        messages = tuple(Message(role, parts) for role, parts in zip(roles, self._filled(items), strict=True))
        for number, message in enumerate(messages):
            if message.role == "assistant" and not message.text.strip():
                raise self._bad(f"answer {number} is empty", "empty_answer")
        return messages

    def _half(self, turn: dict[str, Any], role: Role) -> dict[str, Any]:
        if role not in turn:
            raise self._bad(f"a pair of `texts` must have user and assistant, got {short(turn)}")
        return {"role": role, "content": turn[role]}

    def _role(self, turn: dict[str, Any]) -> Role:
        name = turn.get("from", turn.get("role"))
        if not isinstance(name, str) or name not in ROLES:
            raise self._bad(f"unknown role {short(name)}; roles are {', '.join(ROLES)}", "bad_roles")
        return ROLES[name]

    def _content(self, turn: dict[str, Any]) -> Any:
        self._check_keys(turn)
        for key in ("loss", "weight"):
            if turn.get(key) not in (None, True, 1):
                raise self._bad(f"a turn has {key} {short(turn[key])}; every answer of a row is trained alike")
        return turn.get("value", turn.get("content"))

    def _check_roles(self, roles: list[Role]) -> None:
        """At most one system turn, first; then user and assistant in turn, the assistant last."""
        spoken = roles[1:] if roles[:1] == ["system"] else roles
        if not spoken or len(spoken) % 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
            names = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "") if roles else "none"
            raise self._bad(f"roles must alternate from user to assistant, got {names}", "bad_roles")

    # -- what a turn says and shows

    def _items(self, content: Any, role: Role) -> list[Part | _Slot]:
        """A turn's texts, media and slots in order. Marks count in the user's texts alone, for kinds that the row has."""
        if isinstance(content, str):
            found = pieces(content, [kind for kind, refs in self.media if refs and role == "user"])
            return [item for text, kind in found for item in ([Text(text), _Slot(kind)] if kind else [Text(text)])]
        if not is_list(content):
            raise self._bad(f"a turn's text must be a string, got {short(content)}")
        return open_lines([self._item(part) for part in content])

    def _item(self, part: Any) -> Part | _Slot:
        """One entry of an OpenAI content list; `{"type": "image"}` alone stands for the next of the row's images."""
        kind = part.get("type") if is_object(part) else None
        if not isinstance(kind, str) or kind not in PART_KINDS:
            raise self._bad(f"a content part must be text, image_url or video_url, got {short(part)}")
        value = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
        if kind == "text":
            if not isinstance(value, str):
                raise self._bad(f"the text of a content part must be a string, got {short(part)}")
            return Text(value)
        medium: MediumKind = "image" if kind.startswith("image") else "video"
        if value is None and kind == medium:
            number = part.get("index")
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise self._bad(f"the index of a content part must be an integer, got {short(part)}")
            return _Slot(medium, number)
        return self._image(value) if medium == "image" else self._video(value)

    def _unmarked(self, items: list[list[Part | _Slot]], *, several: bool) -> list[Part | _Slot]:
        """Slots before the first question for media of a kind that no mark shows: one medium, or with `several` any number."""
        slots: list[Part | _Slot] = []
        for kind, refs in self.media:
            marked = any(isinstance(item, _Slot) and item.kind == kind for turn in items for item in turn)
            if not marked and (len(refs) == 1 or several):
                slots += [_Slot(kind), Text("\n")] * len(refs)
        return slots

    def _filled(self, turns: list[list[Part | _Slot]]) -> list[tuple[Part, ...]]:
        """Put the row's media where the turns show them, each exactly once, and join neighboring texts."""
        slots = [item for items in turns for item in items if isinstance(item, _Slot)]
        queues: dict[str, Iterator[Part]] = {}
        for kind, refs in self.media:
            numbers = [slot.number for slot in slots if slot.kind == kind]
            if len(numbers) != len(refs):
                counts = f"{len(numbers)} <{kind}> marks but {len(refs)} {kind}s"
                remedy = f"\\<{kind}> is the letters" if len(numbers) > len(refs) else "mark the place of each"
                raise self._bad(f"{counts}; {remedy}", "placeholder_mismatch")
            if any(number is not None for number in numbers):
                if sorted(-1 if n is None else n for n in numbers) != list(range(len(refs))):
                    raise self._bad(f"{kind} indexes {short(numbers)} of {len(refs)} {kind}s", "placeholder_mismatch")
                refs = [refs[number] for number in numbers if number is not None]
            queues[kind] = iter(refs)
        return [_joined(next(queues[item.kind]) if isinstance(item, _Slot) else item for item in items) for items in turns]

    # -- media

    def _read_media(self) -> None:
        self.clip = self._clip(self.row.get("clip"))
        images = [self._image(ref) for ref in self._refs("image")]
        self.media = [("image", images), ("video", [self._video(ref) for ref in self._refs("video")])]

    def _refs(self, kind: MediumKind) -> list[Any]:
        row = self.row
        keys = [key for key in (kind, f"{kind}s") if not is_empty(row.get(key))]
        given: list[list[Any]] = [row[key] if is_list(row[key]) else [row[key]] for key in keys]
        if len(given) == 2 and list(given[0]) != list(given[1]):
            raise self._bad(f"both `{kind}` and `{kind}s` are given, and they differ; keep one")
        refs = given[0] if given else []
        for ref in refs:
            if not isinstance(ref, str | bytes | dict) or not ref:
                raise self._bad(f"`{keys[0]}` must be a path or a list of paths, got {short(row[keys[0]])}")
        return refs

    def _clip(self, clip: Any) -> tuple[float, float] | None:
        """[start, end] in seconds."""
        if is_empty(clip):
            return None
        numbers = is_list(clip) and len(clip) == 2 and all(type(value) in (int, float) for value in clip)
        if not numbers or not 0 <= clip[0] < clip[1] < 1e9:
            raise self._bad(f"`clip` must be [start, end] in seconds with 0 <= start < end, got {short(clip)}")
        return float(clip[0]), float(clip[1])

    def _image(self, ref: Any) -> ImageRef:
        """A path, a data URL, encoded bytes, or an object with one of them under `bytes`, `path` or `url`."""
        if is_object(ref):
            ref = next((ref[key] for key in ("bytes", "path", "url") if ref.get(key) is not None), None)
        if isinstance(ref, bytes) and ref:
            return ImageRef(ref)
        if not isinstance(ref, str) or not ref:
            raise self._bad(f"an image must be a path, a data URL or encoded bytes, got {short(ref)}")
        return ImageRef(data_of(ref, self.source) if ref.startswith("data:") else self._path(ref))

    def _video(self, ref: Any) -> VideoRef:
        if is_object(ref) and ref.get("bytes") is None:
            ref = next((ref[key] for key in ("path", "url") if ref.get(key) is not None), None)
        if not isinstance(ref, str) or not ref or ref.startswith("data:"):
            raise self._bad(f"a video must be a path, got {short(ref)}")
        return VideoRef(self._path(ref), clip=self.clip)

    def _path(self, ref: str) -> str:
        if ref.startswith("file://"):
            ref = ref.removeprefix("file://").removeprefix("localhost")
            ref = ref if os.path.exists(self.root / ref) else unquote(ref)  # noqa: PTH110, never raises
        elif "://" in ref:
            raise self._bad(f"remote media are not fetched: {short(ref)}; download it first", "missing_media")
        if "\0" in ref:
            raise self._bad(f"not a path: {short(ref)}", "missing_media")
        if is_bare_base64(ref):
            raise self._bad(f"base64 without a prefix; write data:image/jpeg;base64,... ({short(ref, 30)})", "missing_media")
        if os.name == "posix" and re.match(r"/?[A-Za-z]:[/\\]|\\\\", ref):
            raise self._bad(f"{short(ref)} is on a drive of Windows; write paths below the root", "missing_media")
        if os.name == "posix" and "\\" in ref and not os.path.exists(self.root / ref):  # noqa: PTH110, never raises
            ref = ref.replace("\\", "/")  # as Windows writes paths
        # A trailing slash marks a folder of frames; Path would drop it.
        return str(self.root / ref) + ("/" if ref.endswith("/") else "")


def _joined(parts: Iterator[Part]) -> tuple[Part, ...]:
    """Neighboring texts as one, without empty texts."""
    joined: list[Part] = []
    for part in parts:
        if not isinstance(part, Text):
            joined.append(part)
        elif joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + part.text)
        elif part.text:
            joined.append(part)
    return tuple(joined)
