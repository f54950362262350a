"""The Python API and `ivl chat`, on a tiny model directory."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import BaseModel

import ivl
from ivl import InputError
from ivl.cli.chat import chat as chat_command
from ivl.types import Grammar
from tests.helpers.engines import assert_idle, picture, tiny_directory

SHORT = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory: Path) -> ivl.Model:
    return ivl.load(directory)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture(1).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_import_is_fast_and_without_torch() -> None:
    code = "import time; t = time.process_time(); import ivl, sys; print(time.process_time() - t, 'torch' in sys.modules)"
    seconds, torch_loaded = min(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    )
    assert float(seconds) < 0.3 and torch_loaded == "False"


def test_an_image_may_be_a_path_bytes_or_an_image(model: ivl.Model, image: Path) -> None:
    encoded = io.BytesIO()
    picture(1).save(encoded, "PNG")
    sources = (image, str(image), encoded.getvalue(), picture(1), ivl.ImageRef(str(image)))
    replies = {model.chat("What is it?", source, **SHORT) for source in sources}
    assert len(replies) == 1 and replies != {model.chat("What is it?", **SHORT)}


def test_stream_and_generate_equal_chat(model: ivl.Model, image: Path) -> None:
    reply = model.chat("What is it?", image, **SHORT)
    assert "".join(model.stream("What is it?", image, **SHORT)).strip() == reply
    replies = model.generate([ivl.ask("What is it?", image), ivl.ask("Why?")], ivl.SamplingParams(**SHORT))
    assert [r.text.strip() for r in replies] == [reply, model.chat("Why?", **SHORT)]


def test_threads_get_what_one_thread_gets(model: ivl.Model, image: Path) -> None:
    """Calls of one model from several threads advance together, and leave nothing behind."""
    asked = [(f"question {n}, what is it?", *([image] if n % 10 == 0 else [])) for n in range(50)]
    options = [{"max_new_tokens": 6, "temperature": float(n % 2), "seed": n} for n in range(50)]
    alone = [model.chat(*each, **option) for each, option in zip(asked, options, strict=True)]

    def fifty(thread: int) -> list[str]:
        if thread % 4 == 0:
            replies = model.generate([ivl.ask(*each) for each in asked], [ivl.SamplingParams(**option) for option in options])
            return [reply.text.strip() for reply in replies]
        order = [(n + 7 * thread) % 50 for n in range(50)]
        texts = {n: model.chat(*asked[n], **options[n]) for n in order}
        return [texts[n] for n in range(50)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fifty, range(8))) == [alone] * 8
    assert_idle(model.engine)


def test_a_thread_streams_while_another_one_runs_the_steps(model: ivl.Model) -> None:
    first, second = (model.stream(f"tell me {n}", max_new_tokens=400, ignore_eos=True) for n in range(2))
    assert next(first) and next(second)
    with ThreadPoolExecutor(2) as pool:
        whole, piece = pool.submit(list, first), pool.submit(next, second)
        assert piece.result()
        second.close()
        assert whole.result()
    assert_idle(model.engine)


def test_an_interrupted_call_frees_its_blocks(model: ivl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model.engine.runner, "run", lambda step: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.chat("hello", **SHORT)
    assert_idle(model.engine)
    assert model.chat("hello", **SHORT)


@pytest.mark.parametrize("text", ["\ud800", "a \udfff", None, 5, b"x"])
def test_what_is_no_text_is_refused_in_one_line(model: ivl.Model, text: Any) -> None:
    system = 0 if text is None else text
    for call in (
        lambda: model.chat(text), lambda: ivl.ask(text), lambda: model.start(system=system), lambda: ivl.ask("x", system=system)
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8, height x width x 3, got ndarray of float32 4 x 4 x 3"),
        (np.zeros((2, 4, 4, 3), np.uint8), "got ndarray of uint8 2 x 4 x 4 x 3"), (np.zeros((3, 4, 5), np.uint8), "3 x 4 x 5"),
        (np.zeros((0, 4, 3), np.uint8), "0 x 4 x 3"), (torch.zeros(3, 4, 4), "got Tensor of float32 3 x 4 x 4"),
        (3, "got int"), (None, "got NoneType"), ([None], "got NoneType"), ({"url": "x"}, "got dict"),
        ("a\0b", "no such image"), ("x" * 5000, "no such image"), ("\ud800", "no such image"), ("~nobody/x", "no such image"),
        ("https://example.org/a.jpg", "nothing is fetched; download it"), ("HTTP://a", "nothing is fetched"),
        ("data:image/png;base64," + "é" * 9000, "is not base64"), ("data:image/png," + "A" * 9000, "must look like data:image"),
        ("file:///no/such.png", "/no/such.png: no such image"), ("", "has an empty path"),
        ("/9j/" + "A" * 9000, "base64 without a prefix; write data:image"), (io.StringIO("x"), "gives bytes, got str"),
    ],
)  # fmt: skip
def test_media_of_another_kind_are_refused_in_one_line(source: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        ivl.ask("what?", source)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_every_way_to_give_an_image_is_the_same(model: ivl.Model, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(image.parent))
    data = image.read_bytes()
    (image.parent / "a b.png").write_bytes(data)
    expected = model.chat("what?", image, **SHORT)
    sources: list[Any] = [
        "~/picture.png", f"file://{image}", (image.parent / "a b.png").as_uri(), io.BytesIO(data), image.open("rb"), data,
        np.asarray(picture(1)), [image], f"data:image/png;base64,{base64.b64encode(data).decode()}",
    ]  # fmt: skip
    for source in sources:
        assert model.chat("what?", source, **SHORT) == expected, source
    assert model.chat("what?", [image, image], **SHORT) == model.chat("what?", image, image, **SHORT) != expected
    assert isinstance(ivl.ask("?", np.zeros((4, 5), np.uint8))[0].content[0], ivl.ImageRef)
    assert ivl.ask("?", "data:video/mp4;base64,AAAA")[0].content[0] == ivl.VideoRef(b"\0\0\0")


def test_an_open_file_that_gives_no_bytes_is_named(image: Path) -> None:
    with image.open("rb") as closed, image.open(encoding="utf-8") as of_text:
        closed.close()
        for stream in (closed, of_text):
            with pytest.raises(InputError, match=r"cannot read the open file of an image: .*; open it with mode 'rb'"):
                ivl.ask("what?", stream)  # type: ignore[arg-type]


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="no such image"):
        ivl.ask("what?", tmp_path / "pipe.png")


def test_texts_are_conversations_and_other_things_are_refused(model: ivl.Model) -> None:
    params = ivl.SamplingParams(**SHORT)
    assert model.generate(["hello"], params)[0].text.strip() == model.chat("hello", **SHORT)
    for wrong in (5, {"role": "user", "content": "hello"}, [5], [], b"hello", None):
        with pytest.raises(InputError, match="conversation 0 must be a text, or messages"):
            model.generate([wrong], params)  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"unknown option 'max_new_token': did you mean 'max_new_tokens'"):
        model.chat("hello", max_new_token=5)


SIZES = ("block_size", "max_cache_tokens", "max_batch_tokens", "max_sequences", "max_context")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("dtype", value) for value in ("float8", "int8", torch.int8, None, 5)),
        *(("device", value) for value in ("nope", "cuda:99", "meta", "mps", 5, None)),
        *(("max_tiles", value) for value in (0, 10**6, 2.5)),
        *((name, value) for name in SIZES for value in (0, -1, 1.5, "x")),
        *(("max_cache_tokens", value) for value in (10**12, 1e12)),
        *(("vision_cache_bytes", value) for value in (-1, "1")),
    ],
)
def test_options_of_load_are_refused_by_name(directory: Path, option: str, value: Any) -> None:
    with pytest.raises(InputError, match=option) as caught:
        ivl.load(directory, **{option: value})
    assert "\n" not in str(caught.value)


def test_openai_messages_are_conversations(model: ivl.Model, image: Path) -> None:
    data = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    text = {"type": "text", "text": "what is <image>?"}
    shown = [{"image": picture(1)}, {"image": np.asarray(picture(1))}, {"image_url": {"url": data}}, {"image_url": str(image)}]
    turns = [("user", "a"), ("user", "b"), ("assistant", None), ("user", "c")]
    several = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what?"}],
        *([{"role": "user", "content": [{"type": next(iter(each)), **each}, text]}] for each in shown),
        [{"role": role, "content": content} for role, content in turns],
    ]
    first, *images, last = (reply.text for reply in model.generate(several, **SHORT))
    assert first.strip() == model.start(system="Be brief.").send("what?", **SHORT)
    letters = ivl.Message("user", (ivl.ImageRef(picture(1)), ivl.Text("\n"), ivl.Text("what is <image>?")))
    assert set(images) == {model.generate([(letters,)], **SHORT)[0].text} and last


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "robot", "content": "x"}, "message 0: the role is one of system, developer, user, assistant, got 'robot'"),
        ({"content": "x"}, "the role is one of"), ({"role": "user"}, "the content is a text or a list of parts, got None"),
        ({"role": "user", "content": b"x"}, "the content is a text or a list of parts"),
        ({"role": "user", "content": [{"type": "audio"}]}, "message 0, part 0: a part has the type text"),
        ({"role": "user", "content": ["x"]}, "part 0: a part has"),
        ({"role": "user", "content": [{"type": "text"}]}, "must be a text, got None"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.b/c"}}]}, "nothing is fetched"),
        ({"role": "user", "content": [{"type": "image"}]}, "got NoneType"),
    ],
)  # fmt: skip
def test_wrong_messages_are_refused_in_one_line(model: ivl.Model, message: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        model.generate([[message]])
    assert words in str(caught.value) and "\n" not in str(caught.value)


class Answer(BaseModel):
    count: Literal[1, 2]
    right: bool


@pytest.mark.parametrize("schema", [Answer, Answer.model_json_schema()])
def test_a_schema_gives_a_reply_its_form(model: ivl.Model, schema: Any) -> None:
    before = json.dumps(Answer.model_json_schema())
    text = model.chat("how many?", json_schema=schema, max_new_tokens=60)
    assert Answer.model_validate_json(text) and set(json.loads(text)) == {"count", "right"}
    assert model.generate(["how many?"], json_schema=schema, max_new_tokens=60)[0].text.strip() == text
    assert "".join(model.stream("how many?", json_schema=schema, max_new_tokens=60)) == text
    assert json.dumps(Answer.model_json_schema()) == before and (not isinstance(schema, dict) or json.dumps(schema) == before)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"json_schema": 5}, "json_schema must be a dict, or a class of pydantic, got 5"), ({"json_schema": str}, "a dict"),
     ({"json_schema": {"a": {1}}}, "json_schema is not JSON"), ({"json_schema": {"type": 7}}, "json_schema cannot be"),
     ({"json_schema": {}, "guide": Grammar("json")}, "json_schema and guide each say"), ({"json_shema": {}}, "'json_schema'"),
     ({"params": ivl.SamplingParams(), "seed": 1}, "give params or options such as seed")],
)  # fmt: skip
def test_wrong_options_of_generate(model: ivl.Model, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        model.generate(["a"], **options)


def test_logprobs_have_text(model: ivl.Model) -> None:
    (reply,) = model.generate(["what?"], logprobs=2, **SHORT)
    scored = model.logprobs(reply)
    assert [logprob for _, logprob in scored] == [each.logprob for each in reply.logprobs] and len(scored) == len(reply.tokens)
    assert "".join(text for text, _ in scored).startswith(reply.text[:3])
    assert model.logprobs(model.generate(["what?"], **SHORT)[0]) == []


def test_what_things_say_of_themselves(model: ivl.Model, directory: Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", ivl.__version__)
    assert repr(model).startswith(f"Model({str(directory)!r}, ") and repr(model).endswith(" parameters, float32, cpu, qwen2)")
    chat = model.start(system="x" * 500)
    assert repr(chat).startswith("Chat(1 messages, last 'xxx") and len(repr(chat)) < 150
    (reply,) = model.generate(["what?"], max_new_tokens=40, logprobs=5)
    assert repr(reply).startswith("Reply(text=") and "tokens=(" not in repr(reply) and "logprobs" not in repr(reply)


def test_a_batch_shows_how_far_it_is(
    model: ivl.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int]] = []

    @contextmanager
    def reporting(what: str, unit: str) -> Any:
        yield lambda done, total: seen.append((done, total))

    monkeypatch.setattr("ivl.utils.progress.reporting", reporting)
    replies = model.generate(["a", "b", "c"], progress=True, **SHORT)
    assert seen == [(1, 3), (2, 3), (3, 3)] and [r.text for r in replies] == [
        r.text for r in model.generate(["a", "b", "c"], **SHORT)
    ]
    assert len(seen) == 3 and capsys.readouterr().err == "", "no bar without a terminal"


def test_a_conversation_remembers(model: ivl.Model, image: Path) -> None:
    conversation = model.start(system="Be brief.")
    first = conversation.send("What is it?", image, **SHORT)
    second = conversation.send("And now?", **SHORT)
    assert [m.role for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.text.strip() for m in conversation.messages] == ["Be brief.", "What is it?", first, "And now?", second]
    assert second != model.chat("And now?", **SHORT)


def test_a_stopped_reply_stays_in_the_history_and_frees_the_engine(model: ivl.Model) -> None:
    conversation = model.start()
    stream = conversation.stream("Tell me a story.", max_new_tokens=200)
    said = next(stream) + next(stream)
    stream.close()
    assert conversation.messages[-1].text == said.strip()
    stats = model.engine.stats()
    assert stats.cache_blocks_used == stats.running == stats.waiting == 0


def test_marks_take_the_media_in_order() -> None:
    a, b = ivl.ImageRef(b"a"), ivl.ImageRef(b"b")
    text = ivl.Text
    assert ivl.ask("Hm?", a)[0].content == (a, text("\nHm?"))
    assert ivl.ask("Compare.", a, b)[0].content == (text("Image-1: "), a, text("\nImage-2: "), b, text("\nCompare."))
    assert ivl.ask("Is <image> like <image>?", a, b)[0].content == (text("Is "), a, text(" like "), b, text("?"))
    assert ivl.ask("What?", ivl.VideoRef("v"))[0].content == (ivl.VideoRef("v"), text("\nWhat?"))
    with pytest.raises(ivl.InputError, match="2 <image> or <video> marks but 1 media"):
        ivl.ask("Is <image> like <image>?", a)


def test_what_a_path_is(tmp_path: Path, image: Path) -> None:
    frames = [picture(n) for n in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "clip.mp4").touch()

    def content(name: str) -> object:
        return ivl.ask("?", tmp_path / name)[0].content[0]

    assert isinstance(content("moving.gif"), ivl.VideoRef) and isinstance(content("still.gif"), ivl.ImageRef)
    assert isinstance(content("clip.mp4"), ivl.VideoRef) and isinstance(content("."), ivl.VideoRef)
    for name, reason in (("text.png", r"not a readable image \(unknown format\)"), ("none.png", "no such image or video")):
        with pytest.raises(ivl.InputError, match=f"{name}: {reason}"):
            content(name)


def test_context_and_tile_limits_are_told(directory: Path, model: ivl.Model) -> None:
    with pytest.raises(ivl.InputError, match="context is 600 tokens"):
        model.chat("word " * 600)
    with pytest.raises(ivl.InputError, match=r"max_tiles must be a whole number in .*, got 0"):
        ivl.load(directory, max_tiles=0)
    wide = picture(2).resize((28 * 4, 28))
    few, many = (ivl.load(directory, max_tiles=n).engine.submit(ivl.ask("?", wide)) for n in (1, 4))
    assert (few.num_tiles, many.num_tiles) == (1, 5)


def test_chat_command_prints_the_reply_and_stats(
    directory: Path, model: ivl.Model, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_command([str(directory), str(image), "-p", "What is it?", "--max-new-tokens", "12", "--stats"])
    out, err = capsys.readouterr()
    assert out.strip() == model.chat("What is it?", image, **SHORT)
    assert all(word in err for word in ("load", "vision", "prefill", "decode", "tokens/s"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-model", "no-picture.png", "-p", "?"], "no-picture.png: no such image or video"),
        (["no-model", "-p", "?", "--top-p", "0"], "top_p must be a number in"),
        (["no-model", "-p", ""], "the prompt is empty"),
        (["./no-model", "-p", "?"], "no-model"),
    ],
)
def test_chat_command_refuses_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ivl.InputError, SystemExit)) as caught:  # values that no dataclass takes are tyro's to report
        chat_command(arguments)
    assert message in str(caught.value) + capsys.readouterr().err


def test_interactive_chat(
    directory: Path, model: ivl.Model, image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def typed() -> Callable[[str], str]:
        lines = iter(["Hello", "/image nowhere.png", f"/image {image}", "What is it?", "/clear", "/what", "", "Hello", "/quit"])
        return lambda _: next(lines)

    monkeypatch.setattr("builtins.input", typed())
    chat_command([str(directory), "--max-new-tokens", "12"])
    out, err = capsys.readouterr()
    conversation = model.start()
    hello, what = conversation.send("Hello", **SHORT), conversation.send("What is it?", image, **SHORT)
    assert [line for line in out.split("\n") if line] == [s for text in (hello, what, hello) for s in text.split("\n") if s]
    assert "nowhere.png: no such image" in err and "unknown command /what" in err


@pytest.mark.parametrize("wrong", [None, "hello", b"hello", {"a": 1}, 5, ["a", 5], [("x",)]])
def test_generate_refuses_what_are_no_conversations(model: ivl.Model, wrong: Any) -> None:
    with pytest.raises(InputError, match="conversation"):
        model.generate(wrong)


@pytest.mark.parametrize("wrong", [{"x": 1}, {}, [None], [], "greedy", 5, [ivl.SamplingParams()] * 2])
def test_generate_refuses_other_parameters(model: ivl.Model, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"params must be ivl\.SamplingParams|1 conversations but [02] sampling"):
        model.generate(["a"], wrong)


@pytest.mark.parametrize("name", [None, b"m", 5, ["m"]])
def test_load_refuses_what_names_no_model(name: Any) -> None:
    with pytest.raises(InputError, match="a model is named by its directory or hub id, got"):
        ivl.load(name)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"foo": 1}, "unknown option 'foo' of a model: options are dtype, device"), ({"max_contxt": 1}, "mean 'max_context'"),
     ({"max_tile": 1}, "mean 'max_tiles'"), ({"processor": 1}, "unknown option 'processor'"),
     ({"max_tiles": True}, "max_tiles"),
     *(({name: value}, f"{name} must be a whole number in") for value in (True, 10**18, 2.5, "x")
       for name in ("max_context", "max_batch_tokens", "max_sequences", "block_size", "max_cache_tokens",
                    "vision_cache_bytes"))],
)  # fmt: skip
def test_load_refuses_wrong_options(directory: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ivl.load(directory, **options)


def test_numbers_of_numpy_are_numbers(model: ivl.Model) -> None:
    params = ivl.SamplingParams(seed=np.int64(3), temperature=np.float32(0.5), max_new_tokens=np.int32(4), top_k=np.uint8(9))
    plain = ivl.SamplingParams(seed=3, temperature=0.5, max_new_tokens=4, top_k=9)
    assert params == plain and type(params.seed) is int and type(params.temperature) is float
    assert model.generate(["a"], params)[0].text == model.generate(["a"], plain)[0].text


@pytest.mark.parametrize("stop", [("",), ("a", ""), "a", (5,), None])
def test_wrong_stops_are_refused(stop: Any) -> None:
    with pytest.raises(InputError, match="stop must be a tuple of texts, none of them empty"):
        ivl.SamplingParams(stop=stop)


@pytest.mark.parametrize("content", ["x", (5,), None, ("x",), (ivl.Text(5),), (ivl.Text(b"x"),), ivl.Text("x")])  # type: ignore[arg-type]
def test_a_message_refuses_other_content(content: Any) -> None:
    with pytest.raises(InputError, match="content must be a tuple of Text, ImageRef and VideoRef"):
        ivl.Message("user", content)


@pytest.mark.parametrize("options", [{"max_tiles": 2.5}, {"max_tiles": "x"}, {"max_tiles": 0}])
def test_chat_refuses_wrong_options_of_an_image(model: ivl.Model, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"max_tiles of an image must be a whole number in 1\.\.1,000"):
        model.chat("What is it?", ivl.ImageRef(picture(1), **options), **SHORT)
