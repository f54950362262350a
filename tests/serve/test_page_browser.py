"""The page in a browser: questions with media, streaming, stop, retry, edit, boxes, errors, keys, looks."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import ivl
from ivl.inference.engine import Engine
from ivl.serve.page import FILES, write_examples
from ivl.types import SamplingParams
from tests.helpers.engines import assert_idle, picture
from tests.helpers.servers import CONFIG, KEY, Running, engine, running, saved, slow

api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
api.expect.set_options(timeout=15_000)
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
LEAK = "http://192.0.2.1/leak.png"
GROUNDED = "<ref>a phrase that is longer than its box</ref><box>[[900, 900, 1000, 1000]]</box>"
CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = (color) => color.slice(0, 3).map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const color = rgba(getComputedStyle(e).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255];
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const isField = element.matches("textarea, input[type=password]");
        if (!element.checkVisibility() || element.matches("option, noscript")) continue;
        if (!isField && ![...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
        const pseudo = isField && !element.value ? "::placeholder" : null;
        const [a, b] = [luminance(rgba(getComputedStyle(element, pseudo).color)), luminance(behind(element))];
        found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 200)]);
    }
    return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.fixture(scope="module")
def tiny_engine(directory: Path) -> Engine:
    made = engine(directory)
    picture(9).resize((280, 140)).save(directory.parent / "example.png")
    write_examples(directory, [("what colour is the circle?", [directory.parent / "example.png"]), ("hello", [])])
    return made


@pytest.fixture(scope="module")
def server(tiny_engine: Engine, directory: Path) -> Generator[Running]:
    with running(tiny_engine, page_of=directory) as server:
        yield server
    assert_idle(tiny_engine)


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, server: Running) -> Generator[Opened]:
    """Opens the page with a key, and sees to it that nothing goes wrong and nothing is fetched from elsewhere."""
    contexts, faults = [], []

    def open_page(key: str = KEY, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: "Content Security Policy" in m.text and faults.append(m.text))
        page.on("request", lambda r: r.url.startswith((server.url, "data:", "blob:")) or faults.append(r.url))
        page.goto(server.url)
        if key:
            page.fill("#key", key)
            page.press("#key", "Enter")
            page.locator("#examples button").nth(1).wait_for()
            page.evaluate("document.querySelector('#max_tokens').value = 12")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def ask(page: Any, text: str) -> None:
    """Ask, and wait until the reply has ended."""
    page.fill("#text", text)
    page.press("#text", "Enter")
    api.expect(page.locator("#text")).to_have_value("")
    page.locator("body:not(.busy)").wait_for()


def stage(page: Any, reply: str, end: str = "data: [DONE]\n\n") -> None:
    """Have the server's next replies be this one."""
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in reply.splitlines(keepends=True)]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def test_a_key_is_asked_for_once_a_tab(opened: Opened, server: Running) -> None:
    page = opened(key="")
    page.locator("#login").wait_for()
    page.keyboard.press("Escape")
    assert page.locator("#login").is_visible() and page.title() == "ivl" and page.locator("#name").inner_text() == "ivl"
    for wrong, words in (("with space", "no spaces"), ("another-key-of-some-length", "refuses this key")):
        page.fill("#key", wrong)
        page.press("#key", "Enter")
        page.locator("#login-problem", has_text=words).wait_for()
    page.fill("#key", KEY)
    page.click("#login button")
    page.locator("#examples button").first.wait_for()
    assert page.title() == "tiny · ivl" and "parameters · 600 tokens of context" in page.locator("#facts").inner_text()
    page.reload()
    page.locator("#examples button").first.wait_for()
    assert not page.locator("#login").is_visible() and page.evaluate("localStorage.length + document.cookie.length") == 0
    assert page.locator("#address").inner_text() == f"{server.url}/v1"


def test_a_conversation_is_what_the_engine_would_say(opened: Opened, tiny_engine: Engine, tmp_path: Path) -> None:
    page = opened()
    files = [saved(tmp_path, 1), saved(tmp_path, 2)]
    page.set_input_files("#files", files)
    page.locator("#media li").nth(1).wait_for()
    ask(page, "what?")
    ask(page, "and now?")
    params, first = SamplingParams(max_new_tokens=12), ivl.ask("what?", *files)
    one = tiny_engine.generate([first], params)[0].text.strip()
    said = ivl.types.Message("assistant", (ivl.types.Text(one),))
    two = tiny_engine.generate([(*first, said, *ivl.ask("and now?"))], params)[0].text.strip()
    shown = page.locator(".turn").evaluate_all("all => all.map(turn => turn.innerText)")
    assert len(shown) == 2 and all("tokens in" in text and "out" in text for text in shown)
    assert "cached" in shown[1] and page.locator(".question img").count() == 2
    copied = []
    for n in range(2):
        page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        page.locator(".turn").nth(n).get_by_text("Copy").click()
        copied.append(page.evaluate("window.copied").strip())
    assert copied == [one, two]


