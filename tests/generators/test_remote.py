"""RemoteGenerator against a small server that misbehaves on demand."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ivl.errors import InputError
from ivl.generators import BatchGenerator, Refused, answers_of, remote
from ivl.generators.remote import RemoteGenerator
from ivl.types import Grammar, ImageRef, Message, SamplingParams, Text

GREEDY = SamplingParams(max_new_tokens=8)


class Stub(ThreadingHTTPServer):
    """Answers each request by the next of `script`, then by the last one for ever; an entry is (status, headers, body) or a
    function of the request's JSON."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = [echo]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(sent)
            self.server.headers.append(self.headers)
            step = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        status, headers, body = step(sent) if callable(step) else step
        with self.server.lock:
            self.server.now -= 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client gave up
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *args: object) -> None:
        pass


def said(text: str, finish: str = "stop") -> tuple[int, dict, dict]:
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def echo(sent: dict[str, Any]) -> tuple[int, dict, dict]:
    return said(f"you said {sent['messages'][-1]['content']}")


def events(*deltas: str, finish: str | None = "stop", done: bool = True) -> tuple[int, dict, bytes]:
    lines = [{"choices": [{"delta": {"content": text}}]} for text in deltas]
    lines.insert(0, {"choices": [{"delta": {"role": "assistant"}}]})
    if finish:
        lines.append({"choices": [{"delta": {}, "finish_reason": finish}]})
    lines.append({"choices": [], "usage": {"total_tokens": 3}})
    body = ": a comment\n\n" + "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + ("data: [DONE]\n\n" if done else "")
    return 200, {"Content-Type": "text/event-stream"}, body.encode()


@pytest.fixture
def server() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.shutdown()
    stub.server_close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    return waited


def ask(text: str, *media: ImageRef) -> tuple[Message, ...]:
    return (Message("user", (*media, Text(text))),)


def make(server: Stub, **options: Any) -> RemoteGenerator:
    return RemoteGenerator(server.url, model="m", **options)


def test_replies_come_in_order_and_at_once(server: Stub) -> None:
    def slow(sent: dict[str, Any]) -> Any:
        time.sleep(0.03 if sent["messages"][0]["content"] in ("0", "3") else 0.005)
        return echo(sent)

    server.script = [slow]
    generator = make(server, concurrency=4, api_key="secret")
    assert isinstance(generator, BatchGenerator)
    assert answers_of(generator, [ask(str(n)) for n in range(20)], GREEDY) == [f"you said {n}" for n in range(20)]
    assert 1 < server.most <= 4
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_what_is_sent(server: Stub, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (3, 2), "red").save(path)
    params = SamplingParams(max_new_tokens=7, temperature=0.7, top_k=50, top_p=0.95, stop=("END",), seed=3)
    talk = (Message("system", (Text("be short"),)), *ask("what?", ImageRef(str(path)), ImageRef(Image.new("L", (2, 2)))))
    server.script = [said("red", "length")]
    (reply,) = make(server).generate([talk], params)
    assert (reply.text, reply.finish_reason) == ("red", "length")
    sent = server.requests[0]
    assert {key: sent[key] for key in sent if key != "messages"} == {
        "model": "m", "max_tokens": 7, "temperature": 0.7, "top_k": 50, "top_p": 0.95, "stop": ["END"], "seed": 3,
    }  # fmt: skip
    system, user = sent["messages"]
    assert system == {"role": "system", "content": "be short"}
    first, second, text = user["content"]
    assert base64.b64decode(first["image_url"]["url"].removeprefix("data:image/png;base64,")) == path.read_bytes()
    assert second["image_url"]["url"].startswith("data:image/png;base64,") and text == {"type": "text", "text": "what?"}
    (capped,) = remote._content(Message("user", (ImageRef(str(path), 3),)))
    assert capped["image_url"]["max_dynamic_patch"] == 3 and "max_dynamic_patch" not in first["image_url"]


