"""Bodies that are made to cost time or memory, and a clock for the event loop of the server that gets them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.helpers.servers import KEY, Running, data_url, says

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"


class LoopClock:
    """Measures the longest time for which the event loop of a server stood still, as a context manager.

    Time in which this process did not run at all, as on a busy machine, does not count.
    """

    def __init__(self, server: Running) -> None:
        self.loop = server.service._loop
        self.longest = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> LoopClock:
        async def tick() -> None:
            while not self._ended.is_set():
                time_before, work_before = time.perf_counter(), time.process_time()
                await asyncio.sleep(0.005)
                still, work = time.perf_counter() - time_before - 0.005, time.process_time() - work_before
                self.longest = max(self.longest, min(still, work))

        assert self.loop is not None
        self._task = asyncio.run_coroutine_threadsafe(tick(), self.loop)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._task.result(10)


def post(server: Running, path: str, body: bytes, *, chunk: int = 0, timeout: float = 60.0) -> tuple[int, bytes]:
    """Send a body, in chunks of a size if one is given. Return status and body of the response; 0 for a closed connection."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    if chunk:
        pieces = (body[at : at + chunk] for at in range(0, len(body), chunk))
        framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        sent = f"{head}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode() + framed
    else:
        sent = f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
    return raw(server, sent, timeout)


def raw(server: Running, sent: bytes, timeout: float = 60.0) -> tuple[int, bytes]:
    """Send bytes, and return status and body of all that comes back until the server closes."""
    with socket.create_connection(server.address[:2], timeout=timeout) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
        out = b""
        try:
            while data := connection.recv(1 << 16):
                out += data
        except ConnectionResetError:
            pass
    head, _, body = out.partition(b"\r\n\r\n")
    return int(head[9:12]) if head else 0, body


def _repeated(item: bytes, size: int) -> bytes:
    return (item + b",") * (size // (len(item) + 1)) + item


def _text(content: Any) -> bytes:
    return json.dumps({"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}).encode()


def _schema(schema: Any) -> bytes:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return json.dumps(says("?", response_format=form)).encode()


def _nested(depth: int, kind: str) -> Any:
    value: Any = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}} if kind == "properties" else {kind: [value]}
    return value


def _guide(**options: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, **options}).encode()


