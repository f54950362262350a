"""ASGI middleware before every route: checks host, key, size and time of a request, and logs it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ivl.serve.auth import Keys
from ivl.serve.config import ServeConfig
from ivl.serve.errors import APIError, internal_error

OPEN: tuple[str, ...] = ("/health",)
"""Paths that need no key; the files of the page are open, too."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
LINGER = 2.0
"""Seconds for which the rest of a refused request is read, since many clients listen only after they have sent all."""
log = logging.getLogger("ivl.serve")


class ClientGone(Exception):
    """Raised when a client has closed its connection."""


@dataclass
class RequestContext:
    """Facts about a request for its route, the log and metrics, as `ivl` in its scope. It never holds what a user wrote."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = field(default_factory=time.perf_counter)
    """Time of arrival, by time.perf_counter()."""
    route: str = "none"
    status: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    """Counts and times, by name."""
    group: str = ""
    """Of whom the request is: requests of one key share cached prompts, and a turn to prepare."""
    media: dict[str, bytearray] = field(default_factory=dict)
    """Media that came with the body, by their names in it."""
    pixels: int = 0
    """Pixels of images and frames that are to be decoded."""
    hold: Callable[[int], None] = lambda _: None
    """Counts bytes that the request holds in memory. Raises APIError 429 if all requests together hold too much."""
    release: Callable[[], None] = lambda: None
    """Ends that count: the request is prepared, and other limits bound what it has become."""


class Guard:
    """Stands around the whole application, the page included. open_paths: the paths that need no key."""

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        keys: Keys,
        finished: Callable[[RequestContext], None],
        open_paths: Sequence[str] = OPEN,
    ) -> None:
        self.app, self.config, self.keys, self.finished, self.open_paths = app, config, keys, finished, open_paths
        own = () if keys else LOCAL_HOSTS if config.is_local else (*LOCAL_HOSTS, socket.gethostname(), config.host)
        self.hosts = {host.lower() for host in config.allowed_hosts or own}
        self.any_address = not (config.allowed_hosts or config.is_local)
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        body = _CountedBody(self, receive, expects=b"expect" in headers)
        context = scope["ivl"] = RequestContext(hold=body.hold, release=body.release)
        origin = (
            headers.get(b"origin", b"") if headers.get(b"origin", b"").decode("latin-1") in self.config.allow_origin else b""
        )
        is_preflight = bool(origin) and scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        response = _MarkedResponse(send, body, context, origin)
        try:
            refusal = self._host_refusal(headers)
            if refusal is None and not is_preflight:  # browsers send a preflight without the key
                refusal = self._key_refusal(scope, headers, context) or self._size_refusal(headers)
            if refusal is not None:
                await refusal.response()(scope, receive, response.send)
            elif is_preflight:
                await response.send({"type": "http.response.start", "status": 204, "headers": _permissions(headers)})
                await response.send({"type": "http.response.body"})
            else:
                await self.app(scope, body.receive, response.send)
        except ClientGone:
            context.status = 499
        except BaseException as error:
            is_panic = type(error).__module__ == "pyo3_runtime"  # of a library in Rust
            if response.started or not (is_panic or isinstance(error, Exception)):
                raise  # too late for another status, or the server ends: the connection breaks off
            refusal = error if isinstance(error, APIError) else internal_error()
            if refusal.status_code == 500:
                log.error("request failed", exc_info=error, extra={"fields": {"id": context.id}})
            await refusal.response()(scope, receive, response.send)
        finally:
            body.release()
            context.media.clear()
            context.route = getattr(scope.get("route"), "path", None) or "none"
            self.finished(context)

    def _host_refusal(self, headers: dict[bytes, bytes]) -> APIError | None:
        name = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts and name not in self.hosts and not (self.any_address and _is_address(name)):
            return APIError(421, "the Host header names another server: see allowed_hosts", code="wrong_host")
        return None

    def _key_refusal(self, scope: Scope, headers: dict[bytes, bytes], context: RequestContext) -> APIError | None:
        context.group = self.keys.admit(headers.get(b"authorization"))
        if scope["path"] not in self.open_paths and not context.group:
            return APIError(401, "a valid key is needed, as `Authorization: Bearer KEY`", code="invalid_api_key")
        return None

    def _size_refusal(self, headers: dict[bytes, bytes]) -> APIError | None:
        length = headers.get(b"content-length", b"0")
        return self.too_large() if not length.isdigit() or int(length[:20]) > self.config.max_body_bytes else None

    def too_large(self) -> APIError:
        """Return the error for a body above the limit."""
        return APIError(413, f"the request is larger than {self.config.max_body_bytes} bytes", code="request_too_large")


class _CountedBody:
    """Reads the body of a request, and limits its size and its time."""

    def __init__(self, guard: Guard, receive: Receive, *, expects: bool) -> None:
        self._guard, self._receive, self._expects = guard, receive, expects
        self.num_bytes = 0
        self.complete = self.timed_out = False
        self._deadline: float | None = None

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()
        config = self._guard.config
        self._deadline = self._deadline or time.perf_counter() + config.body_timeout
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.perf_counter()))
        except TimeoutError:
            self.timed_out = True
            reason = f"the body did not arrive within {config.body_timeout:g} seconds"
            raise APIError(408, reason, code="timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        size = len(message.get("body", b""))
        if self.num_bytes + size > config.max_body_bytes:
            raise self._guard.too_large()
        self.hold(size)
        self.complete = not message.get("more_body", False)
        return message

    def hold(self, num_bytes: int) -> None:
        self._guard.held_bytes += num_bytes
        self.num_bytes += num_bytes
        if self._guard.held_bytes > self._guard.config.max_held_bytes:
            raise APIError(429, "too much is being sent at this time: try again later", code="busy", retry_after=5)

    def release(self) -> None:
        self._guard.held_bytes -= self.num_bytes
        self.num_bytes = 0

    async def discard(self) -> None:
        """Read on for a moment and keep nothing."""
        if self.complete or self.timed_out or self._expects:
            return
        try:
            async with asyncio.timeout(LINGER):
                while (await self._receive()).get("more_body", False):
                    pass
            self.complete = True
        except TimeoutError:
            pass


def _permissions(headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Return the headers that answer a preflight: the page of an allowed origin may send what it asks to send."""
    wanted = headers.get(b"access-control-request-headers", b"")
    permissions = [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600")]
    if re.fullmatch(rb"[\w, -]{1,4096}", wanted):
        permissions.append((b"access-control-allow-headers", wanted))
    if b"access-control-request-private-network" in headers:  # a page of the internet asks a server of this network
        permissions.append((b"access-control-allow-private-network", b"true"))
    return permissions


class _MarkedResponse:
    """Adds the request's id to its response, and lets a refused client finish sending. origin: may read it in a browser."""

    def __init__(self, send: Send, body: _CountedBody, context: RequestContext, origin: bytes) -> None:
        self._send, self._body, self._context, self._origin = send, body, context, origin
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                await self._body.discard()
            self.started, self._context.status = True, message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self._context.id.encode())]
            if self._origin:
                headers += [(b"access-control-allow-origin", self._origin), (b"vary", b"origin")]
                headers.append((b"access-control-expose-headers", b"x-request-id, retry-after"))
            if not self._body.complete and message["status"] >= 400:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)


def _host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _is_address(name: str) -> bool:
    """Whether a host name is an address, which no web page can have as a name of its own."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
