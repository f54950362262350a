"""The images and videos of a row, and the marks in its turns that show them. No media is opened here."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ivl.errors import DataError, short
from ivl.types import ImageRef, Part, Role, Text, VideoRef

Medium = Literal["image", "video"]
MARK = re.compile("<(image|video)>")
"""Stands for the next image or video where it occurs in a user's text."""
PART_KINDS = ("text", "image_url", "image", "video_url", "video")


@dataclass(frozen=True)
class Slot:
    """A place in a turn that shows the next medium of its kind, or the one of this number."""

    kind: str
    number: int | None = None


class RowMedia:
    """The media that the marks of a row stand for.

    Raises:
        DataError: for values that are no media, remote addresses, and data URLs that cannot be read.
    """

    def __init__(self, row: dict[str, Any], *, source: str, root: Path) -> None:
        self.source, self.root = source, root
        self.span = self._clip(row.get("clip"))
        self.images = [self.image(ref) for ref in self._refs(row, "image")]
        self.videos = [self.video(ref) for ref in self._refs(row, "video")]

    def _refs(self, row: dict[str, Any], kind: Medium) -> list[Any]:
        given = [key for key in (kind, f"{kind}s") if row.get(key) not in (None, [])]
        if len(given) == 2 and row[given[0]] != row[given[1]]:
            raise DataError(self.source, "bad_row", f"both `{kind}` and `{kind}s` are given, and they differ; keep one")
        value = row[given[0]] if given else []
        refs = value if isinstance(value, list) else [value]
        for ref in refs:
            if not isinstance(ref, str | bytes | dict) or not ref:
                raise DataError(self.source, "bad_row", f"`{given[0]}` must be a path or a list of paths, got {short(value)}")
        return refs

    def _clip(self, clip: Any) -> tuple[float, float] | None:
        """[start, end] in seconds."""
        if clip is None:
            return None
        try:
            start, end = (_number(value) for value in clip)
        except (TypeError, ValueError, OverflowError):
            raise DataError(self.source, "bad_row", f"`clip` must be [start, end] in seconds, got {short(clip)}") from None
        if not 0 <= start < end:
            raise DataError(self.source, "bad_row", f"`clip` must be [start, end] with 0 <= start < end, got {short(clip)}")
        return start, end

    def image(self, ref: Any) -> ImageRef:
        """A path, a data URL, encoded bytes, or an object with one of them under `bytes`, `path` or `url`."""
        if isinstance(ref, dict):
            ref = next((ref[key] for key in ("bytes", "path", "url") if ref.get(key) is not None), None)
        if isinstance(ref, bytes) and ref:
            return ImageRef(ref)
        if not isinstance(ref, str) or not ref:
            raise DataError(self.source, "bad_row", f"an image must be a path, a data URL or encoded bytes, got {short(ref)}")
        return ImageRef(self._decode(ref) if ref.startswith("data:") else self.path(ref))

    def _decode(self, url: str) -> bytes:
        head, comma, body = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise DataError(self.source, "undecodable_media", f"not a base64 data URL: {short(url)}")
        try:
            data = base64.b64decode(body, validate=True)
        except ValueError as error:  # binascii.Error, and letters outside ASCII
            raise DataError(self.source, "undecodable_media", f"image data URL is not base64 ({error})") from None
        if not data:
            raise DataError(self.source, "undecodable_media", f"the data URL holds nothing: {short(url)}")
        return data

    def video(self, ref: Any) -> VideoRef:
        if isinstance(ref, dict) and ref.get("bytes") is None:
            ref = next((ref[key] for key in ("path", "url") if ref.get(key) is not None), None)
        if not isinstance(ref, str) or not ref or ref.startswith("data:"):
            raise DataError(self.source, "bad_row", f"a video must be a path, got {short(ref)}")
        return VideoRef(self.path(ref), clip=self.span)

    def path(self, ref: str) -> str:
        if ref.startswith("file://"):
            ref = ref.removeprefix("file://")
        elif "://" in ref:
            raise DataError(self.source, "missing_media", f"remote media are not fetched: {short(ref)}; download it first")
        if "\0" in ref:
            raise DataError(self.source, "missing_media", f"not a path: {short(ref)}")
        # A trailing slash marks a folder of frames; Path would drop it.
        return str(self.root / ref) + ("/" if ref.endswith("/") else "")

    def items(self, content: Any, role: Role) -> list[Part | Slot]:
        """What a turn says and shows, in order. Marks count in the user's texts only."""
        if isinstance(content, str):
            return list(_split(content)) if role == "user" else [Text(content)]
        if not isinstance(content, list):
            raise DataError(self.source, "bad_row", f"a turn's text must be a string, got {short(content)}")
        return [self._item(part) for part in content]

    def _item(self, part: Any) -> Part | Slot:
        """One entry of an OpenAI content list; `{"type": "image"}` alone stands for the next of the row's images."""
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in PART_KINDS:
            raise DataError(self.source, "bad_row", f"a content part must be text, image_url or video_url, got {short(part)}")
        value = part.get(kind)
        if kind == "text":
            if not isinstance(value, str):
                raise DataError(self.source, "bad_row", f"the text of a content part must be a string, got {short(part)}")
            return Text(value)
        medium: Medium = "image" if kind.startswith("image") else "video"
        if value is None and kind == medium:
            number = part.get("index")
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise DataError(self.source, "bad_row", f"the index of a content part must be an integer, got {short(part)}")
            return Slot(medium, number)
        return self.image(value) if medium == "image" else self.video(value)

    def fill(self, turns: list[list[Part | Slot]]) -> list[tuple[Part, ...]]:
        """Put the row's media where the turns show them, each exactly once, and join neighbouring texts."""
        slots = [item for items in turns for item in items if isinstance(item, Slot)]
        queues: dict[str, Iterator[Part]] = {}
        media: tuple[tuple[str, list[Any]], ...] = (("image", self.images), ("video", self.videos))
        for kind, refs in media:
            numbers = [slot.number for slot in slots if slot.kind == kind]
            if len(numbers) != len(refs):
                raise DataError(
                    self.source, "placeholder_mismatch", f"{len(numbers)} <{kind}> marks but {len(refs)} {kind}s"
                )  # fmt: skip
            if any(number is not None for number in numbers):
                if sorted(-1 if n is None else n for n in numbers) != list(range(len(refs))):
                    raise DataError(
                        self.source, "placeholder_mismatch", f"{kind} indexes {short(numbers)} of {len(refs)} {kind}s"
                    )
                refs = [refs[number] for number in numbers if number is not None]
            queues[kind] = iter(refs)
        return [_join(next(queues[item.kind]) if isinstance(item, Slot) else item for item in items) for items in turns]


def _split(text: str) -> Iterator[Text | Slot]:
    at = 0
    for match in MARK.finditer(text):
        yield Text(text[at : match.start()])
        yield Slot("image" if match.group() == "<image>" else "video")
        at = match.end()
    yield Text(text[at:])


def _join(parts: Iterator[Part]) -> tuple[Part, ...]:
    """One text where several stand together, none where it is empty."""
    joined: list[Part] = []
    for part in parts:
        if not isinstance(part, Text):
            joined.append(part)
        elif joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + part.text)
        elif part.text:
            joined.append(part)
    return tuple(joined)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError
    return float(value)