@pytest.mark.parametrize("options", [{"guide": Grammar("json")}, {"logprobs": 0}, {"ignore_eos": True}])
def test_what_an_endpoint_cannot_be_asked_is_refused(server: Stub, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))} cannot be asked of an endpoint"):
        make(server).generate([ask("hello")], SamplingParams(**options))
    assert not server.requests


@pytest.mark.parametrize(
    ("trouble", "waits"),
    [
        ((429, {"Retry-After": "7"}, {"error": {"message": "slow down"}}), [7.0]),
        ((503, {"Retry-After": "soon"}, b"<html>"), None),
        ((500, {}, b""), None),
        ((200, {}, b'{"choices": [{"mess'), None),
        ((200, {}, {"choices": []}), None),
        ((200, {}, {"error": "overloaded"}), None),
        ((200, {}, {"choices": [{"message": {"content": None}}]}), None),
        ((200, {"Content-Length": "1000"}, b'{"choices": '), None),
    ],
)
def test_trouble_is_tried_again(server: Stub, pauses: list[float], trouble: Any, waits: list[float] | None) -> None:
    server.script = [trouble, said("there")]
    assert answers_of(make(server), [ask("hello")], GREEDY) == ["there"]
    assert len(server.requests) == 2
    assert pauses == waits if waits else 0.25 <= pauses[0] <= 0.75


def test_pauses_grow_and_the_last_error_names_the_endpoint(server: Stub, pauses: list[float]) -> None:
    server.script = [(500, {}, {"error": {"message": "no memory"}})]
    with pytest.raises(InputError, match=r"127.0.0.1.*after 4 tries.*status 500: no memory"):
        make(server, retries=3).generate([ask("hello")], GREEDY)
    assert len(pauses) == 3 and all(0.25 * 2**n <= wait <= 0.75 * 2**n for n, wait in enumerate(pauses))


def test_silence_times_out(server: Stub, pauses: list[float]) -> None:
    def silent(sent: dict[str, Any]) -> Any:
        threading.Event().wait(1)
        return said("too late")

    server.script = [silent]
    with pytest.raises(InputError, match=r"after 2 tries.*timed out"):
        make(server, timeout=0.05, retries=1).generate([ask("hello")], GREEDY)


class Raw(threading.Thread):
    """Answers each connection with pieces, as fast as they are read, until the client goes away."""

    def __init__(self, *pieces: bytes, forever: bytes = b"", pause: float = 0) -> None:
        super().__init__(daemon=True)
        self.pieces, self.forever, self.pause = pieces, forever, pause
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.sent = 0
        self.start()

    def run(self) -> None:
        while True:
            with self.listener.accept()[0] as connection, contextlib.suppress(OSError):
                connection.recv(1 << 16)
                for piece in itertools.chain(self.pieces, itertools.repeat(self.forever) if self.forever else ()):
                    connection.sendall(piece)
                    self.sent += len(piece)
                    time.sleep(self.pause)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
FLOOD = b" " * (1 << 16)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("pieces", "forever"),
    [
        ((OK + b"\r\n",), FLOOD), ((OK + b'\r\n{"choices": [{"message": {"content": "',), b"x" * (1 << 16)),
        ((OK + b"\r\ndata: ",), FLOOD), ((OK + b"\r\n",), b"data: {}\n\n" * 1000), ((OK,), b"X-Header: y\r\n" * 100),
        ((b"HTTP/1.1 503 Busy\r\n\r\n",), FLOOD), ((), b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    ],
)  # fmt: skip
def test_a_reply_without_end_is_cut_off(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch, pieces: tuple[bytes, ...], forever: bytes, stream: bool
) -> None:
    monkeypatch.setattr(remote, "MAX_REPLY_BYTES", 1 << 20)
    server = Raw(*pieces, forever=forever)
    generator = RemoteGenerator(server.url, model="m", retries=0)
    with pytest.raises(InputError, match=r"after 1 tries"):
        list(generator.stream(ask("hello"), GREEDY)) if stream else generator.generate([ask("hello")], GREEDY)
    assert server.sent < 30 << 20  # what lies in the buffers of the sockets, too


