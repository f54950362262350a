"""A visitor's conversation on the page: from text and files to the views that the page shows while a reply grows."""

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
from ivl.processing.boxes import parse_boxes
from ivl.processing.chat import marked, user
from ivl.processing.image import load_image
from ivl.serve.config import ServeConfig
from ivl.serve.conversation import check_conversation, media_of
from ivl.serve.drawing import draw_boxes
from ivl.serve.errors import APIError, to_api_error
from ivl.serve.guard import RequestContext, log
from ivl.serve.media import MediaGateway
from ivl.serve.responses import facts
from ivl.serve.service import ReplyStream, Service
from ivl.types import Conversation, ImageRef, Message, SamplingParams, Text

UPDATES_PER_SECOND = 20
"""The page is redrawn at most this often."""
MAX_TILES_SHOWN = 64
LARGEST_DRAWN = 1600
"""Pixels a side of an image with boxes; a page has no use for more."""
ENDINGS = {"length": " · cut at the longest reply", "stopped": " · stopped"}
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)


@dataclass(eq=False)
class PageSession:
    """One visitor's conversation, kept on the server, so that images are sent once."""

    messages: Conversation = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The chat on the page."""
    turn: int = 0
    """Counts questions and new conversations, so that a reply knows when it is obsolete."""
    stopped: bool = False
    stream: ReplyStream | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the media."""
        return sum(len(ref.source) for ref in media_of(self.messages) if isinstance(ref.source, bytes))

    def stop(self) -> None:
        """End the reply that is being written; its text so far stays."""
        self.stopped = True
        if self.stream is not None:
            self.stream.cancel()

    def clear(self) -> None:
        """Begin a new conversation."""
        self.stop()
        self.turn += 1
        self.messages, self.rows = (), []


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """How a question is answered."""

    params: SamplingParams
    max_tiles: int
    """Tile cap of an image."""
    num_frames: int
    """Frames taken from a video."""
    system: str = ""
    """Replaces the model's own system message."""


@dataclass(frozen=True, kw_only=True)
class PageUpdate:
    """What changes on the page; None changes nothing."""

    status: str
    """Markdown in one line."""
    chat: list[dict[str, Any]] | None = None
    tiles: list[tuple[Image.Image, str]] | None = None
    taken: bool | None = None
    """True: the question is in the chat, so its box can be emptied. False: it goes back into the box."""
    running: bool = True


