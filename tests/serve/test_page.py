"""The page: what its gate lets through, and all of it in a browser."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from ivl.inference.engine import Engine
from ivl.serve.examples import write_examples
from ivl.types import SamplingParams
from tests.helpers.engines import assert_idle, picture
from tests.helpers.servers import KEY, Running, engine, running, saved, slow

pytest.importorskip("gradio", reason="the page needs gradio")
CHROMIUM = shutil.which("chromium")
LEAK = "http://192.0.2.1/leak.png"
BASIC = ("anybody", KEY)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "model"


@pytest.fixture(scope="module")
def tiny_engine(directory: Path) -> Engine:
    made = engine(directory)
    picture(9).save(directory.parent / "example.png")
    write_examples(directory, [("what colour is the circle?", [directory.parent / "example.png"])])
    return made


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


# The gate


@pytest.fixture(scope="module")
def server(tiny_engine: Engine, directory: Path) -> Generator[Running]:
    with running(tiny_engine, page_of=directory) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Generator[httpx.Client]:
    with httpx.Client(base_url=server.url, auth=BASIC, timeout=10) as client:
        yield client


USED = ("/", "/theme.css", "/assets/x.js", "/gradio_api/upload_progress?upload_id=x", "/gradio_api/queue/data?session_hash=x")
HIDDEN = (
    "/config", "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/app_id", "/monitoring", "/monitoring/summary",
    "/gradio_api/queue/status", "/gradio_api/runs", "/gradio_api/run-history/buckets", "/gradio_api/proxy=http://127.0.0.1/",
    "/gradio_api/file=http://127.0.0.1/", "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/login", "/svelte/x",
    "/gradio_api/vibe-code", "/gradio_api/deep_link?session_hash=x", "/gradio_api/dev/reload", "/gradio_api/call/ask/x",
    "/gradio_api/mcp/", "/gradio_api/token", "/gradio_api/user", "/none", "/assets/../config", "/assets/%2e%2e/config",
)  # fmt: skip


def test_without_a_key_no_route_of_the_page_answers_and_browsers_ask_for_one(server: Running) -> None:
    posts = ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel")
    for method, paths in (("GET", USED + HIDDEN), ("POST", posts), ("HEAD", ("/",))):
        for path in paths:
            response = httpx.request(method, server.url + path)
            assert response.status_code == 401 and response.headers["www-authenticate"].startswith("Basic realm=")


def test_of_gradio_only_what_the_page_uses_answers(client: httpx.Client) -> None:
    assert client.get("/").status_code == client.get("/theme.css").status_code == 200
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    for path in HIDDEN:
        assert client.get(path).status_code == 404, path
        assert client.post(path, json={}).status_code == 404, path
    assert client.get("/?deep_link=../../x").text == client.get("/").text
    assert client.get("/v1/models").status_code == client.get("/health").status_code == 200


def event(*files: Any, **more: Any) -> dict[str, Any]:
    named = [{"path": file, "meta": {"_type": "gradio.FileData"}} for file in files]
    return {"data": [{"text": "?", "files": named}], "fn_index": 0, "session_hash": "abc", **more}


@pytest.mark.parametrize("route", ["/gradio_api/queue/join", "/gradio_api/run/predict"])
def test_events_name_no_file_that_was_not_sent(client: httpx.Client, route: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    sent = client.post("/gradio_api/upload", files={"files": ("a.png", b"x", "image/png")}).json()[0]
    names = ("/etc/passwd", str(tmp_path / "a.png"), "http://127.0.0.1:1/a.png", f"{sent}/../../../etc/passwd", 3, None, "\0")
    for name in names:
        assert client.post(route, json=event(name)).status_code == 403, name
        assert client.post(route, json={"data": [[{"deep": {"path": name}}]], "session_hash": "x"}).status_code == 403
    assert client.post(route, content=b"{").status_code == 400
    assert client.post(route, content=b"[" * 200_000).status_code == 400
    assert client.post(route, content=b" " * (9 << 20)).status_code == 413
    assert client.get(f"/gradio_api/file={sent}").content == b"x"


def test_other_pages_cannot_speak_for_a_visitor(client: httpx.Client) -> None:
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://evil.example"}):
        for route in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/cancel"):
            assert client.post(route, json=event(), headers=headers).status_code == 403
    files = {"files": ("a.png", b"x", "image/png")}
    for headers in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": str(client.base_url).rstrip("/")}, {}):
        assert client.post("/gradio_api/upload", files=files, headers=headers).status_code == 200


# In a browser


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(tiny_engine: Engine, directory: Path, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    tiff = saved(uploads, 1, "photo.tiff")
    files = [saved(uploads, 2), saved(uploads, 3)]
    data = base64.b64encode(Path(saved(uploads, 4)).read_bytes()).decode()
    foreign: list[str] = []
    blocked: list[tuple[str, str | None]] = []
    with running(tiny_engine, page_of=directory) as server, api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        login = {"username": "anybody", "password": KEY}
        page = browser.new_page(viewport={"width": 1280, "height": 900}, http_credentials=login)
        page.set_default_timeout(8000)
        own = (server.url, "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or foreign.append(request.url))
        page.goto(server.url)
        page.on("console", lambda m: print(m.text))
        page.on("requestfailed", lambda request: blocked.append((request.url, request.failure)))
        page.on("response", lambda r: r.status >= 400 and print(r.status, r.url))
        box, status, chat = page.locator("#ask textarea"), page.locator("#status"), page.locator("#chat")

        def answered() -> None:
            page.wait_for_function("/ out/.test(document.querySelector('#status').innerText)")
            page.locator("#ask .submit-button").wait_for()

        # an example: click, Enter, answer, its tiles
        page.locator("#examples .gallery-item").first.click()
        page.wait_for_function("document.querySelector('#ask textarea').value == 'what colour is the circle?'")
        box.press("Enter")
        answered()
        assert box.input_value() == "" and "tile" in status.inner_text()
        assert page.locator("#ask .thumbnail-item").count() == 0
        assert chat.locator("img").count() == 1
        page.locator("#sees > button").click()
        page.locator("#tiles img").first.wait_for()

        # what is refused stays in the box
        page.locator("#ask input[type=file]").set_input_files([tiff])
        box.fill("what is this?")
        page.locator("#ask .thumbnail-item").wait_for()
        box.press("Enter")
        page.wait_for_function("document.querySelector('#status').innerText.includes('TIFF')")
        assert box.input_value() == "what is this?" and page.locator("#ask .thumbnail-item").count() == 1

        # a new conversation, with two chosen files, one pasted and one dropped
        page.locator("#clear").click()
        page.wait_for_function("!document.querySelector('#chat img')")
        page.reload()
        page.locator("#ask input[type=file]").set_input_files(files)
        page.wait_for_function("document.querySelectorAll('#ask .thumbnail-item').length == 2")
        for kind, count in (("paste", 3), ("drop", 4)):
            page.evaluate(
                """([data, kind]) => {
                    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), moved = new DataTransfer();
                    moved.items.add(new File([bytes], kind + ".png", { type: "image/png" }));
                    const options = { bubbles: true, cancelable: true };
                    const event = kind == "paste" ? new ClipboardEvent(kind, { clipboardData: moved, ...options })
                                                  : new DragEvent(kind, { dataTransfer: moved, ...options });
                    document.querySelector("#ask textarea").dispatchEvent(event);
                }""",
                [data, kind],
            )
            page.wait_for_function(f"document.querySelectorAll('#ask .thumbnail-item').length == {count}")
        box.fill("what are <b>these</b>? ![x](" + LEAK + ")")
        box.press("Enter")
        answered()
        assert chat.locator("img").count() >= 4 and "<b>these</b>" in chat.inner_text()

        assert page.locator("#ask .thumbnail-item").count() == 0
        page.locator("#clear").click()
        page.wait_for_function("!document.querySelector('#chat img')")

        # stop: the engine is idle at once, what was said stays, the next question works
        slow(tiny_engine, monkeypatch)
        box.fill("tell me more")
        monkeypatch.setattr("ivl.serve.page.SamplingParams", partial(SamplingParams, ignore_eos=True))
        box.press("Enter")
        page.locator("#ask .stop-button").wait_for()
        page.locator("#ask .stop-button").click()
        page.wait_for_function("/stopped/.test(document.querySelector('#status').innerText)")
        page.locator("#ask .submit-button").wait_for()
        assert server.service.num_open == 0 and len(chat.inner_text()) > len("tell me more")
        monkeypatch.undo()
        box.fill("and now?")
        box.press("Enter")
        page.wait_for_function("document.querySelector('#chat').innerText.includes('and now?')")
        answered()

        # a phone: nothing is wider than its screen
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_function("document.documentElement.scrollWidth == 390")
        assert set(foreign) == {LEAK}, foreign
        assert {why for url, why in blocked if url == LEAK} == {"csp"}

        # an open page does not hold up a server that ends
        started = time.monotonic()
        server.terminate()
        server.thread.join(5)
        assert not server.thread.is_alive() and time.monotonic() - started < 4
        browser.close()
    assert_idle(tiny_engine)
