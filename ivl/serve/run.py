"""Runs the server process: connections with time limits, signals, logs."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import H11Protocol

from ivl.errors import InputError
from ivl.parallel.follow import LeadingEngine
from ivl.serve.app import create_app
from ivl.serve.config import ServeConfig
from ivl.serve.errors import APIError
from ivl.serve.log import STDERR
from ivl.serve.service import Service

MAX_READ = 1 << 14
"""Bytes of a connection that are read at a time: parsed in one go, they stop every stream."""
MAX_SMALL_CHUNKS = 10_000
"""Chunks of fewer than 16 bytes in a body."""
_CHUNK_LENGTH = re.compile(rb"[0-9A-Fa-f]{1,16}\r\n")
SPARE = 5.0
"""Seconds after shutdown_timeout in which errors reach the clients of replies that were cut off."""
TRY = (
    "try: curl {}/chat/completions -H 'Content-Type: application/json' {}"
    """-d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'"""
)
log = logging.getLogger("ivl.serve")


def open_socket(config: ServeConfig, keys: Sequence[str]) -> socket.socket:
    """Bind the address, before a model is loaded.

    Raises:
        InputError: if it is taken or unknown, or others could reach it without a key.
    """
    if not (config.is_local or keys or config.no_key):
        raise InputError(
            f"{config.host} can be reached from other machines: set IVL_API_KEYS or --key-file, or give --no-key if everybody "
            "may use the model"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"{config.host}: not an address of this machine ({error.strerror})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen on {config.host} port {config.port}: {error.strerror}") from error
    return listener


