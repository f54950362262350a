"""Record -> row of a file: the inverse of ivl.data.records."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ivl.formats.writers import WrittenLayout, medium_value, refused
from ivl.processing.chat import open_lines
from ivl.types import Conversation, ImageRef, Message, Record, Text, VideoRef

MediumValue = Callable[[ImageRef | VideoRef, str], Any]
"""Takes a medium and the record's source; returns what stands for the medium in the row."""


def from_record(record: Record, *, layout: WrittenLayout = "reference", medium: MediumValue | None = None) -> dict[str, Any]:
    """Make the row that `to_record` reads back as the same Record, given that paths are absolute or root is "".

    The id is left out where it is only the record's source.

    Args:
        layout: the keys that the row gets.
        medium: returns what stands for an image or a video in the row; by default its path, or a data URL for bytes.

    Raises:
        DataError: naming the record's source and what the layout cannot hold.
    """
    row: dict[str, Any] = {} if record.id == record.source else {"id": record.id}
    shown = [_media(conversation) for conversation in record.conversations]
    _check(record, [ref for refs in shown for ref in refs])
    value_of: MediumValue = medium or (lambda ref, _: medium_value(ref))
    if layout == "openai":
        conversations = [[_openai_turn(message, record.source, value_of) for message in each] for each in record.conversations]
    else:
        _check_marks(record, shown, layout)
        images, videos = ([value_of(ref, record.source) for ref in refs] for refs in _by_kind(shown[0]))
        row |= _columns(images, videos, layout)
        kinds = [kind for kind, refs in (("image", images), ("video", videos)) if refs]
        conversations = [[_marked_turn(message, layout, kinds) for message in each] for each in record.conversations]
    clips = [ref.clip for refs in shown for ref in refs if isinstance(ref, VideoRef) and ref.clip is not None]
    if clips:
        row["clip"] = list(clips[0])
    key = "messages" if layout in ("openai", "swift") else "conversations"
    if record.is_pair:
        chosen, rejected = conversations
        return row | {key: chosen[:-1], "chosen": chosen[-1], "rejected": rejected[-1]}
    return row | {key: conversations[0] if len(conversations) == 1 else conversations}


def _media(conversation: Conversation) -> list[ImageRef | VideoRef]:
    return [part for message in conversation for part in message.content if not isinstance(part, Text)]


def _by_kind(refs: list[ImageRef | VideoRef]) -> tuple[list[ImageRef], list[VideoRef]]:
    return [ref for ref in refs if isinstance(ref, ImageRef)], [ref for ref in refs if isinstance(ref, VideoRef)]


def _check(record: Record, refs: list[ImageRef | VideoRef]) -> None:
    """Refuse what no layout can hold."""
    images, videos = _by_kind(refs)
    if any(not isinstance(ref.source, str | bytes) for ref in images):
        raise refused(record.source, "a picture in memory; save it first")
    if any(ref.max_tiles is not None for ref in images):
        raise refused(record.source, "an image with a tile budget of its own")
    if any(ref.num_frames is not None or ref.frames_by != "index" for ref in videos):
        raise refused(record.source, "a video with a number or choice of frames of its own")
    if len({ref.clip for ref in videos}) > 1:
        raise refused(record.source, "videos of different clips")


def _check_marks(record: Record, shown: list[list[ImageRef | VideoRef]], layout: str) -> None:
    """Refuse what layouts with <image> marks cannot hold."""
    if any(_by_kind(refs) != _by_kind(shown[0]) for refs in shown):
        raise refused(record.source, "conversations that show different media", layout)
    for conversation in record.conversations:
        for before, part in (pair for message in conversation for pair in pairwise(message.content)):
            if isinstance(before, Text) and before.text.endswith("\\") and not isinstance(part, Text):
                raise refused(record.source, "a backslash right before an image or video", layout)


def _columns(images: list[Any], videos: list[Any], layout: str) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for key, values in (("image", images), ("video", videos)):
        if values and layout == "reference":
            columns[key] = values[0] if len(values) == 1 else values
        elif values:
            columns[f"{key}s"] = values
    return columns


def _marked_turn(message: Message, layout: str, kinds: list[str]) -> dict[str, str]:
    """A turn as text with marks; letters that would be one of a kind that the row has get a backslash."""
    marks = {ImageRef: "<image>", VideoRef: "<video>"}
    text = ""
    for part in message.content:
        if not isinstance(part, Text):
            text += marks[type(part)]
        elif message.role == "user" and kinds:
            text += re.sub(f"<({'|'.join(kinds)})>", r"\\\g<0>", part.text)
        else:
            text += part.text
    if layout == "swift":
        return {"role": message.role, "content": text}
    return {"from": {"user": "human", "assistant": "gpt"}.get(message.role, message.role), "value": text}


def _openai_turn(message: Message, source: str, value_of: MediumValue) -> dict[str, Any]:
    if all(isinstance(part, Text) for part in message.content):
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = []
    if open_lines(message.content) != list(message.content):  # an empty text keeps readers from adding new lines
        parts.append({"type": "text", "text": ""})
    for part in message.content:
        if isinstance(part, Text):
            parts.append({"type": "text", "text": part.text})
        else:
            kind = "image_url" if isinstance(part, ImageRef) else "video_url"
            parts.append({"type": kind, kind: {"url": value_of(part, source)}})
    return {"role": message.role, "content": parts}