@pytest.mark.parametrize("pieces", [(OK + b"\r\n",), (OK,), (b"",), (OK + b"\r\ndata: ",)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_drips_has_a_deadline(pauses: list[float], pieces: tuple[bytes, ...], stream: bool) -> None:
    server = Raw(*pieces, forever=b" ", pause=0.02) if pieces != (OK,) else Raw(*pieces, forever=b"x", pause=0.02)
    generator = RemoteGenerator(server.url, model="m", retries=0, timeout=0.1)
    started = time.monotonic()
    with pytest.raises(InputError, match="after 1 tries"):
        list(generator.stream(ask("hello"), GREEDY)) if stream else generator.generate([ask("hello")], GREEDY)
    assert time.monotonic() - started < 10


SHAPES = (
    b'{"choices":[{"message":"x","delta":"x"}]}', b'{"choices":["x"]}', b'{"choices":{"a":1}}', b"[]", b"5", b"null", b'"x"',
    b'{"choices":[{"message":{"content":5},"delta":{"content":5}}]}', b'{"choices":[null]}', b"[" * 100_000, b"\xff\xfe{}",
    b'{"choices":[{"message":{"content":["a"]},"delta":{"content":["a"]}}]}', b'{"choices":[{"message":[1],"delta":[1]}]}',
    b'{"error":{"message":"overloaded"}}', b'{"choices":[{"mess',
)  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value", SHAPES)
def test_replies_of_another_form_are_failed_tries(server: Stub, pauses: list[float], value: bytes, stream: bool) -> None:
    def reply_of(generator: RemoteGenerator) -> str:
        asked = ask("hello")
        deltas = generator.stream(asked, GREEDY) if stream else generator.generate([asked], GREEDY)
        return "".join(delta.text for delta in deltas)

    body = b"data: " + value + b"\n\ndata: [DONE]\n\n" if stream else value
    server.script = [(200, {}, body), events("fine") if stream else said("fine")]
    assert reply_of(make(server)) == "fine" and len(server.requests) == 2
    server.script = [(200, {}, body)]
    with pytest.raises(InputError, match="after 2 tries"):
        reply_of(make(server, retries=1))


HEADERS = (
    b"Content-Length: 99999999999999999999", b"Content-Length: -1", b"Content-Length: x", b"Content-Encoding: gzip", b"\xff: x",
    b"Transfer-Encoding: chunked", b"Content-Type: text/plain; charset=nonsense", b"Set-Cookie: \xff", b"X" * 200_000,
)  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize(
    "status", [b"200 OK", b"500 no", b"429 no\r\nRetry-After: 1e999", b"429 no\r\nRetry-After: nan", b"abc"]
)
def test_headers_of_another_form_are_failed_tries(pauses: list[float], header: bytes, status: bytes) -> None:
    server = Raw(b"HTTP/1.1 " + status + b"\r\n" + header + b"\r\n\r\n{}")
    with pytest.raises(InputError, match=r"127\.0\.0\.1"):
        RemoteGenerator(server.url, model="m", retries=1, timeout=2).generate([ask("hello")], GREEDY)


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_message_of_an_endpoint_stays_on_one_line(server: Stub, pauses: list[float], status: int) -> None:
    message = "a\n\x1b[31mforged\u2028\x9b"
    server.script = [(status, {}, {"error": {"message": message}})]
    with pytest.raises(InputError) as raised:
        make(server, retries=0).generate([ask("hello")], GREEDY)
    assert str(raised.value).isprintable() and r"a\n\x1b[31mforged\u2028\x9b" in str(raised.value)


@pytest.mark.parametrize("status", [200, 400])
def test_a_reply_of_too_many_items_is_not_parsed(server: Stub, pauses: list[float], status: int) -> None:
    server.script = [(status, {}, b"[" + b"{}," * 5_000_000 + b"{}]")]
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="more than 1,000,000 items"):
            make(server, retries=0).generate([ask("hello")], GREEDY)
        assert tracemalloc.get_traced_memory()[1] < 60e6  # the 15 MB of the server and the part that was read among them
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("line", [b"data: {}\n", b"\r", b"\n", b": wait\r\n"])
def test_a_stream_of_too_many_lines_ends_early(server: Stub, pauses: list[float], line: bytes) -> None:
    server.script = [(200, {}, line * 1_000_000)]
    with pytest.raises(InputError, match="more than 200,000 lines"):
        list(make(server, retries=0).stream(ask("hello"), GREEDY))


def test_half_of_a_surrogate_pair_is_replaced(server: Stub) -> None:
    server.script = [(200, {}, b'{"choices":[{"message":{"content":"x \\ud83d y"},"finish_reason":"stop"}]}')]
    assert answers_of(make(server), [ask("hello")], GREEDY) == ["x \ufffd y"]


def test_nobody_listens(pauses: list[float]) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9/.*refused"):
        RemoteGenerator("http://127.0.0.1:9/v1", model="m", retries=1).generate([ask("hello")], GREEDY)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_conversation_is_not_tried_again(server: Stub, status: int) -> None:
    server.script = [(status, {}, {"error": {"message": "too long"}})]
    with pytest.raises(Refused, match="too long"):
        make(server).generate([ask("hello")], GREEDY)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 401, 404])
