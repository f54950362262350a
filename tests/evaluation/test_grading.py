"""A judge decides what the rule leaves undecided: asked once, tried again, and never replaced by a letter or a zero."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ivl.errors import InputError
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.grading import Grader
from ivl.evaluation.run import evaluate
from ivl.evaluation.task import Example, JudgeQuestion, Score, Task
from ivl.generators import PlainReply, Refused
from ivl.types import Conversation, Message, SamplingParams, Text

CASES = [json.loads(line) for line in Path(__file__).with_name("golden.jsonl").read_text().splitlines()]


class Scripted:
    """A judge that gives replies in turn, and notes what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.replies = iter(replies)
        self.temperatures: list[float] = []

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[Any]:
        raise NotImplementedError

    def generate(self, conversations: Sequence[Conversation], params: Sequence[SamplingParams]) -> list[PlainReply]:
        self.temperatures += [each.temperature for each in params]
        return [PlainReply(next(self.replies), "stop") for _ in conversations]


def rating(reply: str) -> Score | None:
    return Score(value=float(reply)) if reply in ("0.0", "0.5", "1.0") else None


def question(prompt: str = "rate x", **more: Any) -> Score:
    return Score(undecided=JudgeQuestion(prompt=prompt, read=rating, best=Score(value=1.0), **more))


def test_decisions_are_kept_and_asked_once(tmp_path: Path) -> None:
    path, judge = tmp_path / "j.jsonl", Scripted("0.5", "1.0")
    scores = [question(), Score(value=1.0), question(), question("rate y")]
    assert [s.value for s in Grader(judge, "j", path).decide(scores)] == [0.5, 1, 0.5, 1.0], "equal questions are asked once"
    again = Grader(Scripted(), "j", path)
    assert [s.value for s in again.decide(scores)] == [0.5, 1, 0.5, 1.0] and again.asked == 0
    (tmp_path / "mine").write_text('{"mine": 1}\n')
    with pytest.raises(InputError, match="mine: is no file of a judge's replies"):
        Grader(Scripted(), "j", tmp_path / "mine").decide(scores)
    other = Grader(Scripted("0.0", "0.0"), "k", path)
    assert [s.value for s in other.decide(scores)] == [0, 1, 0, 0], "another judge is asked anew"


def test_a_reply_that_cannot_be_read_is_asked_again_and_warmer(tmp_path: Path) -> None:
    judge = Scripted("perhaps", "hm", "0.5")
    assert Grader(judge, "j", tmp_path / "j.jsonl").decide([question()])[0].value == 0.5
    assert judge.temperatures == [0.0, 0.5, 1.0]


def test_what_stays_undecided_stays_so(tmp_path: Path) -> None:
    judge = Scripted(*"abc")
    grader = Grader(judge, "j", tmp_path / "j.jsonl")
    (score,) = grader.decide([question(tries=3)])
    assert score.undecided and len(judge.temperatures) == 3 and grader.unread == "c"


def test_a_decision_may_ask_a_further_question(tmp_path: Path) -> None:
    def extract(reply: str) -> Score:
        return question(f"rate {reply}")

    first = Score(undecided=JudgeQuestion(prompt="extract", read=extract, best=Score(value=1.0)))
    assert Grader(Scripted("y", "1.0"), "j", tmp_path / "j.jsonl").decide([first])[0].value == 1
    (left,) = Grader(Scripted("y", *"zzzzz"), "j", tmp_path / "k.jsonl").decide([first])
    assert left.undecided and left.undecided.prompt == "extract"


def test_a_judge_that_refuses_one_question_decides_the_others(tmp_path: Path) -> None:
    class Picky(Scripted):
        def generate(self, conversations: Sequence[Conversation], params: Any) -> list[PlainReply]:
            if any("bad" in c[0].text for c in conversations):
                raise Refused("against the rules")
            return [PlainReply("1.0", "stop") for _ in conversations]

    scores = Grader(Picky(), "j", tmp_path / "j.jsonl").decide([question("bad", tries=2), question("good")])
    assert scores[0].undecided and scores[1].value == 1


@pytest.mark.parametrize("case", [c for c in CASES if c["scorer"] == "mmvet_judge_parse"], ids=lambda case: case["id"])
def test_mmvet_reads_its_judge_as_the_official_tool_does(case: dict[str, Any], tmp_path: Path) -> None:
    from ivl.evaluation.benchmark import Benchmark
    from ivl.evaluation.tasks import TASKS

    task, judge = TASKS["mmvet"], Scripted(*case["input"]["judge_replies"])
    assert isinstance(task, Benchmark)
    example = task.example({"index": "1", "question": "q", "answer": "a", "category": "rec"})
    (score,) = Grader(judge, "j", tmp_path / "j.jsonl").decide([task.score("reply", example)])
    expected = case["expected"]
    assert judge.temperatures == expected["temperatures"] and score.value == expected["score"]
    assert (score.undecided is not None) == (expected["calls"] == 5 and expected["score"] == 0)


class Asks(Task):
    """Two questions, of which the rule decides one."""

    name, metric = "asks", "rating"

    def examples(self) -> Iterator[Example]:
        for n in range(2):
            yield Example(id=str(n), conversation=(Message("user", (Text(str(n)),)),), answers=("x",))

    def score(self, reply: str, example: Example) -> Score:
        return Score(value=1.0, answer=reply) if example.id == "0" else question(official="draws a letter at random")


def test_a_report_gives_a_range_or_counts_as_wrong(tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, Any]:
        grader = options.pop("grader", None)
        path = tmp_path / "p.jsonl"
        return evaluate(Asks(), Scripted("a", "b"), EvalConfig(**options), model="m", predictions=path, grader=grader)

    report = run()
    assert report["range"] == [0.5, 1.0] and report["ci95"][1] == 1.0
    assert report["undecided"] == {
        "replies": 1, "count_as": "range", "notes": ["the official tool draws a letter at random"],
    }  # fmt: skip
    assert run(undecided="wrong")["value"] == 0.5 and "range" not in run(undecided="wrong")
    report = run(grader=Grader(Scripted("0.5"), "j", tmp_path / "j.jsonl"))
    assert report["value"] == 0.75 and "undecided" not in report
