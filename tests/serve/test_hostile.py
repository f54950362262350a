"""One small request takes nothing away from others: the event loop goes on, budgets hold, nothing is smuggled."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.serve_fuzz import flood
from ivl.errors import InputError
from ivl.inference.engine import Engine
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer
from ivl.serve import media
from ivl.serve.body import BodyReader
from ivl.serve.config import ServeConfig
from ivl.serve.errors import APIError
from ivl.serve.service import max_token_bytes
from ivl.serve.turns import Turns
from tests.helpers import media as samples
from tests.helpers.engines import tiny_directory
from tests.helpers.hostile import CHAT, COMPLETIONS, KINDS, TOKENIZE, LoopClock, post, raw
from tests.helpers.servers import CONFIG, KEY, Running, data_url, engine, running, says

OTHER_KEY = "another-key-0123456789"
GAP = 1.0
"""Seconds; the law is 0.1 on a quiet machine, and what it forbids took seconds."""


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine(tmp_path_factory.mktemp("model"), max_sequences=4)


@pytest.fixture(scope="module")
def server(tiny_engine: Engine) -> Generator[Running]:
    with running(tiny_engine, replace(CONFIG, max_queue=16), keys=(KEY, OTHER_KEY)) as server:
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_the_event_loop_goes_on(server: Running, kind: str) -> None:
    path, body = KINDS[kind](4_000_000, random.Random(0))
    with LoopClock(server) as clock:
        status, _ = post(server, path, body)
    assert (status == 200 or 400 <= status < 500) and clock.longest < GAP, (status, clock.longest)


def test_the_garbage_collector_passes_over_what_was_loaded(tiny_engine: Engine) -> None:
    with running(tiny_engine):
        assert gc.get_freeze_count() > 100_000
    assert gc.get_freeze_count() == 0


def test_many_small_chunks_are_refused(server: Running) -> None:
    with LoopClock(server) as clock:
        status, _ = post(server, CHAT, b" " * 200_000 + json.dumps(says("?")).encode(), chunk=1)
        assert status == 400 and post(server, CHAT, json.dumps(says("?")).encode(), chunk=1)[0] == 200
    assert clock.longest < GAP


def test_a_large_honest_body_passes_and_stops_nothing(server: Running) -> None:
    out = io.BytesIO()
    Image.frombytes("RGB", (1800, 1800), os.urandom(1800 * 1800 * 3)).save(out, "PNG", compress_level=0)
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()  # 13 MB
    for body in (json.dumps(says("?", *[url] * 4)), json.dumps(says("?", url)).replace("/", "\\/")):
        with LoopClock(server) as clock:
            assert post(server, CHAT, body.encode())[0] == 200
        assert clock.longest < GAP


def test_a_body_read_in_any_chunks_is_the_same() -> None:
    url = "data:image/png;base64," + "Ab/+" * 3000
    content = {"a": ['x\\"\\\\', {"url": url}, {"url": "data:short"}, {"url": url + "="}, 'say "url":"data:'], "url": "\\"}
    for text in (json.dumps(content), json.dumps(content, indent=1), json.dumps(content).replace("/", "\\/")):
        body = text.encode()
        for size in (1, 3, 255, 256, 257, 4096, len(body)):
            reader = BodyReader(ServeConfig())
            for at in range(0, len(body), size):
                reader.feed(body[at : at + size])
            reader.feed(b"", last=True)
            read = json.loads(reader.rest)
            assert len(reader.media) == 2 and len(reader.rest) < 1000
            for item in read["a"][1:4:2]:
                item["url"] = reader.media[item["url"]].decode()
            assert read == content


def test_what_names_a_medium_of_another_is_a_bad_url(server: Running) -> None:
    body = json.dumps(says("?", "data:0123456789abcdef0123456789abcdef/0")).encode()
    assert post(server, CHAT, body)[0] == 400


def png(width: int, height: int) -> str:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_pixels_of_a_request_are_refused_before_decoding(
    server: Running, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    load = server.service.processor.load
    monkeypatch.setattr(server.service.processor, "load", lambda *a, **k: (opened.append(1), load(*a, **k))[1])
    status, body = post(server, CHAT, json.dumps(says("?", *[png(7000, 7000)] * 11)).encode())
    assert status == 413 and b"max_pixels_per_request" in body and not opened
    tiles = [{"type": "image_url", "image_url": {"url": data_url(n), "max_dynamic_patch": 40}} for n in range(32)]
    wide = [{**part, "image_url": {**part["image_url"], "url": png(1120, 28)}} for part in tiles]
    status, body = post(server, CHAT, json.dumps({"messages": [{"role": "user", "content": wide}]}).encode())
    assert status == 400 and b"tiles" in body and not opened


def crafted(name: str) -> bytes:
    """An image of a few kilobytes whose header is made to cost time or memory."""
    small = zlib.compress(bytes(4 * 13))
    packed = zlib.compress(bytes(1_000_000), 9)
    jpeg, out = samples.encoded("JPEG"), b""
    table = jpeg[jpeg.index(b"\xff\xdb") :][:69]
    match name:
        case "packed chunks":
            kinds = ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0"))
            out = samples.png(4, 4, body=small, extra=b"".join(samples.chunk(k, h + packed) for k, h in kinds) * 20)
        case "EXIF texts":
            text = samples.chunk(b"zTXt", b"Raw profile type exif\0\0" + packed)
            out = samples.png(4, 4, body=small, extra=text * 60)
        case "texts":
            out = samples.png(4, 4, body=small, extra=samples.chunk(b"tEXt", b"a\0b") * 3300)
        case "GIF blocks":
            out = b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0, 0, 0) + b"!\xfe" + b"\1a" * 9000 + b"\0" + samples.gif(1)[13:]
        case "JPEG comments":
            out = jpeg[:2] + b"\xff\xfe\0\2" * 16_000 + jpeg[2:]
        case "JPEG tables":
            out = jpeg[:2] + table * 900 + jpeg[2:]
        case "WebP of two headers":
            out = struct.pack("<4sI4s4sIBI", b"RIFF", 30, b"WEBP", b"VP8L", 18, 0x2F, 6999 | 6999 << 14) + bytes(13)
    return out


CRAFTED = ("packed chunks", "EXIF texts", "texts", "GIF blocks", "JPEG comments", "JPEG tables", "WebP of two headers")


@pytest.mark.parametrize("name", CRAFTED)
def test_small_images_that_cost_time_stop_nothing(server: Running, name: str) -> None:
    data = crafted(name)
    assert len(data) < 1 << 17
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    begun = time.process_time()
    with LoopClock(server) as clock:
        status, _ = post(server, CHAT, json.dumps(says("?", *[url] * 32)).encode())
    assert status in (200, 400, 413) and clock.longest < 0.3, (status, clock.longest)
    assert time.process_time() - begun < 8.0, (status, time.process_time() - begun)


def test_headers_are_never_read_on_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    check = media.check_image
    monkeypatch.setattr(media, "check_image", lambda *a: (threads.append(threading.current_thread().name), check(*a))[1])
    assert post(server, CHAT, json.dumps(says("?", data_url(1), data_url(2))).encode())[0] == 200
    assert len(threads) == 2 and all(name.startswith("ivl-media") for name in threads)


def test_heavy_requests_leave_a_thread_and_end_with_their_client(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """S6: two clients that send large images, and leave at once, keep nobody waiting."""
    started, loads = threading.Event(), []

    def slow(*_: Any, **__: Any) -> Image.Image:
        if (stop := getattr(server.service._stop, "event", None)) is not None and stop.is_set():
            raise InputError("given up")
        started.set()
        loads.append(time.monotonic())
        time.sleep(0.2)
        return Image.new("RGB", (28, 28))

    monkeypatch.setattr(server.service.processor, "load", slow)
    heavy = json.dumps(says("?", *[png(5000, 4000 + n) for n in range(20)])).encode()

    def leave() -> None:
        with contextlib.suppress(TimeoutError):
            post(server, CHAT, heavy, timeout=1.0)

    threads = [threading.Thread(target=leave) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(20)
    begun = time.monotonic()
    assert post(server, CHAT, json.dumps(says("hi")).encode())[0] == 200
    assert time.monotonic() - begun < 3.0  # all the images would take 12
    for thread in threads:
        thread.join()
    time.sleep(1.0)
    last = len(loads)
    time.sleep(0.6)
    assert len(loads) == last < 40


@pytest.mark.parametrize(
    ("schema", "noun"),
    [
        ({"allOf": [{"$ref": "#"}] * 201}, "references"),
        ({"properties": {str(n): {} for n in range(201)}}, "properties"),
        ({"enum": ["x" * 20_000]}, "characters"),
        (json.loads('{"items":' * 40 + "{}" + "}" * 40), "levels"),
    ],
)
def test_schemas_have_limits(server: Running, schema: Any, noun: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, body = post(server, CHAT, json.dumps(says("?", response_format=form)).encode())
    error = json.loads(body)["error"]
    assert status == 400 and noun in error["message"] and error["param"] == "response_format.json_schema"


def test_one_key_never_finds_what_another_asked(server: Running) -> None:
    body = json.dumps(says("a secret of some length " * 4, data_url(3), max_tokens=1)).encode()

    def cached(key: str) -> int:
        sent = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        status, reply = raw(server, f"{sent}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        assert status == 200
        return json.loads(reply)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(KEY) == 0 and cached(KEY) > 0 and cached(OTHER_KEY) == 0 and cached(OTHER_KEY) > 0


def test_a_failed_step_ends_nobody_elses_reply(server: Running, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step, failures = tiny_engine.step, iter([True])

    def failing() -> None:
        if next(failures, False):
            raise ValueError("between two requests")
        step()

    monkeypatch.setattr(tiny_engine, "step", failing)
    assert post(server, CHAT, json.dumps(says("hi")).encode())[0] == 200 and server.service.ready


def test_panics_of_libraries_are_errors(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    def panicking(_: Any) -> None:
        raise panic("words of a user")

    monkeypatch.setattr(server.service.processor, "render", panicking)
    monkeypatch.setattr(Processor, "prompt", lambda *_: panicking(None))
    status, body = post(server, CHAT, json.dumps(says("hi")).encode())
    assert status == 500 and json.loads(body)["error"]["code"] == "internal_error" and b"words" not in body


def test_one_key_does_not_keep_another_waiting(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten long texts of one key wait; the question of another comes after the texts in work, not after all."""
    encode, ended = Tokenizer.encode, threading.Semaphore(0)

    def slow(self: Tokenizer, text: str) -> list[int]:
        if "slow" in text:
            assert ended.acquire(timeout=60)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    sent = [(TOKENIZE, {"prompt": "slow"}), (COMPLETIONS, {"prompt": "slow", "max_tokens": 1}), (CHAT, says("slow"))] * 4
    threads = [threading.Thread(target=post, args=(server, path, json.dumps(body).encode())) for path, body in sent]
    for thread in threads:
        thread.start()
    wait_for_open(server, len(sent))  # texts to tokenize are counted, too
    body = json.dumps(says("hi")).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {OTHER_KEY}\r\nContent-Type: application/json\r\n"
    with ThreadPoolExecutor(1) as other:
        request = f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
        answer = other.submit(raw, server, request)
        wait_for_open(server, len(sent) + 1)
        ended.release(server.service.config.prepare_threads)  # the texts in work end, and no other
        assert answer.result()[0] == 200
    assert sum(thread.is_alive() for thread in threads) >= len(sent) - server.service.config.prepare_threads
    ended.release(len(sent))
    for thread in threads:
        thread.join()


