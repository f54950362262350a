"""One row of a file -> Record: reference jsonl, LLaVA json, OpenAI messages (spec 3.2). No media is opened here.

A row may hold several conversations about the same media, as a list of lists (our extension): they become one Record,
share tiles and never see each other.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

from ivl.errors import InputError
from ivl.types import Conversation, ImageRef, Message, Part, Record, Role, Text, VideoRef

Kind = Literal[
    "broken_json", "bad_row", "bad_roles", "empty_answer", "placeholder_mismatch",
    "missing_media", "undecodable_media", "too_long", "nothing_trained",
]  # fmt: skip
"""What can be wrong with a row; the report counts by these."""

ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
}  # fmt: skip
MARK = re.compile("<image>|<video>")


class DataError(InputError):
    """A bad row. The message starts with `file:line`; `kind` is what the report counts it as."""

    kind: Kind

    def __init__(self, source: str, kind: Kind, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source, self.kind, self.problem = source, kind, problem

    def __reduce__(self) -> tuple[type[DataError], tuple[str, Kind, str]]:
        return DataError, (self.source, self.kind, self.problem)


def to_record(text: bytes, *, source: str, root: Path, dataset: str = "") -> Record:
    """Read one row. Relative media paths are taken from `root`.

    Raises:
        DataError: naming `source` (a `file:line`), for broken JSON, wrong roles, empty answers, or marks and media that do
            not agree in number.
    """
    try:
        row = json.loads(text)
        _check_surrogates(text, row)
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise DataError(source, "broken_json", f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(source, "bad_row", f"expected an object, got {type(row).__name__}")
    key = next((key for key in ("conversations", "messages") if key in row), None)
    if key is None:
        raise DataError(source, "bad_row", f"neither `conversations` nor `messages` among the keys {sorted(row)}")
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise DataError(source, "bad_row", f"`{key}` must be a list of turns, got {_short(turns)}")
    media = _Media(row, source=source, root=root)
    nested = turns if isinstance(turns[0], list) else [turns]
    return Record(
        id=source if row.get("id") is None else str(row["id"]),
        conversations=tuple(_conversation(each, media, source) for each in nested),
        source=source,
        dataset=dataset,
    )


def describe(container: Literal["json", "jsonl"], first_row: bytes) -> str:
    """The format of a file in a few words, for people. Every row is read by its own keys, whatever the first one has."""
    try:
        row = json.loads(first_row)
    except (ValueError, RecursionError):
        row = None
    keys = row if isinstance(row, dict) else {}
    if "conversations" in keys:
        return "reference jsonl" if container == "jsonl" else "LLaVA json"
    return f"OpenAI messages {container}" if "messages" in keys else f"{container} of unknown rows"


def _check_surrogates(text: bytes, row: Any) -> None:
    """Half of a surrogate pair, written as an escape, is valid JSON but no text; raises UnicodeEncodeError."""
    if b"\\ud" in text or b"\\uD" in text:
        json.dumps(row, ensure_ascii=False).encode()


class _Media:
    """The images and videos that the marks of a row stand for."""

    def __init__(self, row: dict[str, Any], *, source: str, root: Path) -> None:
        self.source, self.root = source, root
        self.images = [self.image(ref) for ref in self._refs(row, "image", "images")]
        clip = row.get("clip")
        if clip is not None and not (isinstance(clip, list) and len(clip) == 2 and all(_is_number(x) for x in clip)):
            raise DataError(source, "bad_row", f"`clip` must be [start, end] in seconds, got {_short(clip)}")
        span = (float(clip[0]), float(clip[1])) if clip else None
        self.videos = [VideoRef(self.path(ref), clip=span) for ref in self._refs(row, "video", "videos")]

    def _refs(self, row: dict[str, Any], *keys: str) -> list[str]:
        value = next((row[key] for key in keys if row.get(key) is not None), [])
        refs = [value] if isinstance(value, str) else value
        if not isinstance(refs, list) or not all(isinstance(ref, str) and ref for ref in refs):
            raise DataError(self.source, "bad_row", f"`{keys[0]}` must be a path or a list of paths, got {_short(value)}")
        return refs

    def image(self, url: str) -> ImageRef:
        if url.startswith("data:"):
            head, comma, body = url.partition(",")
            if not comma or not head.endswith(";base64"):
                raise DataError(self.source, "undecodable_media", f"not a base64 data URL: {_short(url)}")
            try:
                return ImageRef(base64.b64decode(body, validate=True))
            except binascii.Error as error:
                raise DataError(self.source, "undecodable_media", f"image data URL is not base64 ({error})") from None
        return ImageRef(self.path(url))

    def path(self, ref: str) -> str:
        if ref.startswith("file://"):
            ref = ref.removeprefix("file://")
        elif "://" in ref:
            raise DataError(self.source, "missing_media", f"remote media are not fetched: {_short(ref)}; download it first")
        if "\0" in ref:
            raise DataError(self.source, "missing_media", f"not a path: {_short(ref)}")
        # A trailing slash marks a folder of frames; Path would drop it.
        return str(self.root / ref) + ("/" if ref.endswith("/") else "")


def _conversation(turns: Any, media: _Media, source: str) -> Conversation:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(source, "bad_row", f"a conversation must be a list of turns, got {_short(turns)}")
    roles: list[Role] = [_role(turn, source) for turn in turns]
    _check_roles(roles, source)
    contents = [turn.get("value", turn.get("content")) for turn in turns]
    whole = _prepend_marks(roles, contents, media, source)
    images, videos = iter(media.images), iter(media.videos)
    messages = []
    for role, content in zip(roles, whole, strict=True):
        if isinstance(content, list):
            parts = tuple(_part(part, media, source) for part in content)
        elif role == "user":
            parts = tuple(_split(content, images, videos))
        else:
            parts = (Text(content),)
        message = Message(role, parts)
        if role == "assistant" and not message.text.strip():
            raise DataError(source, "empty_answer", f"answer {len(messages)} is empty")
        if role != "user" and any(not isinstance(part, Text) for part in parts):
            raise DataError(source, "placeholder_mismatch", f"media in a turn of role {role!r}; only the user shows media")
        messages.append(message)
    return tuple(messages)


def _role(turn: dict[str, Any], source: str) -> Role:
    name = turn.get("from", turn.get("role"))
    if not isinstance(name, str) or name not in ROLES:
        raise DataError(source, "bad_roles", f"unknown role {_short(name)}; roles are {', '.join(ROLES)}")
    return ROLES[name]


def _check_roles(roles: list[Role], source: str) -> None:
    """At most one system turn, first; then user and assistant in turn, the assistant last."""
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise DataError(source, "bad_roles", f"roles must alternate from user to assistant, got {', '.join(roles) or 'none'}")


def _prepend_marks(roles: list[Role], contents: list[Any], media: _Media, source: str) -> list[Any]:
    """Count the marks against the media; a lone image or video without a mark stands before the first question."""
    for content in contents:
        if not isinstance(content, str | list):
            raise DataError(source, "bad_row", f"a turn's text must be a string, got {_short(content)}")
    contents = list(contents)
    # Reversed, so that when both lack a mark the image comes first.
    for mark, refs in (("<video>", media.videos), ("<image>", media.images)):
        in_user = [
            content for role, content in zip(roles, contents, strict=True) if role == "user" and isinstance(content, str)
        ]
        num_marks = sum(content.count(mark) for content in in_user)
        if num_marks == 0 and len(refs) == 1:
            first = roles.index("user")
            if isinstance(contents[first], str):
                contents[first] = f"{mark}\n{contents[first]}"
                num_marks = 1
        if num_marks != len(refs):
            raise DataError(source, "placeholder_mismatch", f"{num_marks} {mark} marks but {len(refs)} {mark[1:-1]}s")
    return contents


def _split(text: str, images: Iterable[ImageRef], videos: Iterable[VideoRef]) -> list[Part]:
    """Text with marks -> text and media, in order. The number of marks was checked before."""
    parts: list[Part] = []
    at = 0
    images, videos = iter(images), iter(videos)
    for match in MARK.finditer(text):
        if match.start() > at:
            parts.append(Text(text[at : match.start()]))
        parts.append(next(images) if match.group() == "<image>" else next(videos))
        at = match.end()
    if at < len(text):
        parts.append(Text(text[at:]))
    return parts


def _part(part: Any, media: _Media, source: str) -> Part:
    """One entry of an OpenAI content list."""
    kind = part.get("type") if isinstance(part, dict) else None
    value = cast(dict, part).get(kind) if kind else None
    if isinstance(value, dict):
        value = value.get("url")
    if kind not in ("text", "image_url", "image", "video_url", "video") or not isinstance(value, str):
        raise DataError(source, "bad_row", f"a content part must be text, image_url or video_url, got {_short(part)}")
    if kind == "text":
        return Text(value)
    return media.image(value) if kind.startswith("image") else VideoRef(media.path(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