KINDS: dict[str, Callable[[int, random.Random], tuple[str, bytes]]] = {
    "messages of numbers": lambda n, _: (CHAT, b'{"messages":[' + _repeated(b"1", n) + b"]}"),
    "messages of lists": lambda n, _: (CHAT, b'{"messages":[' + _repeated(b"[]", n) + b"]}"),
    "messages": lambda n, _: (CHAT, b'{"messages":[' + _repeated(b'{"role":"user","content":"a"}', n) + b"]}"),
    "text parts": lambda n, _: (CHAT, _text([{"type": "text", "text": ""}] * (n // 30))),
    "wrong parts": lambda n, _: (CHAT, _text([{"type": "text", "text": 1}] * (n // 30))),
    "unknown keys": lambda n, _: (CHAT, json.dumps({str(i): i for i in range(n // 16)}).encode()),
    "same keys": lambda n, _: (CHAT, b"{" + _repeated(b'"seed":1', n) + b"}"),
    "long key": lambda n, _: (CHAT, b'{"' + b"k" * n + b'":1}'),
    "prompt of lists": lambda n, _: (COMPLETIONS, b'{"prompt":[' + _repeated(b"[]", n) + b"]}"),
    "prompt of ids": lambda n, _: (COMPLETIONS, b'{"max_tokens":1,"prompt":[' + _repeated(b"7", n) + b"]}"),
    "prompt of texts": lambda n, _: (COMPLETIONS, b'{"prompt":[' + _repeated(b'"a"', n) + b"]}"),
    "stops": lambda n, _: (COMPLETIONS, b'{"prompt":"a","stop":[' + _repeated(b'"a"', n) + b"]}"),
    "depth": lambda n, _: (COMPLETIONS, b'{"prompt":' + b"[" * n),
    "objects in objects": lambda n, _: (CHAT, b'{"metadata":' + b'{"a":' * (n // 5)),
    "number": lambda n, _: (COMPLETIONS, b'{"prompt":"a","seed":' + b"1" * n + b"}"),
    "numbers": lambda n, _: (COMPLETIONS, b'{"prompt":[' + _repeated(b"1" * 60, n) + b"]}"),
    "float": lambda n, _: (COMPLETIONS, b'{"prompt":"a","top_p":0.' + b"1" * n + b"}"),
    "quotes": lambda n, _: (CHAT, b'"' * n),
    "escaped quotes": lambda n, _: (CHAT, b'{"user":"' + b'\\"' * (n // 2) + b'"}'),
    "escapes": lambda n, _: (CHAT, b'{"user":"' + b"\\u00e9" * (n // 6) + b'"}'),
    "backslashes": lambda n, _: (CHAT, b'{"user":"' + b"\\\\" * (n // 2)),
    "blanks": lambda n, _: (CHAT, b" " * n + b"{}"),
    "commas": lambda n, _: (CHAT, b"[" + b"," * n),
    "letters": lambda n, _: (TOKENIZE, json.dumps({"prompt": "a" * n}).encode()),
    "blank text": lambda n, _: (TOKENIZE, json.dumps({"prompt": " " * min(n, 400_000)}).encode()),
    "Chinese": lambda n, _: (TOKENIZE, json.dumps({"prompt": "中文" * min(n // 6, 200_000)}, ensure_ascii=False).encode()),
    "Chinese question": lambda n, _: (CHAT, _text("中文" * min(n // 6, 200_000))),
    "no base64": lambda n, _: (CHAT, _text([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * n}}])),
    "URLs": lambda n, _: (CHAT, _text([{"type": "image_url", "image_url": {"url": data_url(1)}}] * (n // 300))),
    "schema": lambda n, _: (CHAT, _schema({"enum": ["a" * n]})),
    "schema's properties": lambda n, _: (CHAT, _schema({"properties": {str(i): {} for i in range(n // 12)}})),
    "deep schema": lambda n, rng: (CHAT, _schema(_nested(min(n, 60), rng.choice(["properties", "allOf", "anyOf", "items"])))),
    "schema's references": lambda n, _: (CHAT, _schema({"allOf": [{"$ref": "#"}] * (n // 14)})),
    "guide as text": lambda n, _: (CHAT, _guide(guided_json="[" + "[]," * (n // 3) + "[]]")),
    "guide": lambda n, _: (CHAT, _guide(guided_json={str(i): [] for i in range(n // 12)})),
    "choices": lambda n, _: (CHAT, _guide(guided_choice=["a"] * (n // 5))),
    "GBNF": lambda n, _: (CHAT, _guide(guided_grammar="root ::= " + '"a" | ' * min(n // 6, 3000) + '"b"')),
    "regex": lambda n, _: (CHAT, _guide(guided_regex="(a|b)*" * (n // 6))),
    "tools": lambda n, _: (CHAT, _guide(tools=[{"type": "function", "function": {"name": "f", "parameters": {"a": "x" * n}}}])),
    "base64 alone": lambda n, _: (CHAT, _text([{"type": "image_url", "image_url": "A" * n}])),
    "logit_bias": lambda n, _: (CHAT, json.dumps({"logit_bias": {str(i): 1 for i in range(n // 12)}}).encode()),
    "bytes": lambda n, rng: (CHAT, rng.randbytes(n)),
    "damaged": lambda n, rng: (CHAT, _damaged(_text([{"type": "image_url", "image_url": {"url": data_url(1)}}] * 8), rng)),
}
"""A body of about so many bytes, and its path, by kind."""


def _damaged(body: bytes, rng: random.Random) -> bytes:
    out = bytearray(body)
    for _ in range(rng.randint(1, 40)):
        out[rng.randrange(len(out))] = rng.choice(b'"{}[],:\\0aA\xff')
    return bytes(out)
