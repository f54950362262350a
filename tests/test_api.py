"""The Python API and `ivl chat`, on a tiny model directory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ivl
from ivl import InputError
from ivl.cli.chat import chat as chat_command
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
    "source", [np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4), 3, None, [b"x"], "a\0b", "x" * 5000, "\ud800", "~nobody/x"]
)
def test_media_of_another_kind_are_refused_in_one_line(source: Any) -> None:
    with pytest.raises(InputError) as caught:
        ivl.ask("what?", source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="no such image"):
        ivl.ask("what?", tmp_path / "pipe.png")


def test_texts_are_conversations_and_other_things_are_refused(model: ivl.Model) -> None:
    params = ivl.SamplingParams(**SHORT)
    assert model.generate(["hello"], params)[0].text.strip() == model.chat("hello", **SHORT)
    for wrong in (5, {"role": "user", "content": "hello"}, [{"role": "user", "content": "hello"}], None):
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
    for name, reason in (("text.png", "not an image that can be read"), ("none.png", "no such image or video")):
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
