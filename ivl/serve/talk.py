"""A visitor's conversation: from what is typed and dropped into the page to what it shows, again and again as a reply grows."""

from __future__ import annotations

import asyncio
import re
import secrets
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ivl.errors import InputError
from ivl.processing.boxes import draw_boxes, parse_boxes
from ivl.processing.chat import marked, user
from ivl.processing.image import load_image
from ivl.serve.answers import facts, known
from ivl.serve.config import ServeConfig
from ivl.serve.guard import Note, log
from ivl.serve.inspect import check_image, check_video
from ivl.serve.limits import MediaError
from ivl.serve.problems import Problem
from ivl.serve.service import Service, Stream
from ivl.types import VIDEO_SUFFIXES, Conversation, ImageRef, Message, SamplingParams, Text, VideoRef

UPDATES_PER_SECOND = 20
"""The page is redrawn at most so often."""
MAX_TILES_SHOWN = 64
LARGEST_DRAWN = 1600
"""Pixels a side of a picture with boxes; a page has no use for more."""
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)


@dataclass(eq=False)
class Session:
    """One visitor's conversation, kept on the server and changed in place, so that pictures are sent once."""

    messages: Conversation = ()
    shown: list[dict[str, Any]] = field(default_factory=list)
    """The chat on the page."""
    turn: int = 0
    """Counts questions and new beginnings, so that a reply knows when it is no longer wanted."""
    stopped: bool = False
    stream: Stream | None = None

    @property
    def num_bytes(self) -> int:
        return sum(len(ref.source) for ref in media(self.messages) if isinstance(ref.source, bytes))

    def stop(self) -> None:
        """End the reply that is being written; what was said stays."""
        self.stopped = True
        if self.stream is not None:
            self.stream.cancel()

    def clear(self) -> None:
        """Begin anew."""
        self.stop()
        self.turn += 1
        self.messages, self.shown = (), []


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a question is answered."""

    params: SamplingParams
    max_tiles: int
    """Most tiles of a picture."""
    num_frames: int
    """Frames taken from a video."""
    system: str = ""
    """Replaces the model's own system message."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What changes on the page; None stays as it is."""

    status: str
    """Markdown in one line."""
    chat: list[dict[str, Any]] | None = None
    tiles: list[tuple[Image.Image, str]] | None = None
    taken: bool | None = None
    """True: the question is in the chat, so its box can be emptied. False: it goes back into the box."""
    running: bool = True