def test_a_wrong_set_up_is_an_error_at_once(server: Stub, status: int) -> None:
    server.script = [(status, {"Location": "http://127.0.0.1:9/"}, b"go away")]
    with pytest.raises(InputError, match=f"status {status}: go away") as caught:
        make(server).generate([ask("hello")], GREEDY)
    assert not isinstance(caught.value, Refused) and len(server.requests) == 1


def test_models_that_know_the_limit_under_another_name(server: Stub) -> None:
    def picky(sent: dict[str, Any]) -> Any:
        if "max_tokens" in sent:
            return 400, {}, {"error": {"message": "use 'max_completion_tokens' instead"}}
        return said(str(sent["max_completion_tokens"]))

    server.script = [picky]
    generator = make(server)
    assert [reply.text for reply in generator.generate([ask("a")], GREEDY)] == ["8"]
    assert [reply.text for reply in generator.generate([ask("b")], GREEDY)] == ["8"]
    assert len(server.requests) == 3


def test_stream(server: Stub) -> None:
    server.script = [events("a ", "red", " circle", finish="length")]
    deltas = list(make(server).stream(ask("what?"), GREEDY))
    assert [delta.text for delta in deltas] == ["a ", "red", " circle", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "length"]
    assert server.requests[0]["stream"] is True


def test_a_stream_is_tried_again_only_before_its_first_piece(server: Stub, pauses: list[float]) -> None:
    server.script = [(500, {}, b""), events(finish=None, done=False), events("fine")]
    assert "".join(delta.text for delta in make(server).stream(ask("what?"), GREEDY)) == "fine"
    server.script = [events("half a", finish=None, done=False)]
    stream = make(server).stream(ask("what?"), GREEDY)
    assert next(stream).text == "half a"
    with pytest.raises(InputError, match="broke off"):
        next(stream)


def test_one_failure_ends_the_batch(server: Stub) -> None:
    def third_fails(sent: dict[str, Any]) -> Any:
        return (401, {}, b"no") if sent["messages"][0]["content"] == "3" else echo(sent)

    server.script = [third_fails]
    with pytest.raises(InputError, match="401"):
        make(server, concurrency=2).generate([ask(str(n)) for n in range(200)], GREEDY)
    assert len(server.requests) < 100


@pytest.mark.parametrize("options", [{"timeout": 0}, {"retries": -1}, {"concurrency": 0}, {"model": ""}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RemoteGenerator("http://localhost/v1", **{"model": "m", **options})
    with pytest.raises(InputError, match="must start with http"):
        RemoteGenerator("localhost:8000", model="m")
