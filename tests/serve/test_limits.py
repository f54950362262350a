"""Clients that leave, wait, send slowly, read slowly or come in crowds: on real connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from ivl.inference.engine import Engine
from ivl.processing.chat import user
from ivl.serve.service import ReplyStream
from ivl.types import ImageRef, SamplingParams
from tests.helpers import servers
from tests.helpers.engines import assert_idle, picture
from tests.helpers.servers import CONFIG, KEY, Running, data_url, engine, running, says

CHAT = "/v1/chat/completions"
HEADERS = {"Authorization": f"Bearer {KEY}"}
LONG = {"max_tokens": 500, "ignore_eos": True, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine(tmp_path_factory.mktemp("model"), max_sequences=4)


@pytest.fixture(scope="module")
def server(tiny_engine: Engine) -> Generator[Running]:
    limits = {"header_timeout": 0.5, "body_timeout": 0.5, "write_timeout": 0.5, "keep_alive": 1.0, "max_connections": 80}
    with running(tiny_engine, replace(CONFIG, max_queue=2, **limits)) as server:
        yield server


@pytest.fixture
def slow(server: Running, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Running:
    servers.slow(tiny_engine, monkeypatch)
    return server


def request_bytes(body: dict[str, Any], **headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(data)), **HEADERS, **headers}
    return f"POST {CHAT} HTTP/1.1\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in lines.items()) + b"\r\n" + data


def until(happens: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.005)


def said(connection: socket.socket, seconds: float = 20.0) -> bytes:
    """Everything until the server closes."""
    connection.settimeout(seconds)
    out = b""
    try:
        while data := connection.recv(65536):
            out += data
    except ConnectionResetError:
        pass
    return out


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_cancelled_within_a_step(
    slow: Running, tiny_engine: Engine, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one step of when the server sees it: when it does is up to how busy the machine is."""
    seen: list[int] = []
    cancel = ReplyStream.cancel

    def counted(self: ReplyStream) -> None:
        if not self.ended:
            seen.append(tiny_engine.num_steps)
        cancel(self)

    monkeypatch.setattr(ReplyStream, "cancel", counted)
    with socket.create_connection(slow.address) as connection:
        connection.sendall(request_bytes(says("what?", **LONG) | {"stream": stream}))
        until(lambda: tiny_engine.stats().running == 1)
        time.sleep(0.1)
    until(lambda: tiny_engine.stats().running == 0)
    assert len(seen) == 1 and tiny_engine.num_steps - seen[0] <= 1 and slow.service.num_open == 0
    assert tiny_engine.num_steps < 200  # not the reply's 500
    assert_idle(tiny_engine)


def test_who_leaves_the_queue_is_forgotten(slow: Running, tiny_engine: Engine) -> None:
    with httpx.Client(base_url=slow.url, headers=HEADERS) as client:
        connections = [socket.create_connection(slow.address) for _ in range(6)]
        for number, connection in enumerate(connections):
            connection.sendall(request_bytes(says(f"what {number}?", **LONG)))
        until(lambda: slow.service.num_open == 6)
        refused = client.post(CHAT, json=says("one more"))
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        for connection in connections:
            connection.close()
        until(lambda: slow.service.num_open == 0)
        assert client.post(CHAT, json=says("one more")).status_code == 200
    assert_idle(tiny_engine)


