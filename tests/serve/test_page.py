# pyright: basic, reportMissingImports=false
# ruff: noqa
"""The page: a conversation as it grows, what its gate lets through, and all of it in a browser."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio", reason="the page needs the web extra, whose gradio wants an older Pillow")
from PIL import Image

from ivl.errors import InputError
from ivl.inference.engine import Engine
from ivl.serve.examples import read_examples, write_examples
from ivl.serve.service import Service
from ivl.serve.talk import Session, Settings, Talk, View, as_markdown
from ivl.types import ImageRef, Message, SamplingParams, Text, VideoRef
from tests.inference.fakes import assert_idle, picture
from tests.serve.servers import CONFIG, KEY, Running, engine, running

pytest.importorskip("gradio", reason="the page needs gradio")
CHROMIUM = shutil.which("chromium")
SETTINGS = Settings(params=SamplingParams(max_new_tokens=12), max_tiles=3, num_frames=2)
LONG = replace(SETTINGS, params=SamplingParams(max_new_tokens=300, ignore_eos=True))
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


def slow(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 30 ms or more, so that there is time to stop one."""
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.03), step()))


def talking(engine: Engine, uploads: Path, script: Callable[[Talk], Coroutine[Any, Any, None]], **limits: int) -> None:
    async def main() -> None:
        config = replace(CONFIG, **limits)
        async with asyncio.timeout(20), Service(engine, config) as service:
            await script(Talk(service, config, uploads))

    asyncio.run(main())
    assert_idle(engine)


async def all_of(views: AsyncIterator[View]) -> list[View]:
    return [view async for view in views]


def saved(uploads: Path, seed: int, name: str = "", **options: Any) -> str:
    path = uploads / (name or f"{seed}.png")
    picture(seed).save(path, **options)
    return str(path)