def wait_for_open(server: Running, count: int) -> None:
    until = time.monotonic() + 60
    while server.service.num_open < count:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_places_go_to_groups_by_turns() -> None:
    async def order() -> list[str]:
        turns, out = Turns(2), []

        async def work(name: str) -> None:
            await turns.acquire(name[0])
            out.append(name)
            await asyncio.sleep(0.01)
            turns.release(name[0])

        tasks = [asyncio.ensure_future(work(name)) for name in ("a1", "a2", "a3", "a4", "a5", "b1", "c1", "b2")]
        await asyncio.sleep(0)
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await turns.acquire("d")
        await turns.acquire("d")  # one group alone has every place
        return out

    assert asyncio.run(order()) == ["a1", "a2", "b1", "a3", "c1", "b2", "a5"]


@pytest.mark.parametrize(("name", "status"), [("%0a", 404), ("", 404), ("tiny%0a", 404), ("tiny", 200), ("other", 404)])
def test_only_names_of_the_model_are_models(server: Running, name: str, status: int) -> None:
    head = f"GET /v1/models/{name} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    assert raw(server, head.encode())[0] == status


def test_texts_are_refused_before_they_are_tokenized(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: (texts.append(text), encode(self, text))[1])
    monkeypatch.setattr(server.service, "_token_bytes", 4)
    for path, body in ((CHAT, says("a" * 399_000)), (COMPLETIONS, {"prompt": ["b", "a" * 399_000]})):
        status, reply = post(server, path, json.dumps(body).encode())
        assert status == 400 and b"tokens or more" in reply and b"context_length_exceeded" in reply
    for path, body in ((CHAT, says("😀" * 200_000)), (COMPLETIONS, {"prompt": ["😀" * 100_000] * 2})):
        status, reply = post(server, path, json.dumps(body).encode())
        assert status == 400 and b"800000 bytes of text in UTF-8, the limit is 600000" in reply
    status, reply = post(server, TOKENIZE, json.dumps({"prompt": "😀" * 200_000}).encode())
    assert status == 400 and b"800000 bytes" in reply and not texts