def test_answers_are_never_crossed(server: Running, tiny_engine: Engine) -> None:
    """Each of many answers, whole and streamed, some clients leaving early, is what the question alone gives."""
    questions = [(f"what colour is {n}?", [n] * (n % 3)) for n in range(12)]

    async def one(client: httpx.AsyncClient, number: int) -> tuple[int, str | None]:
        text, seeds = questions[number % len(questions)]
        body = says(text, *[data_url(seed) for seed in seeds])
        while True:
            if number % 3 == 0:
                with contextlib.suppress(httpx.TimeoutException):
                    await client.post(CHAT, json=body, timeout=0.02)
                return number, None
            if number % 3 == 1:
                reply = await client.post(CHAT, json=body)
                if reply.status_code == 200:
                    return number, reply.json()["choices"][0]["message"]["content"]
            else:
                out = ""
                async with client.stream("POST", CHAT, json=body | {"stream": True}) as reply:
                    if reply.status_code == 200:
                        async for line in reply.aiter_lines():
                            if line.startswith("data: {"):
                                out += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                        return number, out
            assert reply.status_code == 429
            await asyncio.sleep(0.05)

    async def crowd() -> list[tuple[int, str | None]]:
        limits = httpx.Limits(max_connections=20)
        async with httpx.AsyncClient(base_url=server.url, headers=HEADERS, limits=limits, timeout=30) as client:
            return await asyncio.gather(*(one(client, number) for number in range(60)))

    answers = asyncio.run(crowd())
    until(lambda: server.service.num_open == 0 == tiny_engine.stats().running)
    params = SamplingParams(max_new_tokens=12)
    alone = [
        tiny_engine.generate([(user(text, *[ImageRef(picture(s)) for s in seeds]),)], params)[0].text
        for text, seeds in questions
    ]
    for number, text in answers:
        assert text is None or text == alone[number % len(questions)]
    assert_idle(tiny_engine)


def test_slow_senders_are_cut_off(server: Running) -> None:
    whole = request_bytes(says("what?"))
    head = whole.index(b"\r\n\r\n")
    for part, answer in ((b"", b""), (whole[:20], b""), (whole[: head + 2], b""), (whole[: head + 9], b"HTTP/1.1 408 ")):
        started = time.monotonic()
        with socket.create_connection(server.address) as connection:
            connection.sendall(part)
            assert said(connection).startswith(answer) and time.monotonic() - started < 10


def test_a_header_a_second_is_too_slow(server: Running) -> None:
    with socket.create_connection(server.address) as connection, pytest.raises(OSError):
        connection.sendall(b"POST / HTTP/1.1\r\n")
        for number in range(50):
            connection.sendall(f"x-{number}: y\r\n".encode())
            time.sleep(0.05)


def test_idle_connections_end(server: Running) -> None:
    with socket.create_connection(server.address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        started = time.monotonic()
        assert b'{"status":"ok"}' in said(connection) and time.monotonic() - started < 10
    assert not server.server.server_state.connections


def test_who_does_not_read_is_cut_off(server: Running, tiny_engine: Engine) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(server.address)
        body = says("what?", **LONG) | {"stream": True, "n": 6}
        for _ in range(3):
            connection.sendall(request_bytes(body))
        until(lambda: server.service.num_open == 6)
        until(lambda: not server.server.server_state.connections, 30)
    until(lambda: server.service.num_open == 0 == tiny_engine.stats().running)
    assert_idle(tiny_engine)


def test_what_is_not_http(server: Running) -> None:
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with socket.create_connection(server.address) as connection:
            connection.sendall(garbage)
            answer = said(connection)
            assert answer.startswith(b"HTTP/1.1 4") and b'"error"' in answer
    large = b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000
    with socket.create_connection(server.address) as connection:
        try:
            connection.sendall(large)
        except OSError:
            return
        assert said(connection).startswith((b"HTTP/1.1 4", b""))


def test_too_many_connections_are_told_so(server: Running) -> None:
    until(lambda: not server.server.server_state.connections)
    crowd = [socket.create_connection(server.address) for _ in range(80)]
    until(lambda: len(server.server.server_state.connections) == 80)
    with socket.create_connection(server.address) as connection:
        assert said(connection).startswith(b"HTTP/1.1 503 ")
    for connection in crowd:
        connection.close()
    until(lambda: not server.server.server_state.connections)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_large_body_is_refused_without_being_kept(server: Running) -> None:
    size = CONFIG.max_body_bytes + 1
    with socket.create_connection(server.address) as connection:
        connection.sendall(request_bytes({}, **{"Content-Length": str(size), "Expect": "100-continue"}))
        assert said(connection).startswith(b"HTTP/1.1 413 ")
    assert httpx.post(server.url + CHAT, content=b" " * 3_000_000, timeout=10).status_code == 401  # no key, and yet told so
