"""A conversation on the page: what the engine says, what is refused, what a stop keeps."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ivl.errors import InputError
from ivl.inference.engine import Engine
from ivl.serve.examples import read_examples, write_examples
from ivl.serve.guard import RequestContext
from ivl.serve.page_chat import PageChat, PageSession, PageSettings, PageUpdate, as_markdown
from ivl.serve.service import Service
from ivl.types import ImageRef, Message, SamplingParams, Text, VideoRef
from tests.helpers.engines import assert_idle, picture
from tests.helpers.servers import CONFIG, engine, saved, slow

SETTINGS = PageSettings(params=SamplingParams(max_new_tokens=12), max_tiles=3, num_frames=2)
LONG = replace(SETTINGS, params=SamplingParams(max_new_tokens=300, ignore_eos=True))


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine(tmp_path_factory.mktemp("talk") / "model")


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


def talking(engine: Engine, uploads: Path, script: Callable[[PageChat], Coroutine[Any, Any, None]], **limits: int) -> None:
    async def main() -> None:
        config = replace(CONFIG, **limits)
        async with asyncio.timeout(20), Service(engine, config) as service:
            await script(PageChat(service, config, uploads))

    asyncio.run(main())
    assert_idle(engine)


async def all_of(views: AsyncIterator[PageUpdate]) -> list[PageUpdate]:
    return [view async for view in views]


def video(path: Path) -> str:
    av = pytest.importorskip("av", reason="videos need av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for seed in range(8):
            out.mux(stream.encode(av.VideoFrame.from_image(picture(seed).resize((64, 64)))))
        out.mux(stream.encode())
    return str(path)


def test_a_conversation_is_what_the_engine_would_say(tiny_engine: Engine, uploads: Path) -> None:
    files = [saved(uploads, 1), saved(uploads, 2)]
    images = [ImageRef(Path(file).read_bytes(), 3) for file in files]
    question = Message("user", (Text("Image-1: "), images[0], Text("\nImage-2: "), images[1], Text("\nwhat?")))
    first = tiny_engine.generate([(question,)], SETTINGS.params)[0]
    more = (question, Message("assistant", (Text(first.text.strip()),)), Message("user", (Text("and now?"),)))
    second = tiny_engine.generate([more], SETTINGS.params)[0]

    async def script(chat: PageChat) -> None:
        session = PageSession()
        views = await all_of(chat.ask("what?", files, session, SETTINGS))
        assert [view.taken for view in views if view.taken is not None] == [True]
        assert all(view.running for view in views[:-1]) and not views[-1].running
        assert [view.tiles for view in views if view.tiles] == [views[1].tiles] and len(views[1].tiles or []) == 2
        assert "2 tiles" in views[-1].status and "tokens out" in views[-1].status
        assert (views[-1].chat or [])[-1]["content"] == as_markdown(first.text).strip()
        await all_of(chat.ask("and now?", [], session, SETTINGS))
        assert [message.text for message in session.messages[1::2]] == [first.text.strip(), second.text.strip()]
        assert [row["role"] for row in session.rows] == ["user", "user", "user", "assistant", "user", "assistant"]

    talking(tiny_engine, uploads, script)


def test_replies_on_the_page_are_counted(tiny_engine: Engine, uploads: Path) -> None:
    async def script(chat: PageChat) -> None:
        notes: list[RequestContext] = []
        chat.finished = notes.append
        await all_of(chat.ask("what?", [saved(uploads, 1)], PageSession(), SETTINGS))
        (note,) = notes
        assert (note.route, note.status, note.facts["tiles"]) == ("page", 200, 1)
        assert 0 < note.facts["first_token_s"] <= note.facts["seconds"] and note.facts["new_tokens"] > 0

    talking(tiny_engine, uploads, script)


def test_videos_and_animations_are_seen_as_frames(tiny_engine: Engine, uploads: Path) -> None:
    frames = [picture(n) for n in range(4)]
    moving = saved(uploads, 5, "moving.gif", save_all=True, append_images=frames)
    files = [video(uploads / "v.mp4"), moving, saved(uploads, 6, "still.gif")]

    async def script(chat: PageChat) -> None:
        kinds = [type(part) for part in chat.message("?", [Path(file) for file in files], SETTINGS).content]
        assert kinds.count(VideoRef) == 2 and kinds.count(ImageRef) == 1
        views = await all_of(chat.ask("what happens?", files[:1], PageSession(), SETTINGS))
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
        ("w" * 5001, [], "characters of text, the limit is 5000"),
    ]
    Image.new("RGB", (300, 300)).save(uploads / "large.png")
    cases.append(("?", [str(uploads / "large.png")], "300 x 300 pixels"))

    async def script(chat: PageChat) -> None:
        chat.gateway.config = replace(chat.config.media, max_pixels=50_000)
        session = PageSession()
        await all_of(chat.ask("hello", [], session, SETTINGS))
        before = session.messages, list(session.rows)
        for text, files, words in cases:
            views = await all_of(chat.ask(text, files, session, SETTINGS))
            said = views[-1].status
            assert said.startswith("⚠") and words in said and str(uploads) not in said, (text[:20], said)
            assert not any(view.taken for view in views) and not views[-1].running
            assert (session.messages, session.rows) == before
        assert len(await all_of(chat.ask("goes on", [], session, SETTINGS))) > 2 and len(session.messages) == 4

    talking(tiny_engine, uploads, script, max_images=4, max_text_chars=5000)


def test_stop_keeps_what_was_said(tiny_engine: Engine, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(tiny_engine, monkeypatch)

    async def script(chat: PageChat) -> None:
        session, views = PageSession(), []
        async for view in chat.ask("tell", [], session, LONG):
            views.append(view)
            if len(views) == 6:
                assert session.stream is not None
                request = session.stream.request
                session.stop()
                count = len(request.tokens)
        assert len(request.tokens) <= count + 1
        assert views[-1].status.endswith("stopped") and not views[-1].running
        assert len(session.messages[-1].text) > 0 and len(session.messages) == 2
        await all_of(chat.ask("go on", [], session, SETTINGS))
        assert request.cancelled and len(request.tokens) <= count + 1
        assert len(session.messages) == 4 and session.messages[-1].text

    talking(tiny_engine, uploads, script)


def test_who_begins_anew_or_leaves_hears_no_more(tiny_engine: Engine, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(tiny_engine, monkeypatch)

    async def script(chat: PageChat) -> None:
        session, count = PageSession(), 0
        async for _ in chat.ask("tell", [], session, LONG):
            count += 1
            if count == 4:
                session.clear()
        assert count == 4 and session.messages == () and session.rows == []
        leaving = chat.ask("tell", [], session, LONG)
        for _ in range(4):
            await anext(leaving)
        await leaving.aclose()  # type: ignore[attr-defined]
        assert chat.service.num_open == 0 and len(session.messages) == 2

    talking(tiny_engine, uploads, script)


def test_a_reply_that_fails_gives_the_question_back(
    tiny_engine: Engine, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(chat: PageChat) -> None:
        session = PageSession()
        monkeypatch.setattr(tiny_engine, "step", lambda: 1 / 0)
        views = await all_of(chat.ask("secret", [], session, SETTINGS))
        assert views[-1].taken is False and views[-1].chat == [] and session.messages == ()
        assert "something went wrong" in views[-1].status
        monkeypatch.undo()
        await all_of(chat.ask("again", [], session, SETTINGS))
        assert len(session.messages) == 2

    talking(tiny_engine, uploads, script)


def test_pictures_of_all_visitors_together_are_limited(tiny_engine: Engine, uploads: Path) -> None:
    file = saved(uploads, 1)
    size = Path(file).stat().st_size

    async def script(chat: PageChat) -> None:
        one, two = PageSession(), PageSession()
        await all_of(chat.ask("?", [file], one, SETTINGS))
        refused = await all_of(chat.ask("?", [file], two, SETTINGS))
        assert "for all visitors" in refused[-1].status
        one.clear()
        await all_of(chat.ask("?", [file], two, SETTINGS))
        assert len(two.messages) == 2

    talking(tiny_engine, uploads, script, max_held_bytes=size * 3 // 2)


def test_boxes_are_drawn_on_the_last_picture(tiny_engine: Engine, uploads: Path) -> None:
    async def script(chat: PageChat) -> None:
        white = io.BytesIO()
        Image.new("RGB", (2000, 1000), "white").save(white, "PNG")
        messages = (Message("user", (ImageRef(b"not this one"), ImageRef(white.getvalue()), Text("where?"))),)
        assert chat.boxes("no box", messages) == [] == chat.boxes("<box>[[0, 0, 9, 9]]</box>", ())
        said = "<ref>the cat</ref><box>[[100, 200, 500, 900]]</box>"
        (row,) = chat.boxes(said, messages)
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
        with pytest.raises(InputError, match=r"examples\.json"):
            read_examples(model)
