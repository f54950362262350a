"""What an earlier run answered is used again only for the same question, asked of the same generator in the same way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ivl
from ivl.errors import InputError
from ivl.evaluation import fingerprint
from ivl.evaluation.config import EvalConfig, Method
from ivl.evaluation.run import evaluate
from ivl.evaluation.scoring import exact_match
from ivl.evaluation.task import Example, Task
from ivl.evaluation.voting import RatingJudge
from ivl.generators import PlainReply
from ivl.generators.remote import RemoteGenerator
from ivl.types import Conversation, ImageRef, Message, SamplingParams, Text, VideoRef
from tests.helpers.engines import tiny_directory

GREEDY = SamplingParams(max_new_tokens=4)
CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "doubled": lambda w: w.mul_(2), "constant": lambda w: w.fill_(1), "reversed": lambda w: w.copy_(w.flip(0)),
    "zero": torch.Tensor.zero_, "one number": lambda w: w.view(-1)[:1].mul_(1.01),
}  # fmt: skip
FOREIGN = (
    b"", b'{"a": 1}', b'{"a": 1}\n', b"name,score\na,1\nb,2", b"[1, 2]\n", b"\x00\xff\n", b'{"task": "asks"}\n{"id": "0"}\n',
    b"{}\n" * 3,
)  # fmt: skip


@dataclass
class Asks(Task):
    """Three questions about one picture."""

    picture: str | bytes
    words: str = "what is it?"
    answers: tuple[str, ...] = ("red",)
    params: SamplingParams = GREEDY
    name: str = "asks"
    metric: str = "exact_match"

    def examples(self) -> Iterator[Example]:
        for n in range(3):
            words = self.words if n else "the same"
            yield Example(id=str(n), conversation=ivl.ask(words, self.picture), answers=self.answers if n else ("red",))

    def score(self, reply: str, example: Example) -> Any:
        return exact_match(reply, example.answers)


@dataclass
class Counts:
    """Answers red, and counts the questions."""

    says: Any = "red"
    asked: list[Conversation] = field(default_factory=list)

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[Any]:
        raise NotImplementedError

    def generate(self, conversations: Sequence[Conversation], params: object) -> Any:
        self.asked += conversations
        return [PlainReply(self.says, "stop") for _ in conversations]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    return paint(tmp_path / "picture.bmp", "red")


def paint(path: Path, color: str) -> str:
    Image.new("RGB", (32, 32), color).save(path)
    return str(path)


def test_the_same_questions_are_not_asked_again(tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, generator = tmp_path / "p.jsonl", Counts()
    first = evaluate(Asks(picture), generator, model="m", predictions=path)
    assert len(generator.asked) == 3 and capsys.readouterr().err == ""
    assert evaluate(Asks(picture), generator, model="m", predictions=path) == first
    assert len(generator.asked) == 3 and capsys.readouterr().err == f"3 answers from {path}, 0 new\n"
    os.utime(picture, (0, 0))
    Path(picture).rename(tmp_path / "moved.bmp")
    evaluate(Asks(str(tmp_path / "moved.bmp")), generator, model="m", predictions=path)
    assert len(generator.asked) == 3, "the bytes of a picture count, not its name or time"


@pytest.mark.parametrize("change", ["words", "answers", "picture", "picture of the same size and time"])
def test_changed_questions_are_asked_anew_and_counted(
    tmp_path: Path, picture: str, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, generator, task = tmp_path / "p.jsonl", Counts(), Asks(picture)
    assert evaluate(task, generator, model="m", predictions=path)["value"] == 1
    asked, status = 2, Path(picture).stat()
    if change == "words":
        task = replace(task, words="name the color of the sky")
    elif change == "answers":
        task = replace(task, answers=("blue",))
    else:
        asked = 3
        paint(Path(picture), "blue")
        if "time" in change:
            assert Path(picture).stat().st_size == status.st_size
            os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = evaluate(task, generator, model="m", predictions=path)
    assert len(generator.asked) == 3 + asked and report["value"] == pytest.approx(1 / 3 if change == "answers" else 1)
    assert f"{3 - asked} answers from {path}, {asked} new" in capsys.readouterr().err
    evaluate(task, generator, model="m", predictions=path)
    assert len(generator.asked) == 3 + asked, "the newer answer stands"


def test_a_hash_knows_every_part_of_a_question(tmp_path: Path, picture: str) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    paint(frames / "0.bmp", "red")
    image = Image.open(picture)

    def asked(*parts: Any, role: Any = "user") -> Conversation:
        return (Message(role, parts),)

    questions = [
        (asked(Text("a")), ("x",)), (asked(Text("a")), ("y",)), (asked(Text("a")), ("x", "")), (asked(Text("b")), ("x",)),
        (asked(Text("a"), role="system"), ("x",)), (asked(Text("a"), Text("")), ("x",)), (asked(ImageRef(picture)), ("x",)),
        (asked(ImageRef(picture, max_tiles=2)), ("x",)), (asked(VideoRef(picture)), ("x",)), (asked(ImageRef(image)), ("x",)),
        (asked(VideoRef(picture, num_frames=3)), ("x",)), (asked(VideoRef(picture, clip=(0.0, 1.0))), ("x",)),
        (asked(VideoRef(str(frames))), ("x",)), (asked(Text("\ud800")), ("x",)), (asked(ImageRef("gone.png")), ("x",)),
    ]  # fmt: skip
    hashes = [fingerprint.of_question(*question) for question in questions]
    assert len(set(hashes)) == len(hashes)
    data = Path(picture).read_bytes()
    assert fingerprint.of_question(asked(ImageRef(data)), ("x",)) == fingerprint.of_question(asked(ImageRef(picture)), ("x",))
    before = fingerprint.of_question(*questions[12])
    paint(frames / "1.bmp", "blue")
    assert fingerprint.of_question(*questions[12]) != before
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe"):
        fingerprint.of_question(asked(ImageRef(str(tmp_path / "pipe"))), ("x",))


def test_another_model_in_the_same_directory_is_another_generator(tmp_path: Path, picture: str) -> None:
    """The newcomer's case: the directory's name is the same, its weights are not."""
    path, place = tmp_path / "p.jsonl", tmp_path / "model"
    tiny_directory(place)
    evaluate(Asks(picture), ivl.load(place).engine, model="m", predictions=path)
    engine = ivl.load(place).engine
    assert fingerprint.of_generator(engine) == fingerprint.of_generator(ivl.load(place)), "loaded twice, it is the same"
    evaluate(Asks(picture), engine, model="m", predictions=path)
    name, weight = next((n, p) for n, p in engine.model.named_parameters() if p.dim() == 2)
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(
        InputError, match=r"p\.jsonl: holds predictions with weights '\w+', this run has '\w+'; --fresh forgets"
    ):
        evaluate(Asks(picture), engine, model="m", predictions=path)
    assert evaluate(Asks(picture), engine, EvalConfig(fresh=True), model="m", predictions=path)["n"] == 3, name


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_weights_changes_their_hash(change: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(3, 3).bfloat16(), torch.nn.LayerNorm(4))
    before = fingerprint._weights(model)
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            CHANGES[change](parameter)
            assert (fingerprint._weights(model) == before) == torch.equal(parameter, kept)
            parameter.copy_(kept)
    assert fingerprint._weights(model) == before


def test_an_endpoint_is_its_url_and_model_and_others_may_say_what_they_are() -> None:
    endpoints = [
        RemoteGenerator(url, model=model) for url, model in (("http://a/v1", "x"), ("http://a/v1", "y"), ("http://b", "x"))
    ]
    assert len({str(fingerprint.of_generator(endpoint)) for endpoint in endpoints}) == 3
    own = Counts()
    assert fingerprint.of_generator(own) == {"generator": "Counts"}
    own.fingerprint = "v2"  # type: ignore[attr-defined]
    assert fingerprint.of_generator(own) == {"generator": "v2"}


def test_another_judge_is_another_run(tmp_path: Path, picture: str) -> None:
    path = tmp_path / "p.jsonl"
    config = EvalConfig(method=Method(samples=2, select="judge"), sampling=SamplingParams(temperature=1))

    def run(judge: Any) -> dict[str, Any]:
        return evaluate(Asks(picture), Counts(), config, model="m", predictions=path, judge=judge)

    assert run(RatingJudge(Counts("7"), name="a"))["samples"]["without_rating"] == 0
    with pytest.raises(InputError, match=r"holds predictions with judge\.name 'a', this run has 'b'"):
        run(RatingJudge(Counts("7"), name="b"))


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_is_never_touched(tmp_path: Path, picture: str, content: bytes) -> None:
    path = tmp_path / "thesis.json"
    path.write_bytes(content)
    for fresh in (False, True):
        config = EvalConfig(fresh=fresh)
        if content:
            with pytest.raises(InputError, match=r"thesis\.json"):
                evaluate(Asks(picture), Counts(), config, model="m", predictions=path)
            assert path.read_bytes() == content
        else:
            assert evaluate(Asks(picture), Counts(), config, model="m", predictions=path)["n"] == 3


@pytest.mark.parametrize("line", ["{broken", "[]", '{"id": 1}', '{"id": "0", "asked": 5}', '{"id": NaN}', '{"x": 1}'])
def test_a_broken_line_is_named_and_nothing_is_lost(tmp_path: Path, picture: str, line: str) -> None:
    path = tmp_path / "p.jsonl"
    evaluate(Asks(picture), Counts(), model="m", predictions=path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"p\.jsonl:3: "):
        evaluate(Asks(picture), Counts(), model="m", predictions=path)
    assert path.read_bytes() == before
    assert evaluate(Asks(picture), Counts(), EvalConfig(fresh=True), model="m", predictions=path)["n"] == 3


def test_places_that_cannot_hold_predictions_are_one_line(tmp_path: Path, picture: str) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "file/p.jsonl", "pipe", "n" * 300):
        with pytest.raises(InputError, match=r"\S"):
            evaluate(Asks(picture), Counts(), model="m", predictions=tmp_path / name)


@pytest.mark.parametrize("says", [None, 5, b"red", ["red"]])
def test_replies_of_odd_types_are_one_line(tmp_path: Path, picture: str, says: Any) -> None:
    with pytest.raises(InputError, match="task asks, examples 0 to 2: the generator gave a reply without text: PlainReply"):
        evaluate(Asks(picture), Counts(says), model="m", predictions=tmp_path / "p.jsonl")
    generator = Counts()
    for replies in (None, [], [PlainReply("red", "stop")] * 4, 7):
        generator.generate = lambda *_, replies=replies: replies  # type: ignore[method-assign]
        with pytest.raises(InputError, match="the generator must give 3 replies, got"):
            evaluate(Asks(picture), generator, model="m", predictions=tmp_path / "p.jsonl")


@pytest.mark.parametrize("score", [None, "1", 2, -0.5, float("nan"), [1]])
def test_scores_of_odd_types_are_one_line(tmp_path: Path, picture: str, score: Any) -> None:
    task = Asks(picture)
    task.score = lambda *_: score  # type: ignore[method-assign]
    with pytest.raises(
        InputError, match="task asks, examples 0 to 2: the score of 0 must be a Score or a number from 0 to 1, got"
    ):
        evaluate(task, Counts(), model="m", predictions=tmp_path / "p.jsonl")


def test_empty_and_odd_tasks_are_one_line(tmp_path: Path, picture: str) -> None:
    task = Asks(picture)
    for examples, problem in ((0, "gives no examples"), (2, "gives 2 examples of the same id '0'")):
        task.examples = lambda n=examples: iter(list(Asks(picture).examples())[:1] * n)  # type: ignore[method-assign]
        with pytest.raises(InputError, match=f"task asks {problem}"):
            evaluate(task, Counts(), model="m", predictions=tmp_path / "p.jsonl")
    asked = ivl.ask("?")
    odd = [
        {"id": 1}, {"id": ""}, {"conversation": asked[0]}, {"conversation": ()}, {"conversation": "?"}, {"answers": "red"},
        {"answers": (1,)}, {"group": None}, {"answers": None}, {"conversation": None},
    ]  # fmt: skip
    for wrong in odd:
        with pytest.raises(InputError, match="an example needs"):
            Example(**{"id": "1", "conversation": asked, "answers": ("red",), **wrong})


@pytest.mark.parametrize(
    ("rating", "problem"),
    [
        (RatingJudge(Counts("")), "the judge rated no reply to 3 questions"),
        (RatingJudge(Counts("I cannot say")), "the judge rated no reply to 3 questions"),
        (lambda *_: None, "the judge rated no reply to 3 questions"),
        (lambda *_: "high", "a judge must return a number or None, got 'high' for the reply 'red'"),
        (lambda *_: float("nan"), "a judge must return a number or None, got nan"),
    ],
)  # fmt: skip
def test_a_judge_that_answers_nothing_is_one_line(tmp_path: Path, picture: str, rating: Any, problem: str) -> None:
    path, config = tmp_path / "p.jsonl", EvalConfig(method=Method(samples=2, select="judge"))
    with pytest.raises(InputError, match=problem):
        evaluate(Asks(picture), Counts(), config, model="m", predictions=path, judge=rating)
    assert len(path.read_text().splitlines()) == 1


def test_numbers_of_a_saved_file_stay_json(tmp_path: Path, picture: str) -> None:
    path = tmp_path / "p.jsonl"
    evaluate(Asks(picture), Counts("\ud800 half"), model="m", predictions=path)
    assert [json.loads(line) for line in path.read_text().splitlines()]
    assert evaluate(Asks(picture), Counts(), model="m", predictions=path)["value"] == 0