def run(
    service: Service,
    config: ServeConfig,
    listener: socket.socket,
    *,
    keys: Sequence[str] = (),
    load_seconds: float = 0,
    page_of: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then running replies have shutdown_timeout to end. A second SIGINT ends at once.

    Args:
        load_seconds: Time that loading the model took, for the log.
        page_of: Directory of the model, for a page at /; None serves no page.

    Raises:
        InputError: if the page's examples cannot be read; RankLostError if a process of the model has ended.
    """
    log.info("loaded", extra={"fields": {"model": config.names[0], "seconds": round(load_seconds, 2), "keys": len(keys)}})
    app = create_app(service, config, keys=keys, page_of=page_of)
    make_server(app, service, config).run(sockets=[listener])
    if isinstance(service.engine, LeadingEngine) and service.engine.lost is not None:
        raise service.engine.lost


def make_server(app: FastAPI, service: Service, config: ServeConfig) -> DrainingServer:
    settings = uvicorn.Config(
        app,
        http=type("Connection", (_Connection,), {"limits": config}),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(config.keep_alive)),
        timeout_graceful_shutdown=round(config.shutdown_timeout + SPARE),
        backlog=config.max_connections,
    )
    server = DrainingServer(settings, service, config, app)
    if isinstance(service.engine, LeadingEngine):
        service.engine.on_lost = server.end
    return server


class DrainingServer(uvicorn.Server):
    """Drains the service at the beginning of a shutdown; uvicorn's lifespan would tell it only after the last reply."""

    def __init__(self, settings: uvicorn.Config, service: Service, config: ServeConfig, app: FastAPI) -> None:
        super().__init__(settings)
        self.service, self.limits, self.about = service, config, app.state

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        _freeze_heap()
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = map(str, listener.getsockname()[:2])
            here: str = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # as this machine reaches it
            address, own = (f"http://{f'[{name}]' if ':' in name else name}:{port}" for name in (host, here))
            page = {"open": f"{own}/"} if self.about.has_page else {}
            log.info("listening", extra={"fields": {"address": address, "base_url": f"{own}/v1", **page}})
            if os.isatty(STDERR):
                log.info(TRY.format(f"{own}/v1", '-H "Authorization: Bearer $KEY" ' if self.about.has_keys else ""))

    def end(self, error: Exception) -> None:
        """End the server from any thread, because of an error. Replies that run end with one, too."""
        log.error("the model cannot go on", exc_info=error, extra={"fields": {"reason": str(error)}})
        self.service.end()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("shutting down", extra={"fields": {"open": self.service.num_open}})
        self.service.drain(self.limits.shutdown_timeout)
        await super().shutdown(sockets)
        gc.unfreeze()


class _StrictBuffer(ReceiveBuffer):
    """Refuses what two readers of HTTP may take for different requests, and so one hide behind another (RFC 9112)."""

    num_small_chunks = 0

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Return the lines of a head, or of the trailer of a body."""
        data = bytes(self)
        lines = super().maybe_extract_lines()
        if lines is None:
            return None
        self.num_small_chunks = 0
        head = data[: len(data) - len(self)]
        names = [bytes(line.partition(b":")[0]).lower() for line in lines]
        framing = names.count(b"content-length") + names.count(b"transfer-encoding")
        if head.count(b"\n") != head.count(b"\r\n") or framing > 1:
            raise h11.RemoteProtocolError("bare line feed, or a length given twice")
        if any(line[:1] in (b" ", b"\t") or (line.lower().startswith(b"content-length") and b"," in line) for line in lines):
            raise h11.RemoteProtocolError("folded line, or a list of lengths")
        if lines and not lines[0].endswith(b"HTTP/1.1") and b"transfer-encoding" in names:
            raise h11.RemoteProtocolError("chunks before HTTP/1.1")
        return lines

    def maybe_extract_next_line(self) -> bytearray | None:
        """Return the line before a chunk: its length alone, without extensions."""
        line = super().maybe_extract_next_line()
        if line is not None and not _CHUNK_LENGTH.fullmatch(line):
            raise h11.RemoteProtocolError("not the length of a chunk")
        if line is not None and len(line) < 4:
            self.num_small_chunks += 1
            if self.num_small_chunks > MAX_SMALL_CHUNKS:
                raise h11.RemoteProtocolError("too many small chunks")
        return line


class _StrictHTTP(h11.Connection):
    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._receive_buffer = _StrictBuffer()


class _Connection(H11Protocol):
    """Drops a connection whose client takes too long to send headers or to read, or is gone."""

    limits: ServeConfig
    refused = False
    _headers_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.conn = _StrictHTTP()
        if hasattr(transport, "max_size"):  # an attribute of asyncio's transports
            transport.max_size = MAX_READ
        if len(self.connections) > self.limits.max_connections:
            self.refused = True
            busy = APIError(503, "too many connections", code="busy", retry_after=5)
            transport.write(_raw("503 Service Unavailable", busy))
            transport.write_eof()
            self.loop.call_later(1.0, transport.abort)  # not at once: unread data would reset the connection
            return
        if (connected := transport.get_extra_info("socket")) is not None:
            _detect_lost_client(connected, self.limits.write_timeout)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        if not self.refused:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("_headers_due")
        elif self.conn.trailing_data[0] and self._headers_due is None:  # a further request has begun
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_headers_due")
        self._stop("_reading_due")
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_due = self.loop.call_later(self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_reading_due")

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: anybody may ask for a WebSocket."""

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002, uvicorn's signature
        self.transport.write(_raw("400 Bad Request", APIError(400, "this is not valid HTTP", code="invalid_http")))
        self.transport.close()

    def _await_headers(self) -> None:
        self._stop("_headers_due")
        self._headers_due = self.loop.call_later(self.limits.header_timeout, self._on_headers_late)

    def _on_headers_late(self) -> None:
        self._headers_due = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _stop(self, name: str) -> None:
        if (timer := getattr(self, name)) is not None:
            timer.cancel()
            setattr(self, name, None)


def _freeze_heap() -> None:
    """Take the model and all modules out of the garbage collector's work, which would stop the event loop for 0.3 s."""
    gc.collect()
    gc.freeze()
    gc.collect()  # counts anew: the next full collection comes when the objects since have grown by a quarter


def _detect_lost_client(connected: socket.socket, seconds: float) -> None:
    """Have the kernel detect a client that is gone without closing, or leaves data unread."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", max(1, round(seconds / 2))), ("TCP_KEEPINTVL", max(1, round(seconds / 6))), ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", round(seconds * 1000)),
    ):  # fmt: skip
        if hasattr(socket, name) and connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _raw(status: str, error: APIError) -> bytes:
    """Return the bytes of a response, for where there is no application yet."""
    headers = [*error.response().raw_headers, (b"connection", b"close")]
    return b"\r\n".join([f"HTTP/1.1 {status}".encode(), *(b": ".join(pair) for pair in headers), b"", error.body])
