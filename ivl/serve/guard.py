"""What every request passes before anything looks at it: host, key, size and time of its body; and what is logged of it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ivl.serve.auth import Keys
from ivl.serve.config import ServeConfig
from ivl.serve.problems import Problem, internal

OPEN = "/health"
"""The one path that needs no key."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
LINGER = 2.0
"""Seconds for which the rest of a refused request is read, since many clients listen only after they have spoken."""
log = logging.getLogger("ivl.serve")


class ClientGone(Exception):
    """Nobody listens any more."""


@dataclass
class Note:
    """What is known about a request, for the log, for metrics, and for its routes. It never holds what a user wrote."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = field(default_factory=time.perf_counter)
    route: str = "none"
    status: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Guard:
    """ASGI middleware around everything, mounted pages included."""

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: Keys, finished: Callable[[Note], None]) -> None:
        self.app, self.config, self.keys, self.finished = app, config, keys, finished
        hosts = config.allowed_hosts or (LOCAL_HOSTS if config.is_local and not keys and not config.no_key else ())
        self.hosts = {host.lower() for host in hosts}
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["type"] != "http":
            if self._refusal(scope, headers) is None:
                return await self.app(scope, receive, send)
            return await send({"type": "websocket.close", "code": 1008})
        note = scope["ivl"] = Note()
        body = _Body(self, receive, expects=b"expect" in headers)
        scope["ivl.hold"], scope["ivl.release"] = body.hold, body.release
        out = _Out(send, body, note)
        try:
            if (problem := self._refusal(scope, headers) or self._size(headers)) is not None:
                await out.refuse(problem)
            else:
                await self.app(scope, body.receive, out.send)
        except ClientGone:
            note.status = 499
        except Exception as error:
            if out.started:  # too late for another status: the connection breaks off
                raise
            problem = error if isinstance(error, Problem) else internal()
            if problem.status_code == 500:
                log.error("request failed", exc_info=error, extra={"fields": {"id": note.id}})
            await out.refuse(problem)
        finally:
            self.held_bytes -= body.num_bytes
            note.route = getattr(scope.get("route"), "path", None) or "none"
            self.finished(note)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Problem | None:
        if self.hosts and _name(headers.get(b"host", b"").decode("latin-1")) not in self.hosts:
            return Problem(421, "the Host header names another server: see allowed_hosts", code="wrong_host")
        if scope["path"] != OPEN and not self.keys.admit(headers.get(b"authorization")):
            return Problem(401, "a valid key is needed, as `Authorization: Bearer KEY`", code="invalid_api_key")
        return None

    def _size(self, headers: dict[bytes, bytes]) -> Problem | None:
        length = headers.get(b"content-length", b"0")
        return self.too_large() if not length.isdigit() or int(length[:20]) > self.config.max_body_bytes else None

    def too_large(self) -> Problem:
        return Problem(413, f"the request is larger than {self.config.max_body_bytes} bytes", code="request_too_large")


class _Body:
    """Counts the body while it is read, and the time that takes."""

    def __init__(self, guard: Guard, receive: Receive, *, expects: bool) -> None:
        self._guard, self._receive, self._expects = guard, receive, expects
        self.num_bytes = 0
        self.complete = self.hopeless = False
        self._deadline: float | None = None

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()
        config = self._guard.config
        self._deadline = self._deadline or time.perf_counter() + config.body_timeout
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.perf_counter()))
        except TimeoutError:
            self.hopeless = True  # there is no use in waiting for the rest
            message = f"the body did not arrive within {config.body_timeout:g} seconds"
            raise Problem(408, message, code="timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        size = len(message.get("body", b""))
        if self.num_bytes + size > config.max_body_bytes:
            raise self._guard.too_large()
        self.hold(size)
        self.complete = not message.get("more_body", False)
        return message

    def hold(self, size: int) -> None:
        """Count what this request has in memory now: its body, and media that were fetched for it.

        Raises:
            Problem: 429 if all requests together hold too much.
        """
        self._guard.held_bytes += size
        self.num_bytes += size
        if self._guard.held_bytes > self._guard.config.max_held_bytes:
            raise Problem(429, "too much is being sent at this time: try again later", code="busy", retry_after=5)

    def release(self) -> None:
        """The request is prepared, or over; what it became is bounded by other limits."""
        self._guard.held_bytes -= self.num_bytes
        self.num_bytes = 0

    async def discard(self) -> None:
        """Read on for a moment, keeping nothing."""
        if self.complete or self.hopeless or self._expects:
            return
        try:
            async with asyncio.timeout(LINGER):
                while (await self._receive()).get("more_body", False):
                    pass
            self.complete = True
        except TimeoutError:
            pass


class _Out:
    """Marks every answer with the request's id, and lets a refused client finish speaking."""

    def __init__(self, send: Send, body: _Body, note: Note) -> None:
        self._send, self._body, self._note = send, body, note
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                await self._body.discard()
            self.started, self._note.status = True, message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self._note.id.encode())]
            if not self._body.complete and message["status"] >= 400:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        body = problem.body
        headers = {"content-type": "application/json", "content-length": str(len(body)), **dict(problem.headers or {})}
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": problem.status_code, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


class JSONLines(logging.Formatter):
    """One JSON object a line. Of an exception the kind and the place are told, never its words: they may be a user's."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and (error := record.exc_info[1]) is not None:
            frames = traceback.extract_tb(error.__traceback__)[-8:]
            line["error"] = type(error).__name__
            line["at"] = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line, ensure_ascii=True)
