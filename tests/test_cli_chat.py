"""`ivl chat`: options of sampling, guides and figures on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from ivl.cli.chat import ChatOptions, _open, chat
from ivl.errors import InputError
from ivl.types import VideoRef
from tests.helpers.engines import tiny_directory

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "蓝", "🦊"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("model"))


def test_every_option_of_loading_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def load(model: str, **options: object) -> None:
        given.update(options)
        raise InputError("seen")

    monkeypatch.setattr("ivl.cli.chat.load", load)
    with pytest.raises(InputError, match="seen"):
        chat(["MODEL", "-p", "hi", "--tensor-parallel", "2", "--max-tiles", "3", "--device", "cpu", "--dtype", "float32"])
    assert given == {"tensor_parallel": 2, "max_tiles": 3, "device": "cpu", "dtype": "float32", "adapter": None}


def test_replies_have_the_form_that_was_asked_for(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))

    def said(*options: str) -> str:
        chat([str(directory), "-p", "what is it?", "--temperature", "1", "--seed", "3", *options])
        return capsys.readouterr().out.strip()

    assert said("--choice", "red", "蓝色") in ("red", "蓝色")
    assert re.fullmatch("[0-9]{3}", said("--regex", "[0-9]{3}"))
    assert json.loads(said("--json-schema", str(schema)))["colour"] in ("red", "蓝", "🦊")
    assert said("--json", "--max-new-tokens", "9").startswith("{")


def test_penalties_and_min_p_reach_the_sampler(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*options: str) -> str:
        chat([str(directory), "-p", "what is it?", "--max-new-tokens", "24", *options])
        return capsys.readouterr().out

    greedy, sampled = said(), said("--temperature", "2", "--seed", "1")
    assert sampled != greedy == said("--temperature", "2", "--seed", "1", "--min-p", "1")
    assert sampled != said("--temperature", "2", "--seed", "1", "--presence-penalty", "2", "--frequency-penalty", "2")


def test_stats_tell_where_the_time_went(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat([str(directory), "-p", "what is it?", "--max-new-tokens", "9", "--stats"])
    told = capsys.readouterr().err
    for part in (
        r"load \d",
        r"prepare \d",
        r"queue \d",
        r"vision \d",
        r"prefill \d.* tokens/s; 0 cached",
        r"decode \d.*tokens",
    ):
        assert re.search(part, told), part


def test_a_second_question_reads_what_is_new(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["a question that is long enough to fill more than one block of the cache " * 2, "and another", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat([str(directory), "--max-new-tokens", "9", "--stats"])
    first, second = (int(n) for n in re.findall(r"(\d+) cached", capsys.readouterr().err))
    assert first == 0 and second > 64


def test_words_of_a_conversation(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    lines = iter([f"/image {tmp_path}/a.png", "/help", "/hlep", "exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat([str(directory)])
    said = capsys.readouterr().err
    assert f"{tmp_path}/a.png goes with the next question (1 in all)" in said and said.count("/clear starts anew") == 3
    assert "unknown command /hlep" in said


def test_a_question_without_its_option_is_recognized() -> None:
    with pytest.raises(InputError, match="what shape is it: no such image or video; a question goes behind -p"):
        chat(["no-model", "what shape is it"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "--choice", "a"], "give one of --json, --json-schema, --choice and --regex"),
        (["--json-schema", "nowhere.json"], r"nowhere\.json: cannot be read"),
        (["--json-schema", "/dev/zero"], r"/dev/zero: is a device"),
        (["--json-schema", __file__], r"test_cli_chat\.py: not valid JSON"),
        (["--min-p", "2"], r"min_p must be a number in \[0, 1\], got 2"),
        (["--presence-penalty", "3"], "presence_penalty must be a number in"),
        (["--regex", ""], "a grammar of kind regex needs a value"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((InputError, SystemExit)) as caught:  # values that no dataclass takes are tyro's to report
        chat(["no-model", "-p", "?", *options])
    assert re.search(message, str(caught.value) + capsys.readouterr().err)


def test_frames_of_a_video_are_spread_as_asked(tmp_path: Path) -> None:
    options = ChatOptions(model="m", frames=4, frames_by="time")
    assert _open(str(tmp_path), options) == VideoRef(str(tmp_path), num_frames=4, frames_by="time")