def test_pictures_come_by_choice_paste_and_drop_and_go(opened: Opened, tmp_path: Path) -> None:
    page = opened()
    page.set_input_files("#files", [saved(tmp_path, 1), saved(tmp_path, 2)])
    data = base64.b64encode(Path(saved(tmp_path, 3)).read_bytes()).decode()
    for kind in ("paste", "drop"):
        page.evaluate(
            """([data, kind]) => {
                const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), moved = new DataTransfer();
                moved.items.add(new File([bytes], kind + ".png", { type: "image/png" }));
                const options = { bubbles: true, cancelable: true };
                const event = kind == "paste" ? new ClipboardEvent(kind, { clipboardData: moved, ...options })
                                              : new DragEvent(kind, { dataTransfer: moved, ...options });
                document.querySelector("#text").dispatchEvent(event);
            }""",
            [data, kind],
        )
    api.expect(page.locator("#media small", has_text="1 tile")).to_have_count(4)
    assert page.locator("#media img").evaluate_all("all => all.map(image => image.naturalWidth)") == [28] * 4
    page.get_by_label("Remove 2.png").click()
    assert page.locator("#media li").all_inner_texts() == [f"{name}\n1 tile\n✕" for name in ("1.png", "paste.png", "drop.png")]
    page.fill("#text", "kept")
    page.get_by_label("Remove paste.png").click()
    assert page.input_value("#text") == "kept" and page.locator("#media li").count() == 2


def test_an_example_fills_the_box(opened: Opened) -> None:
    page = opened()
    page.locator("#examples button").first.click()
    page.locator("#media img").wait_for()
    assert page.input_value("#text") == "what colour is the circle?"
    assert page.evaluate("document.activeElement.id") == "text"
    page.press("#text", "Shift+Enter")
    assert page.input_value("#text").endswith("\n") and page.locator(".turn").count() == 0
    page.press("#text", "Enter")
    page.locator(".usage").filter(has_text="out").wait_for()
    assert page.locator(".question p").inner_text() == "what colour is the circle?" and not page.locator("#empty").is_visible()
    page.click("#restart")
    assert page.locator("#empty").is_visible() and page.locator(".turn").count() == 0