class Talk:
    """Questions to one service. uploads: where files that visitors sent are, and pictures with boxes are put. finished: told
    about every reply, as about requests."""

    def __init__(
        self, service: Service, config: ServeConfig, uploads: Path, finished: Callable[[Note], None] = lambda note: None
    ) -> None:
        self.service, self.config, self.uploads, self.finished = service, config, uploads.resolve(), finished
        self.sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    async def ask(self, text: str, files: list[str], session: Session, settings: Settings) -> AsyncIterator[View]:
        """The page as the reply grows. Whatever cannot be answered becomes a status line; then the question is not taken, and
        the conversation stays as it was."""
        self.sessions.add(session)
        session.turn += 1
        turn, session.stopped = session.turn, False
        note = Note(route="page", status=499)
        yield View(status="Reading …")
        try:
            message = await asyncio.to_thread(self.message, text.strip(), [Path(file) for file in files], settings)
            messages = (*session.messages, message)
            self.check(messages, session)
            system = (Message("system", (Text(settings.system.strip()),)),) if settings.system.strip() else ()
            prompt = await self.service.away(lambda: self.service.processor.prompt((*system, *messages)))
            stream = await self.service.submit(prompt, settings.params)
        except Exception as error:
            yield View(status=_warning(error), running=False)
            return
        if turn != session.turn or session.stopped:
            stream.cancel()
            yield View(status="stopped", running=False)
            return
        session.stream = stream
        asked = [{"role": "user", "content": {"path": file}} for file in files]
        asked += [{"role": "user", "content": as_markdown(text)}] if text.strip() else []
        before, said, ended, failed = session.shown, "", "stopped", False
        shown = session.shown = [*before, *asked]
        try:
            yield View(chat=[*shown, _says("…")], status="Looking …", tiles=tiles_of(prompt.tiles_GSSC), taken=True)
            async for said, ended in growing(stream):  # noqa: B007 - the last value counts
                if turn != session.turn:
                    return
                yield View(chat=[*shown, _says(as_markdown(said))], status=tally(stream))
            line, note.status = f"{tally(stream)}{ENDINGS.get(ended, '')}", 200
        except Exception as error:
            line, failed, note.status = _warning(error), not said, known(error).status_code
        finally:  # a visitor who leaves closes this generator
            stream.cancel()
            note.facts |= facts([stream], 1, note.arrived)
            self.finished(note)
            if turn == session.turn:
                session.stream = None
                if failed:
                    session.shown = before
                else:
                    session.messages = (*messages, Message("assistant", (Text(said.strip()),)))
                    session.shown = [*shown, _says(as_markdown(said).strip() or "*(nothing)*")]
        if turn == session.turn:
            session.shown += await asyncio.to_thread(self.boxes, said, messages)
            yield View(chat=session.shown, status=line, taken=False if failed else None, running=False)

    def message(self, text: str, files: list[Path], settings: Settings) -> Message:
        """Files are checked as those of any request are."""
        if not text and not files:
            raise InputError("ask something first")
        if len(text) > self.config.max_text_chars:
            raise InputError(f"{len(text):,} characters of text, the limit is {self.config.max_text_chars:,}")
        found = [self.medium(file, settings) for file in files]
        return user(marked(text, found), *found)

    def medium(self, file: Path, settings: Settings) -> ImageRef | VideoRef:
        """Raises InputError for what cannot be read safely, or was never sent."""
        limits, is_video = self.config.media, file.suffix.lower() in VIDEO_SUFFIXES
        most = limits.max_video_bytes if is_video else limits.max_bytes
        try:
            if not file.resolve().is_relative_to(self.uploads):
                raise MediaError("only files that were sent to this page can be read", 403)
            if file.stat().st_size > most:
                raise MediaError(f"the file is larger than {most:,} bytes", 413)
            data = file.read_bytes()
        except OSError:
            raise MediaError("a file is no longer there: attach it again") from None
        if is_video:
            check_video(data, limits)
            return VideoRef(data, settings.num_frames)
        header = check_image(data, limits)
        animated = header.format == "GIF" and header.frames > 1
        return VideoRef(data, settings.num_frames) if animated else ImageRef(data, settings.max_tiles)

    def check(self, messages: Conversation, session: Session) -> None:
        """Raises InputError unless the conversation is within the limits of a request, and all of them within memory."""
        found = media(messages)
        images = sum(isinstance(ref, ImageRef) for ref in found)
        size = sum(len(ref.source) for ref in found if isinstance(ref.source, bytes))
        for count, limit, noun in (
            (len(messages), self.config.max_messages, "messages"),
            (images, self.config.max_images, "images"),
            (len(found) - images, self.config.max_videos, "videos"),
            (size, self.config.max_body_bytes, "bytes of pictures"),
        ):
            if count > limit:
                raise InputError(f"{count:,} {noun}, the limit of a conversation is {limit:,}: begin a new one")
        if size + sum(other.num_bytes for other in self.sessions if other is not session) > self.config.max_held_bytes:
            raise InputError("too many pictures are held for all visitors at this time: try again later")

    def boxes(self, said: str, messages: Conversation) -> list[dict[str, Any]]:
        """The last picture with the boxes of the reply, for the chat; nothing without boxes."""
        groundings = parse_boxes(said).groundings
        images = [ref for ref in media(messages) if isinstance(ref, ImageRef)]
        if not groundings or not images:
            return []
        path = self.uploads / f"{secrets.token_hex(16)}.webp"
        image = load_image(images[-1])
        image.thumbnail((LARGEST_DRAWN, LARGEST_DRAWN))
        draw_boxes(image, groundings).save(path, quality=90)
        phrases = ", ".join(grounding.phrase for grounding in groundings if grounding.phrase)
        return [{"role": "assistant", "content": {"path": str(path), "alt_text": f"boxes: {phrases}"}}]


ENDINGS = {"length": " · cut at the longest reply", "stopped": " · stopped"}


def media(messages: Conversation) -> list[ImageRef | VideoRef]:
    return [part for message in messages for part in message.content if not isinstance(part, Text)]


def tiles_of(tiles_GSSC: Any) -> list[tuple[Image.Image, str]]:
    """The tiles as the ViT gets them."""
    total = len(tiles_GSSC)
    return [(Image.fromarray(tile.numpy()), f"{n} of {total}") for n, tile in enumerate(tiles_GSSC[:MAX_TILES_SHOWN], 1)]


def as_markdown(text: str) -> str:
    """Tags are shown as text, since a browser would drop those that it does not know; code stays as it is."""
    parts = _CODE.split(text)  # text, code, text, ...
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def _says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _warning(error: Exception) -> str:
    problem = known(error)
    if not isinstance(error, InputError | Problem):
        log.error("page failed", exc_info=error)
    return f"⚠ {as_markdown(problem.message)}"


async def growing(stream: Stream) -> AsyncIterator[tuple[str, str]]:
    """The reply so far and how it ended, not more often than a page can be redrawn; once more at the end."""
    said, ended, last = "", "stopped", 0.0
    clock = asyncio.get_running_loop().time
    async for delta in stream:
        said += delta.text
        ended = delta.finish_reason or ended
        if clock() - last >= 1 / UPDATES_PER_SECOND:
            last = clock()
            yield said, ended
    yield said, ended


def tally(stream: Stream) -> str:
    """Counts and times of a request, in one line."""
    request = stream.request
    times, count = request.timings, len(request.tokens)
    parts = [f"{request.num_prompt:,} tokens in" + (f" ({request.num_cached:,} known)" if request.num_cached else "")]
    if request.num_tiles:
        parts.append(f"{request.num_tiles} {'tile' if request.num_tiles == 1 else 'tiles'} {times.vision:.2f} s")
    parts.append(f"read in {times.prefill:.2f} s")
    speed = f", {(count - 1) / times.decode:,.0f}/s" if count > 1 and times.decode > 0 else ""
    parts.append(f"{count:,} {'token' if count == 1 else 'tokens'} out{speed}")
    return " · ".join(parts)