class PageChat:
    """Asks one service the questions of all visitors.

    uploads: the directory of files that visitors sent; images with boxes go there, too. finished: called with every
    reply, as with every request of the API.
    """

    def __init__(
        self,
        service: Service,
        config: ServeConfig,
        uploads: Path,
        gateway: MediaGateway | None = None,
        finished: Callable[[RequestContext], None] = lambda _: None,
    ) -> None:
        self.service, self.config, self.uploads, self.finished = service, config, uploads.resolve(), finished
        self.gateway = gateway or MediaGateway(config.media)
        self.sessions: weakref.WeakSet[PageSession] = weakref.WeakSet()

    async def ask(self, text: str, files: list[str], session: PageSession, settings: PageSettings) -> AsyncIterator[PageUpdate]:
        """Yield the page as the reply grows.

        A question that cannot be answered gives a status line; it is not taken, and the conversation stays as it was.
        """
        self.sessions.add(session)
        session.turn += 1
        turn, session.stopped = session.turn, False
        context = RequestContext(route="page", status=499)
        yield PageUpdate(status="Reading …")
        try:
            message = await asyncio.to_thread(self.message, text.strip(), [Path(file) for file in files], settings)
            messages = (*session.messages, message)
            self._check(messages, session)
            system = (Message("system", (Text(settings.system.strip()),)),) if settings.system.strip() else ()
            prompt = await self.service.in_pool(lambda: self.service.processor.prompt((*system, *messages)))
            stream = await self.service.submit(prompt, settings.params)
        except Exception as error:
            yield PageUpdate(status=_warning(error), running=False)
            return
        if turn != session.turn or session.stopped:
            stream.cancel()
            yield PageUpdate(status="stopped", running=False)
            return
        session.stream = stream
        question = [{"role": "user", "content": {"path": file}} for file in files]
        question += [{"role": "user", "content": as_markdown(text)}] if text.strip() else []
        before, reply, ending, failed = session.rows, "", "stopped", False
        rows = session.rows = [*before, *question]
        try:
            yield PageUpdate(chat=[*rows, _row("…")], status="Looking …", tiles=tile_gallery(prompt.tiles_GSSC), taken=True)
            async for reply, ending in growing_reply(stream):  # noqa: B007 - the last value counts
                if turn != session.turn:
                    return
                yield PageUpdate(chat=[*rows, _row(as_markdown(reply))], status=summary(stream))
            status, context.status = f"{summary(stream)}{ENDINGS.get(ending, '')}", 200
        except Exception as error:
            status, failed, context.status = _warning(error), not reply, to_api_error(error).status_code
        finally:  # a visitor who leaves closes this generator
            stream.cancel()
            context.facts |= facts([stream], 1, context.arrived)
            self.finished(context)
            if turn == session.turn:
                session.stream = None
                if failed:
                    session.rows = before
                else:
                    session.messages = (*messages, Message("assistant", (Text(reply.strip()),)))
                    session.rows = [*rows, _row(as_markdown(reply).strip() or "*(nothing)*")]
        if turn == session.turn:
            session.rows += await asyncio.to_thread(self.boxes, reply, messages)
            yield PageUpdate(chat=session.rows, status=status, taken=False if failed else None, running=False)

    def message(self, text: str, files: list[Path], settings: PageSettings) -> Message:
        """Return a question with its media, which are checked as those of the API are.

        Raises:
            InputError: for an empty question, or media that are refused.
        """
        if not text and not files:
            raise InputError("ask something first")
        refs = [
            self.gateway.file(file, self.uploads, max_tiles=settings.max_tiles, num_frames=settings.num_frames)
            for file in files
        ]
        return user(marked(text, refs), *refs)

    def _check(self, messages: Conversation, session: PageSession) -> None:
        """Check a conversation as those of the API are, and the memory that all conversations take.

        Raises:
            InputError, APIError: for more than the limits allow.
        """
        check_conversation(messages, self.config)
        size = PageSession(messages).num_bytes
        if size > self.config.max_body_bytes:
            limit = self.config.max_body_bytes
            raise InputError(f"{size:,} bytes of images, the limit of a conversation is {limit:,}: begin a new one")
        if size + sum(other.num_bytes for other in self.sessions if other is not session) > self.config.max_held_bytes:
            raise InputError("too many images are held for all visitors at this time: try again later")

    def boxes(self, reply: str, messages: Conversation) -> list[dict[str, Any]]:
        """Return a row of the chat with the last image and the boxes of the reply; none without boxes."""
        groundings = parse_boxes(reply).groundings
        images = [ref for ref in media_of(messages) if isinstance(ref, ImageRef)]
        if not groundings or not images:
            return []
        path = self.uploads / f"{secrets.token_hex(16)}.webp"
        image = load_image(images[-1])
        image.thumbnail((LARGEST_DRAWN, LARGEST_DRAWN))
        draw_boxes(image, groundings).save(path, quality=90)
        phrases = ", ".join(grounding.phrase for grounding in groundings if grounding.phrase)
        return [{"role": "assistant", "content": {"path": str(path), "alt_text": f"boxes: {phrases}"}}]


def tile_gallery(tiles_GSSC: Any) -> list[tuple[Image.Image, str]]:
    """Return the tiles as the ViT gets them, each with its number."""
    total = len(tiles_GSSC)
    return [(Image.fromarray(tile.numpy()), f"{n} of {total}") for n, tile in enumerate(tiles_GSSC[:MAX_TILES_SHOWN], 1)]


def as_markdown(text: str) -> str:
    """Escape tags, since a browser would drop those that it does not know; code stays as it is."""
    parts = _CODE.split(text)  # text, code, text, ...
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def _row(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _warning(error: Exception) -> str:
    if not isinstance(error, InputError | APIError):
        log.error("page failed", exc_info=error)
    return f"⚠ {as_markdown(to_api_error(error).message)}"


async def growing_reply(stream: ReplyStream) -> AsyncIterator[tuple[str, str]]:
    """Yield the reply so far and how it ended, not more often than a page can be redrawn, and once more at the end."""
    reply, ending, last = "", "stopped", 0.0
    clock = asyncio.get_running_loop().time
    async for delta in stream:
        reply += delta.text
        ending = delta.finish_reason or ending
        if clock() - last >= 1 / UPDATES_PER_SECOND:
            last = clock()
            yield reply, ending
    yield reply, ending


def summary(stream: ReplyStream) -> str:
    """Return counts and times of a request in one line."""
    request = stream.request
    times, count = request.timings, len(request.tokens)
    parts = [f"{request.num_prompt:,} tokens in" + (f" ({request.num_cached:,} cached)" if request.num_cached else "")]
    if request.num_tiles:
        parts.append(f"{request.num_tiles} {'tile' if request.num_tiles == 1 else 'tiles'} {times.vision:.2f} s")
    parts.append(f"read in {times.prefill:.2f} s")
    speed = f", {(count - 1) / times.decode:,.0f}/s" if count > 1 and times.decode > 0 else ""
    parts.append(f"{count:,} {'token' if count == 1 else 'tokens'} out{speed}")
    return " · ".join(parts)