def test_stop_retry_and_edit(
    opened: Opened, server: Running, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = opened()
    page.fill("#max_tokens", "500")
    slow(tiny_engine, monkeypatch)
    endless = {"ignore_eos": True}
    page.route("**/v1/*/*", lambda route: route.continue_(post_data=json.dumps({**route.request.post_data_json, **endless})))
    page.set_input_files("#files", [saved(tmp_path, 1)])
    page.fill("#text", "tell me")
    for how in ("button", "key"):
        page.press("#text", "Enter") if how == "button" else page.locator(".retry").click()
        api.expect(page.locator(".answer")).to_have_text(re.compile(".{5}", re.DOTALL))
        assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
        assert server.service.num_open == 1 and not page.get_by_text("Edit").is_visible()
        page.click("#stop") if how == "button" else page.keyboard.press("Escape")
        page.locator(".usage").filter(has_text="stopped").wait_for()
        deadline = time.monotonic() + 3
        while server.service.num_open and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.service.num_open == 0 and page.locator("#send").is_visible()
    page.unroute("**/v1/*/*")
    monkeypatch.undo()
    page.fill("#max_tokens", "12")
    ask(page, "go on")
    assert page.locator(".turn").count() == 2

    page.get_by_text("Edit").first.click()
    assert page.input_value("#text") == "tell me" and page.locator("#media img").count() == 1
    assert page.locator(".turn.replaced").count() == 2 and page.locator("#editing").is_visible()
    page.keyboard.press("Escape")
    assert page.locator(".turn.replaced").count() == 0 and page.input_value("#text") == ""
    page.get_by_text("Edit").first.click()
    page.get_by_label("Remove 1.png").click()
    assert page.locator("#editing").is_visible()
    ask(page, "tell me less")
    assert page.locator(".question p").all_inner_texts() == ["tell me less"] and page.locator(".question img").count() == 0


def test_settings_reach_the_server(opened: Opened, tmp_path: Path) -> None:
    page = opened()
    sent: list[Any] = []
    page.on("request", lambda r: r.url.endswith("completions") and sent.append(json.loads(r.post_data)))
    values = {"temperature": "0.5", "top_p": "0.9", "repetition_penalty": "1.2", "max_tokens": "7", "tiles": "2", "frames": "3"}
    for name, value in values.items():
        page.fill(f"#{name}", value)
        assert page.locator(f"label:has(#{name}) b").inner_text() == value
    page.fill("#system", "be brief")
    picture(1).save(tmp_path / "moving.gif", save_all=True, append_images=[picture(2)], duration=100)
    page.set_input_files("#files", [saved(tmp_path, 1), str(tmp_path / "moving.gif")])
    page.locator("#media small").filter(has_text="3 frames").wait_for()
    ask(page, "what?")
    (body,) = sent
    content = body["messages"][1]["content"]
    assert {name: body[name] for name in list(values)[:4]} == {
        "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.2, "max_tokens": 7
    }  # fmt: skip
    assert body["messages"][0] == {"role": "system", "content": "be brief"} and body["stream"]
    assert content[0]["image_url"]["max_dynamic_patch"] == 2 and content[2]["video_url"]["num_frames"] == 3
    assert page.locator(".usage").inner_text().count("out") == 1 and not page.locator(".problem:visible").count()


def test_a_video_is_seen_as_frames(opened: Opened, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="videos need av")
    with av.open(str(tmp_path / "moving.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for seed in range(8):
            out.mux(stream.encode(av.VideoFrame.from_image(picture(seed).resize((64, 64)))))
        out.mux(stream.encode())
    page = opened()
    page.fill("#frames", "2")
    page.set_input_files("#files", [str(tmp_path / "moving.mp4")])
    page.locator("#media li", has_text="2 frames").locator("video").wait_for()
    ask(page, "what happens?")
    assert (
        page.locator(".question video").get_attribute("title") == "moving.mp4" and page.locator(".problem:visible").count() == 0
    )
    assert "out" in page.locator(".usage").inner_text()


def test_tiles_and_boxes_are_drawn(opened: Opened, tmp_path: Path) -> None:
    picture(1).resize((1200, 400)).save(tmp_path / "wide.png")
    page = opened()
    stage(
        page, "It is <ref>the cat</ref><box>[[100, 200, 500, 900]]</box> and <box>[[0, 0, 1000, 1000], [10, 10, 20, 20]]</box>"
    )
    page.set_input_files("#files", [saved(tmp_path, 1), str(tmp_path / "wide.png")])
    ask(page, "where?")
    grid = page.locator(".question figure").nth(1)
    assert grid.locator(".line").count() == 5 + 1 and grid.inner_text() == "6 × 2 tiles + whole"
    figure = page.locator(".answer figure")
    image = figure.locator("img").bounding_box()
    box = figure.locator(".box").first.bounding_box()
    for axis, size, low, high in (("x", "width", 0.1, 0.5), ("y", "height", 0.2, 0.9)):
        assert abs((box[axis] - image[axis]) / image[size] - low) < 0.01
        assert abs((box[axis] + box[size] - image[axis]) / image[size] - high) < 0.01
    assert figure.locator(".box").count() == 3 and figure.locator("img").get_attribute("alt") == "wide.png"
    assert page.locator(".answer > p").inner_text() == "It is the cat and [[0,0,1000,1000],[10,10,20,20]]"
    page.uncheck("#grid")
    assert not grid.locator(".line").first.is_visible()
    grid.locator("button").click()
    assert page.locator("#large .line").count() == 6 and page.locator("#large .line").first.is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#large").is_visible()


def test_words_are_text(opened: Opened) -> None:
    page = opened()
    hostile = f'<img src=x onerror="window.hit=1"><script>window.hit=1</script> ![x]({LEAK}) [y](javascript:hit) <b>bold</b>'
    stage(page, f"{hostile}\n\n```\n{hostile}\n```\n\n- **{hostile}**\n\n| {hostile} |\n")
    ask(page, hostile)
    assert page.locator(".question p").inner_text() == hostile
    assert (
        page.locator(".answer pre").inner_text().strip() == hostile and page.locator(".answer p").first.inner_text() == hostile
    )
    assert page.locator(".turn :is(img, script, a, b)").count() == 0 and page.evaluate("window.hit === undefined")
    assert page.locator(".answer strong").count() == 1


def test_errors_stand_beside_their_question(
    opened: Opened, server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = opened()
    page.press("#text", "Enter")
    assert page.locator("#problem").inner_text() == "Write a question first."
    (tmp_path / "notes.md").write_text("# no picture")
    page.set_input_files("#files", [saved(tmp_path, 1, "a.tiff"), str(tmp_path / "notes.md")])
    page.locator("#media .bad").nth(1).wait_for()
    assert page.locator("#media .bad").first.inner_text() == "a.tiff: this browser cannot show it"
    page.click("text=✕ >> nth=1")  # of two files that are refused, the one is named that is read first
    ask(page, "what is this?")
    problem = page.locator(".turn .problem")
    assert "TIFF" in problem.inner_text() and problem.get_attribute("role") == "alert"
    red, green, blue = (
        int(c) for c in problem.evaluate("e => getComputedStyle(e).color").split("(")[1].rstrip(")").split(", ")
    )
    assert red > 120 and green < 60 and blue < 60
    ask(page, "hello")  # what was refused is not part of what follows
    assert "tokens in" in page.locator(".usage").nth(1).inner_text() and problem.count() == 1

    monkeypatch.setattr(server.service.processor, "prompt", lambda _: 1 / 0)
    ask(page, "secret")
    assert "something went wrong" in problem.nth(1).inner_text() and "zero" not in problem.nth(1).inner_text()
    monkeypatch.undo()
    page.locator(".turn").nth(2).locator(".retry").click()
    page.locator(".turn").nth(2).locator(".usage").filter(has_text="tokens in").wait_for()
    assert problem.count() == 1

    for end, words in (('data: {"error": {"message": "too slow"}}\n\ndata: [DONE]\n\n', "too slow"), ("", "ended before")):
        stage(page, "so far", end)
        ask(page, "go on")
        last = page.locator(".turn").last.locator(".answer")
        assert last.locator("p").first.inner_text() == "so far" and words in last.locator(".problem").inner_text()
        page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "are you there?")
    assert "cannot be reached" in problem.last.inner_text()


def test_what_is_too_large_is_not_sent(browser: Any, tiny_engine: Engine, directory: Path) -> None:
    with running(tiny_engine, replace(CONFIG, max_body_bytes=20_000), keys=(), page_of=directory) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.locator("#examples button").first.wait_for()
        assert not page.locator("#login").is_visible()
        ask(page, "x" * 30_000)
        assert "the server takes 20.0 kB" in page.locator(".turn .problem").inner_text()
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks(opened: Opened, scheme: str, tmp_path: Path) -> None:
    page = opened(color_scheme=scheme)

    def check(place: str) -> None:
        for width in (320, 390, 768, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, place
            (worst, where), *_ = page.evaluate(CONTRASTS)
            assert worst >= 4.5, (place, where, worst)

    check("empty")
    stage(page, f"# A title\n**bold** `code` {'long' * 60}\n\n```\n{'wide ' * 60}\n```\n\n| a | {'cell ' * 40}|\n{GROUNDED}")
    picture(1).resize((1200, 400)).save(tmp_path / "wide.png")
    page.set_input_files("#files", [saved(tmp_path, 1), str(tmp_path / "wide.png")])
    page.fill("#text", "q" * 300)
    check("question")
    ask(page, "q" * 300)
    check("reply")
    page.get_by_text("Edit").click()
    check("edit")
    page.unroute("**/v1/chat/completions")
    page.set_input_files("#files", [saved(tmp_path, 1, "a.tiff")])
    page.locator("#media .bad").wait_for()
    ask(page, "?")
    check("error")
    if not page.locator("#settings").is_visible():
        page.click("#show-settings")
    check("settings")
    assert page.locator("#system").is_visible() and page.locator("#show-settings").get_attribute("aria-expanded") == "true"


def test_keyboard_alone_is_enough(opened: Opened) -> None:
    page = opened()
    page.focus("#text")
    reached: set[str] = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => { const e = document.activeElement, style = (e.id == "files" ? e.parentElement : e);
                return [e.id || e.textContent, getComputedStyle(style).outlineStyle] }"""
        )
        assert outline != "none" or name in ("", "scroll") or page.evaluate("document.activeElement === document.body"), name
        reached.add(name)
    wanted = {"restart", "show-settings", "files", "text", "send", "temperature", "tiles", "grid", "system", "hello"}
    assert wanted <= reached, wanted - reached
    unnamed = page.locator("button, input, textarea").evaluate_all(
        "all => all.filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert not unnamed


def test_load_is_small(server: Running) -> None:
    assert sum(len(httpx.get(server.url + path).content) for path in FILES) <= 150_000