@pytest.mark.parametrize("text", ["e\u0301" * 50, "각" * 50, "the quick fox " * 20, "  " * 200, "😀" * 9])
def test_no_token_stands_for_more_bytes_than_are_counted(tiny_engine: Engine, text: str) -> None:
    tokenizer = tiny_engine.processor.tokenizer
    assert len(text.encode()) <= max_token_bytes(tokenizer) * len(tokenizer.encode(text))


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
SMUGGLED = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "request_text",
    [
        HEAD + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
        HEAD + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}" + SMUGGLED,
        HEAD + "Content-Length: 2, 2\r\n\r\n{}" + SMUGGLED,
        HEAD + "Content-Length: +2\r\n\r\n{}" + SMUGGLED,
        HEAD + "Content-Length : 2\r\n\r\n{}" + SMUGGLED,
        HEAD + "X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
        HEAD + "X: a\nContent-Length: 2\r\n\r\n{}" + SMUGGLED,
        HEAD.replace("\r\n", "\n") + "Content-Length: 2\n\n{}" + SMUGGLED,
        HEAD + "Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + "Transfer-Encoding: chunked\r\n\r\n2 \r\n{}\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + "Transfer-Encoding: chunked\r\n\r\n2\n{}\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + "Transfer-Encoding: chunked\r\n\r\n0\r\nX: a\n\r\n\r\n" + SMUGGLED,
        HEAD + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD.replace("1.1", "1.0") + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    ],
)
def test_ambiguous_framing_closes_the_connection(server: Running, request_text: str) -> None:
    status, body = raw(server, request_text.encode(), 20)
    assert 400 <= status < 502 and b'"ok"' not in body  # nothing behind it is answered


