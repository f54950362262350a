"""The routes from outside, in this process: keys, limits, errors and what is logged."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import shlex
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from ivl.inference.engine import Engine
from ivl.serve.app import create_app
from ivl.serve.fetch import Fetcher
from ivl.serve.log import JSONLines, ReadableLines
from ivl.serve.service import Service
from tests.helpers.engines import picture
from tests.helpers.servers import CONFIG, KEY, data_url, engine, running, says, slow

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def client_of(
    engine: Engine, *, keys: tuple[str, ...] = (KEY,), key: str | None = KEY, **limits: Any
) -> AsyncIterator[httpx.AsyncClient]:
    config = replace(CONFIG, **limits)
    app = create_app(service := Service(engine, config), config, keys=keys)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with service, httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        client.app = app  # type: ignore[attr-defined]
        yield client


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and response.headers["x-request-id"]
    return error


def test_no_route_but_health_opens_without_a_key(tiny_engine: Engine) -> None:
    async def walk() -> None:
        async with client_of(tiny_engine, key=None) as client:
            paths = {*client.app.openapi()["paths"], "/openapi.json"}  # type: ignore[attr-defined]
            assert {CHAT, "/metrics", "/openapi.json", "/ready"} <= paths
            for path in [*paths, "/", "/none", "//health", "/health/", "/health%2f", "/HEALTH", "/.//health"]:
                for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
                    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic Og=="}):
                        response = await client.request(method, path.replace("{name}", "tiny"), headers=headers)
                        if path == "/health":
                            assert response.status_code in (200, 405)
                        else:
                            assert response.status_code == 401, (method, path)
                            assert response.headers["www-authenticate"] == 'Basic realm="ivl"'

    run(walk)


def test_every_key_opens(tiny_engine: Engine) -> None:
    async def walk() -> None:
        for key in (KEY, "another-key-0123456789"):
            async with client_of(tiny_engine, keys=(KEY, "another-key-0123456789"), key=key) as client:
                for path in ("/v1/models", "/ready", "/metrics", "/openapi.json"):
                    assert (await client.get(path)).status_code == 200

    run(walk)


def test_errors_have_one_shape(tiny_engine: Engine) -> None:
    async def walk() -> None:
        async with client_of(tiny_engine, max_body_bytes=2000) as client:
            plain = {"Content-Type": "text/plain"}
            chunks = (b" " * 500 for _ in range(9))

            async def endless() -> AsyncIterator[bytes]:
                for chunk in chunks:
                    yield chunk

            for response, status in (
                (await client.get("/none"), 404),
                (await client.get(CHAT), 405),
                (await client.post(CHAT, content="{}", headers=plain), 415),
                (await client.post(CHAT, content="{}"), 415),
                (await client.post(CHAT, content="{", headers={"Content-Type": "application/json"}), 400),
                (await client.post(CHAT, json={}), 400),
                (await client.post(CHAT, json=says("x" * 3000)), 413),
                (await client.post(CHAT, content=endless(), headers={"Content-Type": "application/json"}), 413),
                (await client.post(CHAT, json=says("?", "data:image/png;base64,aaaa")), 400),
                (await client.post("/tokenize", json={"prompt": "a", "messages": []}), 400),
            ):
                assert response.status_code == status, response.text
                error_of(response)

    run(walk)


def test_a_page_of_another_name_cannot_reach_an_open_server(tiny_engine: Engine) -> None:
    async def walk() -> None:
        async with client_of(tiny_engine, keys=(), key=None) as client:
            for host, status in (
                ("localhost:8000", 200),
                ("127.0.0.1", 200),
                ("[::1]:80", 200),
                ("evil.example", 421),
                ("", 421),
            ):
                assert (await client.get("/v1/models", headers={"Host": host})).status_code == status
        async with client_of(tiny_engine) as client:
            assert (await client.get("/v1/models", headers={"Host": "my.example"})).status_code == 200

    run(walk)


def test_tokenize_counts_what_chat_counts(tiny_engine: Engine) -> None:
    async def walk() -> None:
        async with client_of(tiny_engine) as client:
            body = says("what colour?", data_url(1))
            counted = (await client.post("/tokenize", json={"messages": body["messages"]})).json()
            replied = (await client.post(CHAT, json=body)).json()
            assert counted["count"] == len(counted["tokens"]) == replied["usage"]["prompt_tokens"]
            text = (await client.post("/tokenize", json={"prompt": "what colour?"})).json()
            assert text["tokens"] == tiny_engine.processor.tokenizer.encode("what colour?")  # type: ignore[attr-defined]

    run(walk)


def test_limits_of_size(tiny_engine: Engine) -> None:
    async def walk() -> None:
        async with client_of(
            tiny_engine, max_prompt_tokens=60, max_request_tiles=2, max_images=3, max_text_chars=500
        ) as client:
            for body, words in (
                (says("x" * 100), "the limit is 60"),
                (says("x" * 501), "the limit is 500"),
                (says("?", *[data_url(n) for n in range(3)]), "the limit is 2"),
                (says("?", *[data_url(n) for n in range(4)]), "the limit is 3"),
            ):
                response = await client.post(CHAT, json=body)
                assert response.status_code == 400 and words in error_of(response)["message"]

    run(walk)


def test_a_reply_that_takes_too_long(tiny_engine: Engine, monkeypatch: Any) -> None:
    slow(tiny_engine, monkeypatch)

    async def walk() -> None:
        async with client_of(tiny_engine, request_timeout=2.0) as client:
            body = says("?", max_tokens=500, temperature=1.5, seed=1)
            response = await client.post(CHAT, json=body)
            assert response.status_code == 503 and error_of(response)["code"] == "timeout"
            streamed = (await client.post(CHAT, json=body | {"stream": True})).text
            assert '"code": "timeout"' in streamed and streamed.endswith("data: [DONE]\n\n")

    run(walk)


def test_metrics_count(tiny_engine: Engine) -> None:
    async def walk() -> None:
        async with client_of(tiny_engine) as client:
            for _ in range(2):
                await client.post(CHAT, json=says("what?", data_url(1)))
            text = (await client.get("/metrics")).text
            for line in (
                'ivl_requests_total{route="/v1/chat/completions",status="200"} 2.0', "ivl_replies_open 0.0",
                "ivl_time_to_first_token_seconds_count 2.0", "ivl_reply_tokens_count 2.0",
            ):  # fmt: skip
                assert line in text
            for name in ("vision_hits", "vision_misses", "prefix_hit_tokens", "new_tokens", "steps"):
                assert f"\nivl_{name}_total " in text

    run(walk)


def test_fetched_media_count_as_held_until_they_are_prepared(tiny_engine: Engine, monkeypatch: Any) -> None:
    file = io.BytesIO()
    picture(1).save(file, "png")
    size = len(file.getvalue())

    async def fetched(self: Fetcher, url: str, max_bytes: int) -> bytes:
        return file.getvalue()

    monkeypatch.setattr(Fetcher, "get", fetched)

    async def walk() -> None:
        async with client_of(tiny_engine, max_held_bytes=2 * size) as client:
            for count, status in ((2, 429), (1, 200), (2, 429), (1, 200)):
                response = await client.post(CHAT, json=says("what?", *["http://good.example/x.png"] * count))
                assert response.status_code == status
                if status == 429:
                    assert error_of(response)["code"] == "busy"

    run(walk)


def test_the_log_never_holds_what_users_write(tiny_engine: Engine, monkeypatch: Any) -> None:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JSONLines().format(record))

    handler = Lines()
    log = logging.getLogger("ivl.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    async def walk() -> None:
        async with client_of(tiny_engine) as client:
            await client.post(CHAT, json=says("SECRET"))
            await client.post(CHAT + "?SECRET", json=says("?", "data:image/png;base64,SECRET"))
            await client.get("/SECRET")
            monkeypatch.setattr(tiny_engine, "prepare_all", lambda *_: {}["SECRET"])
            assert (await client.post(CHAT, json=says("SECRET"))).status_code == 500

    try:
        run(walk)
    finally:
        log.removeHandler(handler)
    parsed = [json.loads(line) for line in lines]
    assert [line["status"] for line in parsed if line["event"] == "request"] == [200, 400, 404, 500]
    assert any(line.get("error") == "KeyError" for line in parsed)
    assert not any("SECRET" in line or "base64" in line for line in lines)


def test_on_a_terminal_the_log_is_lines_to_read() -> None:
    fields = {"id": "abc", "route": "/v1/chat/completions", "status": 200, "new_tokens": 1234, "finish": ["stop"], "tiles": 0}
    record = logging.makeLogRecord({"name": "ivl.serve", "msg": "request", "levelname": "INFO", "fields": fields})
    line = ReadableLines().format(record)
    assert (
        line[8:] == " request  route /v1/chat/completions  status 200  new_tokens 1,234  finish stop"
        and line[2] == line[5] == ":"
    )
    record = logging.makeLogRecord({"name": "asyncio", "msg": "lost 'SECRET\x1b[2J'", "levelname": "WARNING"})
    assert ReadableLines().format(record)[8:] == " warning: lost"


def test_a_terminal_learns_where_to_open_the_page(tiny_engine: Engine, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("ivl.serve"), "info", lambda text, extra=None: lines.append(f"{text} {extra}"))
    with running(tiny_engine, page_of=Path("nowhere")) as server:
        assert f"'open': '{server.url}/'" in lines[0] and f"'base_url': '{server.url}/v1'" in lines[0]
        assert f"curl {server.url}/v1/chat/completions" in lines[1] and '"content": "Hello"' in lines[1]
        assert 'json\' -H "Authorization: Bearer $KEY" -d' in lines[1]


def test_a_terminal_learns_of_no_key_where_there_is_none(tiny_engine: Engine, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("ivl.serve"), "info", lambda text, extra=None: lines.append(text))
    with running(tiny_engine, keys=()) as server:
        *words, body = shlex.split(lines[1].removeprefix("try: "))
        assert words == ["curl", f"{server.url}{CHAT}", "-H", "Content-Type: application/json", "-d"]
        assert httpx.post(words[1], json=json.loads(body)).status_code == 200


def test_the_openapi_document_knows_its_bodies(tiny_engine: Engine) -> None:
    async def walk() -> None:
        async with client_of(tiny_engine) as client:
            document = (await client.get("/openapi.json")).json()
            for path, kind in (
                (CHAT, "ChatRequest"),
                ("/v1/completions", "CompletionRequest"),
                ("/tokenize", "TokenizeRequest"),
            ):
                operation = document["paths"][path]["post"]
                assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(kind)
                assert kind in document["components"]["schemas"] and "422" not in operation["responses"]

    run(walk)