def video(path: Path) -> str:
    av = pytest.importorskip("av", reason="videos need av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for seed in range(8):
            out.mux(stream.encode(av.VideoFrame.from_image(picture(seed).resize((64, 64)))))
        out.mux(stream.encode())
    return str(path)


# The conversation


def test_a_conversation_is_what_the_engine_would_say(tiny_engine: Engine, uploads: Path) -> None:
    files = [saved(uploads, 1), saved(uploads, 2)]
    images = [ImageRef(Path(file).read_bytes(), 3) for file in files]
    question = Message("user", (Text("Image-1: "), images[0], Text("\nImage-2: "), images[1], Text("\nwhat?")))
    first = tiny_engine.generate([(question,)], SETTINGS.params)[0]
    more = (question, Message("assistant", (Text(first.text.strip()),)), Message("user", (Text("and now?"),)))
    second = tiny_engine.generate([more], SETTINGS.params)[0]

    async def script(talk: Talk) -> None:
        session = Session()
        views = await all_of(talk.ask("what?", files, session, SETTINGS))
        assert [view.taken for view in views if view.taken is not None] == [True]
        assert all(view.running for view in views[:-1]) and not views[-1].running
        assert [view.tiles for view in views if view.tiles] == [views[1].tiles] and len(views[1].tiles or []) == 2
        assert "2 tiles" in views[-1].status and "tokens out" in views[-1].status
        assert (views[-1].chat or [])[-1]["content"] == as_markdown(first.text).strip()
        await all_of(talk.ask("and now?", [], session, SETTINGS))
        assert [message.text for message in session.messages[1::2]] == [first.text.strip(), second.text.strip()]
        assert [row["role"] for row in session.shown] == ["user", "user", "user", "assistant", "user", "assistant"]

    talking(tiny_engine, uploads, script)


def test_videos_and_animations_are_seen_as_frames(tiny_engine: Engine, uploads: Path) -> None:
    frames = [picture(n) for n in range(4)]
    moving = saved(uploads, 5, "moving.gif", save_all=True, append_images=frames)
    files = [video(uploads / "v.mp4"), moving, saved(uploads, 6, "still.gif")]

    async def script(talk: Talk) -> None:
        kinds = [type(part) for part in talk.message("?", [Path(file) for file in files], SETTINGS).content]
        assert kinds.count(VideoRef) == 2 and kinds.count(ImageRef) == 1
        views = await all_of(talk.ask("what happens?", files[:1], Session(), SETTINGS))
        assert len(next(view.tiles for view in views if view.tiles)) == SETTINGS.num_frames

    talking(tiny_engine, uploads, script)


def test_what_cannot_be_answered_is_said_and_changes_nothing(tiny_engine: Engine, uploads: Path) -> None:
    outside = uploads.parent / "private.png"
    picture(1).save(outside)
    (uploads / "link.png").symlink_to(outside)
    (uploads / "cut.png").write_bytes(Path(saved(uploads, 1)).read_bytes()[:150])
    cases: list[tuple[str, list[str], str]] = [
        ("", [], "ask something"),
        ("?", [saved(uploads, 1, "a.tiff")], "TIFF"),
        ("?", [saved(uploads, 1, "a.png", format="TIFF")], "TIFF"),
        ("?", [str(outside)], "only files that were sent"),
        ("?", [str(uploads / ".." / "private.png")], "only files that were sent"),
        ("?", [str(uploads / "link.png")], "only files that were sent"),
        ("?", [str(uploads / "gone.png")], "attach it again"),
        ("?", [str(uploads / "cut.png")], ""),
        ("?", [saved(uploads, n) for n in range(5)], "5 images, the limit"),
        ("<image> ?", [saved(uploads, 1), saved(uploads, 2)], "marks"),
        ("word " * 900, [], "tokens"),
        ("w" * 5001, [], "5,001 characters"),
    ]
    Image.new("RGB", (300, 300)).save(uploads / "large.png")
    cases.append(("?", [str(uploads / "large.png")], "300 x 300 pixels"))

    async def script(talk: Talk) -> None:
        talk.config = replace(talk.config, media=replace(talk.config.media, max_pixels=50_000))
        session = Session()
        await all_of(talk.ask("hello", [], session, SETTINGS))
        before = session.messages, list(session.shown)
        for text, files, words in cases:
            views = await all_of(talk.ask(text, files, session, SETTINGS))
            said = views[-1].status
            assert said.startswith("⚠") and words in said and str(uploads) not in said, (text[:20], said)
            assert not any(view.taken for view in views) and not views[-1].running
            assert (session.messages, session.shown) == before
        assert len(await all_of(talk.ask("goes on", [], session, SETTINGS))) > 2 and len(session.messages) == 4

    talking(tiny_engine, uploads, script, max_images=4, max_text_chars=5000)


def test_stop_keeps_what_was_said(tiny_engine: Engine, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(tiny_engine, monkeypatch)

    async def script(talk: Talk) -> None:
        session, views = Session(), []
        async for view in talk.ask("tell", [], session, LONG):
            views.append(view)
            if len(views) == 6:
                assert session.stream is not None
                request = session.stream.request
                session.stop()
                count = len(request.tokens)
        assert len(request.tokens) <= count + 1
        assert views[-1].status.endswith("stopped") and not views[-1].running
        assert 0 < len(session.messages[-1].text) and len(session.messages) == 2
        await all_of(talk.ask("go on", [], session, SETTINGS))
        assert request.cancelled and len(request.tokens) <= count + 1
        assert len(session.messages) == 4 and session.messages[-1].text

    talking(tiny_engine, uploads, script)


def test_who_begins_anew_or_leaves_hears_no_more(tiny_engine: Engine, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(tiny_engine, monkeypatch)

    async def script(talk: Talk) -> None:
        session, count = Session(), 0
        async for _ in talk.ask("tell", [], session, LONG):
            count += 1
            if count == 4:
                session.clear()
        assert count == 4 and session.messages == () and session.shown == []
        leaving = talk.ask("tell", [], session, LONG)
        for _ in range(4):
            await anext(leaving)
        await leaving.aclose()  # type: ignore[attr-defined]
        assert talk.service.num_open == 0 and len(session.messages) == 2

    talking(tiny_engine, uploads, script)


def test_a_reply_that_fails_gives_the_question_back(
    tiny_engine: Engine, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(talk: Talk) -> None:
        session = Session()
        monkeypatch.setattr(tiny_engine, "step", lambda: 1 / 0)
        views = await all_of(talk.ask("secret", [], session, SETTINGS))
        assert views[-1].taken is False and views[-1].chat == [] and session.messages == ()
        assert "something went wrong" in views[-1].status
        monkeypatch.undo()
        await all_of(talk.ask("again", [], session, SETTINGS))
        assert len(session.messages) == 2

    talking(tiny_engine, uploads, script)


def test_pictures_of_all_visitors_together_are_limited(tiny_engine: Engine, uploads: Path) -> None:
    file = saved(uploads, 1)
    size = Path(file).stat().st_size

    async def script(talk: Talk) -> None:
        one, two = Session(), Session()
        await all_of(talk.ask("?", [file], one, SETTINGS))
        refused = await all_of(talk.ask("?", [file], two, SETTINGS))
        assert "for all visitors" in refused[-1].status
        one.clear()
        await all_of(talk.ask("?", [file], two, SETTINGS))
        assert len(two.messages) == 2

    talking(tiny_engine, uploads, script, max_held_bytes=size * 3 // 2)


def test_boxes_are_drawn_on_the_last_picture(tiny_engine: Engine, uploads: Path) -> None:
    async def script(talk: Talk) -> None:
        white = io.BytesIO()
        Image.new("RGB", (2000, 1000), "white").save(white, "PNG")
        messages = (Message("user", (ImageRef(b"not this one"), ImageRef(white.getvalue()), Text("where?"))),)
        assert talk.boxes("no box", messages) == [] == talk.boxes("<box>[[0, 0, 9, 9]]</box>", ())
        said = "<ref>the cat</ref><box>[[100, 200, 500, 900]]</box>"
        (row,) = talk.boxes(said, messages)
        assert row["content"]["alt_text"] == "boxes: the cat"
        with Image.open(row["content"]["path"]) as drawn:
            red, green, _ = drawn.convert("RGB").getpixel((161, 300))  # type: ignore[misc]
            assert drawn.size == (1600, 800) and red > 180 > 120 > green  # its left edge
            assert drawn.convert("RGB").getpixel((1200, 300)) == (255, 255, 255)

    talking(tiny_engine, uploads, script)


def test_tags_are_shown_and_code_is_left_alone() -> None:
    assert as_markdown("<ref>a</ref> 1 < 2 & `x<y` &amp;") == "&lt;ref>a&lt;/ref> 1 &lt; 2 &amp; `x<y` &amp;amp;"
    assert as_markdown("```html\n<b>\n```\n<b>") == "```html\n<b>\n```\n&lt;b>"
    assert as_markdown("```\n<b>") == "```\n<b>"  # still being written


def test_examples_are_read_as_they_were_written(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    model = tmp_path / "model"
    model.mkdir()
    assert read_examples(model) == []
    write_examples(model, [("what?", [tmp_path / "a.png"]), ("hello", [])])
    first, second = read_examples(model)
    assert first["text"] == "what?" and Path(first["files"][0]).read_bytes() == (tmp_path / "a.png").read_bytes()
    assert second == {"text": "hello", "files": []}
    for wrong in ('[{"text": "x", "images": ["../a.png"]}]', '{"text": 1}', "[1]", "no json", '[{"images": []}]'):
        (model / "examples.json").write_text(wrong)
        with pytest.raises(InputError, match="examples.json"):
            read_examples(model)


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
    refused: list[str] = []
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
        assert set(foreign) == {LEAK} and set(refused) <= {f"{server.url}/"}, (foreign, refused)
        assert {why for url, why in blocked if url == LEAK} == {"csp"}

        # an open page does not hold up a server that ends
        started = time.monotonic()
        server.terminate()
        server.thread.join(5)
        assert not server.thread.is_alive() and time.monotonic() - started < 4
        browser.close()
    assert_idle(tiny_engine)