def test_a_host_is_checked_whatever_the_flags(tiny_engine: Engine) -> None:
    def statuses(config: ServeConfig, keys: tuple[str, ...] = ()) -> list[int]:
        with running(tiny_engine, config, keys) as server:
            key = f"Authorization: Bearer {KEY}\r\n"
            get = "GET /v1/models HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n" + key + "\r\n"
            hosts = ("evil.example", f"127.0.0.1:{server.address[1]}", "localhost", "192.0.2.7:80", "[2001:db8::7]")
            return [raw(server, get.format(host).encode())[0] for host in hosts]

    assert statuses(CONFIG) == statuses(replace(CONFIG, no_key=True)) == [421, 200, 200, 421, 421]
    assert statuses(replace(CONFIG, no_key=True, host="0.0.0.0")) == [421, 200, 200, 200, 200]
    assert statuses(replace(CONFIG, no_key=True, allowed_hosts=("evil.example",))) == [200, 421, 421, 421, 421]
    assert statuses(CONFIG, (KEY,)) == [200] * 5


def test_an_unread_log_stops_nothing() -> None:
    """More lines than the pipe holds, then the end of the process, with a reader that reads nothing; and without any."""
    code = """if True:
        import logging, sys, time
        from ivl.serve import log
        log.MAX_WAITING = 100
        log.set_up_log()
        logger, begun = logging.getLogger("ivl.serve"), time.monotonic()
        for n in range(5000):
            logger.info("request", extra={"fields": {"n": n}})
        logging.getLogger("asyncio").error("Exception in callback x('words of a user')\\n{\\"event\\":\\"forged\\"}")
        print(time.monotonic() - begun < 5, flush=True)
    """
    read, write = os.pipe()
    for stderr in (write, subprocess.DEVNULL):
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, timeout=60, check=True)
        assert done.stdout.strip() == b"True"
    os.close(write)
    os.close(read)
    both = subprocess.run([sys.executable, "-c", code.replace("5000", "5")], capture_output=True, timeout=60, check=True)
    lines = [json.loads(line) for line in both.stderr.splitlines()]
    assert len(lines) == 6 and b"words" not in both.stderr and lines[-1]["event"] == "Exception in callback x"


