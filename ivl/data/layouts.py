"""A Record as a row: the other direction of ivl.data.records."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, Literal

from ivl.data.media import MARK
from ivl.data.pairs import from_conversations
from ivl.errors import DataError
from ivl.types import Conversation, ImageRef, Message, Record, Text, VideoRef

Written = Literal["reference", "openai", "sharegpt", "swift"]
"""Layouts that rows are written in."""

SUFFIXES = (
    (b"\x89PNG", "png"),
    (b"\xff\xd8", "jpeg"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)


def from_record(
    record: Record, *, layout: Written = "reference", medium: Callable[[ImageRef | VideoRef], Any] | None = None
) -> dict[str, Any]:
    """The row of a Record: what `to_record` reads back as the same Record, given that paths are absolute or root is "".

    The id is left out where it is only the record's source.

    Args:
        medium: what stands for an image or a video in the row; by default its path, and a data URL where it is bytes.

    Raises:
        DataError: naming the record's source and what the layout cannot hold.
    """
    row: dict[str, Any] = {} if record.id == record.source else {"id": record.id}
    shown = [_media(conversation) for conversation in record.conversations]
    _check(record, [ref for refs in shown for ref in refs])
    convert = medium or medium_value
    if layout == "openai":
        talks = [[_openai_turn(message, convert) for message in talk] for talk in record.conversations]
    else:
        if any(_sorted(refs) != _sorted(shown[0]) for refs in shown):
            raise refused(record, "conversations that show different media", layout)
        if any(_has_mark(message) for talk in record.conversations for message in talk):
            raise refused(record, "a question whose text itself says <image> or <video>", layout)
        images, videos = _sorted(shown[0])
        row |= _columns([convert(ref) for ref in images], [convert(ref) for ref in videos], layout)
        talks = [[_marked_turn(message, layout) for message in talk] for talk in record.conversations]
    clips = [ref.clip for refs in shown for ref in refs if isinstance(ref, VideoRef) and ref.clip is not None]
    if clips:
        row["clip"] = list(clips[0])
    key = "messages" if layout in ("openai", "swift") else "conversations"
    row[key] = talks[0] if len(talks) == 1 else talks
    return from_conversations(row, key) if record.is_pair else row


def medium_value(ref: ImageRef | VideoRef) -> str:
    """A path, or a data URL."""
    if isinstance(ref.source, bytes):
        return f"data:image/{image_suffix(ref.source)};base64,{base64.b64encode(ref.source).decode()}"
    return str(ref.source)


def image_suffix(data: bytes) -> str:
    """`png`, `jpeg`, ... by the first bytes; `bin` for what is no known image."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in SUFFIXES if data.startswith(magic)), "bin")


def _media(conversation: Conversation) -> list[ImageRef | VideoRef]:
    return [part for message in conversation for part in message.content if not isinstance(part, Text)]


def _sorted(refs: list[ImageRef | VideoRef]) -> tuple[list[ImageRef], list[VideoRef]]:
    return [ref for ref in refs if isinstance(ref, ImageRef)], [ref for ref in refs if isinstance(ref, VideoRef)]


def _check(record: Record, refs: list[ImageRef | VideoRef]) -> None:
    """What no row can say, in any layout."""
    images, videos = _sorted(refs)
    if any(not isinstance(ref.source, str | bytes) for ref in images):
        raise refused(record, "a picture in memory; save it first")
    if any(ref.max_tiles is not None for ref in images):
        raise refused(record, "an image with a tile budget of its own")
    if any(ref.num_frames is not None for ref in videos):
        raise refused(record, "a video with a number of frames of its own")
    if len({ref.clip for ref in videos}) > 1:
        raise refused(record, "videos of different clips")


def refused(record: Record, what: str, layout: str | None = None) -> DataError:
    """The error of a record that a layout cannot hold."""
    return DataError(record.source, "bad_row", f"a row{f' of {layout} layout' if layout else ''} cannot hold {what}")


def _has_mark(message: Message) -> bool:
    return message.role == "user" and any(isinstance(part, Text) and MARK.search(part.text) for part in message.content)


def _columns(images: list[Any], videos: list[str], layout: str) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for key, values in (("image", images), ("video", videos)):
        if values and layout == "reference":
            columns[key] = values[0] if len(values) == 1 else values
        elif values:
            columns[f"{key}s"] = values
    return columns


def _marked_turn(message: Message, layout: str) -> dict[str, str]:
    marks = {ImageRef: "<image>", VideoRef: "<video>"}
    text = "".join(part.text if isinstance(part, Text) else marks[type(part)] for part in message.content)
    if layout == "swift":
        return {"role": message.role, "content": text}
    return {"from": {"user": "human", "assistant": "gpt"}.get(message.role, message.role), "value": text}


def _openai_turn(message: Message, convert: Callable[[ImageRef | VideoRef], Any]) -> dict[str, Any]:
    media = any(not isinstance(part, Text) for part in message.content)
    if not media and not _has_mark(message):
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, Text):
            parts.append({"type": "text", "text": part.text})
        elif isinstance(part, ImageRef):
            parts.append({"type": "image_url", "image_url": {"url": convert(part)}})
        else:
            parts.append({"type": "video_url", "video_url": {"url": convert(part)}})
    return {"role": message.role, "content": parts}