def test_websocket_attempts_log_nothing(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    upgrade = "Connection: close, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    with caplog.at_level("WARNING"):
        sent = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n{upgrade}"
        thread = threading.Thread(target=lambda: raw(server, sent.encode(), 2), daemon=True)
        thread.start()
        thread.join(0.5)
    assert not [record for record in caplog.records if "upgrade" in record.getMessage().lower()]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"names": ("",)}, "names"), ({"names": (" ",)}, "names"), ({"keep_alive": 1e9}, "below"), ({"keep_alive": 0.0}, "above")],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServeConfig(**options)


def test_a_server_without_its_extra_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\", name='uvicorn')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', Path.cwd())}"}
    done = subprocess.run(
        [sys.executable, "-m", "ivl", "serve", "x"], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode != 0 and len(done.stderr.strip().splitlines()) == 1 and 'pip install "ivl[serve]"' in done.stderr


def test_a_long_reply_with_logprobs_stops_nothing(server: Running) -> None:
    body = says("?", n=4, logprobs=True, top_logprobs=20, ignore_eos=True, temperature=1.0, seed=1) | {"max_tokens": 500}
    with LoopClock(server) as clock:
        status, reply = post(server, CHAT, json.dumps(body).encode(), timeout=120)
    assert status == 200 and len(json.loads(reply)["choices"]) == 4 and clock.longest < GAP


def test_hostile_bodies_in_a_crowd(server: Running) -> None:
    out = flood(server, 40, seed=3, largest=4_000_000)
    assert not out.failures and out.megabytes < 200, out
    assert server.service.num_open == 0 and server.service.ready and asyncio.run(asyncio.sleep(0)) is None
    with pytest.raises(APIError):
        server.service.check(100)


def test_a_cache_beyond_memory_is_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ivl",
        "serve",
        str(tiny_directory(tmp_path)),
        "--port",
        "0",
        "--max-cache-tokens",
        "1" + "0" * 15,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr and "cache" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}]},
            "messages[0].content[0].image_url",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"k" * 1000: 1}, "k" * 100),
    ],
)
def test_param_names_fields_alone(server: Running, body: dict[str, Any], param: str) -> None:
    status, reply = post(server, CHAT, json.dumps(says("?") | body).encode())
    assert status == 400 and json.loads(reply)["error"]["param"] == param and len(reply) < 500
