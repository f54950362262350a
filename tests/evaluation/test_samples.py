"""Several replies to a question: all are kept, one counts, fewer are scored from the same, and a kill changes nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ivl.cli.eval import evaluate as command
from ivl.errors import InputError
from ivl.evaluation.config import EvalConfig, Method
from ivl.evaluation.run import evaluate
from ivl.evaluation.scoring import exact_match
from ivl.evaluation.task import Example, Task
from ivl.evaluation.voting import Candidate, by_size, curve
from ivl.generators import PlainReply
from ivl.types import Conversation, Message, SamplingParams, Text
from tests.helpers.engines import tiny_directory

VOTED = Method(style="final_answer", samples=8)
NUM = 40


class Sums(Task):
    name, metric, params = "sums", "exact_match", SamplingParams(max_new_tokens=64, temperature=1.0)

    def examples(self) -> Iterator[Example]:
        for n in range(NUM):
            yield Example(id=f"sum-{n}", conversation=(Message("user", (Text(f"{n}+1"),)),), answers=(str(n + 1),))

    def score(self, reply: str, example: Example) -> float:
        return exact_match(reply, example.answers)


class Unsure:
    """Right three times of five, and otherwise wrong in many ways or without an answer: what voting is for."""

    def __init__(self) -> None:
        self.asked = 0
        self.texts: list[str] = []

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[object]:
        raise NotImplementedError

    def generate(self, conversations: Sequence[Conversation], params: Sequence[SamplingParams]) -> list[PlainReply]:
        self.asked += len(conversations)
        self.texts += [conversation[-1].text for conversation in conversations]
        return [self._reply(c[-1].text, p) for c, p in zip(conversations, params, strict=True)]

    def _reply(self, text: str, params: SamplingParams) -> PlainReply:
        n, rng = int(text.split("+")[0]), random.Random(params.seed)
        drawn = rng.random()
        if drawn > 0.9:
            return PlainReply("hm\nhm\nno idea", "stop")
        return PlainReply(f"well\n{n} and one\nFinal answer: {n + 1 if drawn < 0.6 else rng.randrange(1000)}", "stop")


def run(path: Path, generator: Unsure | None = None, **options: object) -> dict:
    judge = options.pop("judge", None)
    config = EvalConfig(**{"batch_size": 7, "method": VOTED, "sampling": Sums.params, **options})
    return evaluate(Sums(), generator or Unsure(), config, model="m", predictions=path, judge=judge)


def test_voting_is_better_and_everything_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    report = run(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["method"]["samples"] == 8 and all(len(row["samples"]) == 8 for row in rows[1:])
    assert len({sample["text"] for row in rows[1:] for sample in row["samples"]}) > 60
    points = report["samples"]["curve"]
    assert [p["samples"] for p in points] == [1, 2, 4, 8]
    assert points[-1]["value"] == report["value"] > points[0]["value"] + 0.15
    assert all(p["ci95"][0] <= p["value"] <= p["ci95"][1] for p in points)
    every = [sample for row in rows[1:] for sample in row["samples"]]
    assert report["samples"]["replies"] == len(every) == 8 * NUM
    assert report["samples"]["without_answer"] == sum(sample["answer"] is None for sample in every) > 0
    assert report["method"]["select"] == "vote" and report["samples"]["without_rating"] is None


def test_a_file_cut_anywhere_is_completed(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    expected, data = run(whole), whole.read_bytes()
    for cut in [*range(0, 400, 133), *random.Random(0).sample(range(400, len(data)), 2), len(data)]:
        path, generator = tmp_path / "cut.jsonl", Unsure()
        path.write_bytes(data[:cut])
        assert run(path, generator) == expected and path.read_bytes() == data
        assert generator.asked == 8 * (NUM - max(0, data[:cut].count(b"\n") - 1))


def test_another_method_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    run(path)
    others = {
        "samples 8, this run has 4": replace(VOTED, samples=4), "style 'final_answer', this run has 'direct'": Method(),
        "style 'final_answer', this run has 'boxed'": replace(VOTED, style="boxed"),
    }  # fmt: skip
    for difference, other in others.items():
        with pytest.raises(InputError, match=f"holds predictions with method.{difference}; --fresh forgets them"):
            run(path, method=other)
    with pytest.raises(InputError, match=r"holds predictions with params\.temperature 1\.0, this run has 0\.5; --fresh"):
        run(path, sampling=SamplingParams(max_new_tokens=64, temperature=0.5))
    run(tmp_path / "one.jsonl", method=Method(style="final_answer"))
    with pytest.raises(InputError, match="at temperature 0 all 8"):
        run(tmp_path / "q.jsonl", sampling=SamplingParams())


def test_other_seeds_give_other_replies_and_examples_differ(tmp_path: Path) -> None:
    one, two = (
        run(tmp_path / f"{seed}.jsonl", sampling=SamplingParams(temperature=1.0, max_new_tokens=64, seed=seed))
        for seed in (0, 1)
    )
    assert one["samples"]["without_answer"] != two["samples"]["without_answer"] or one["value"] != two["value"]


def test_a_judge_chooses_and_is_needed_to(tmp_path: Path) -> None:
    method = Method(style="final_answer", samples=8, select="judge")

    def knows(conversation: Conversation, reply: str) -> float:
        n = int(conversation[-1].text.split("+")[0])
        return 10.0 if reply.endswith(f": {n + 1}") else 1.0

    report = run(tmp_path / "p.jsonl", method=method, judge=knows)
    assert report["value"] >= 0.95 and report["samples"]["without_rating"] == 0
    for wrong in ({"method": method}, {"judge": knows}):
        with pytest.raises(InputError, match="a judge is needed"):
            run(tmp_path / "q.jsonl", **wrong)


def test_questions_are_put_so_only_if_asked(tmp_path: Path) -> None:
    plain, asking = Unsure(), Unsure()
    run(tmp_path / "a.jsonl", plain, limit=3)
    run(tmp_path / "b.jsonl", asking, limit=3, method=replace(VOTED, instruct=True))
    assert plain.texts[0] == "0+1" and asking.texts[0].startswith("0+1\n") and "Final answer:" in asking.texts[0]


def test_the_curve_is_the_expectation_over_subsets() -> None:
    """With two kinds of wrong replies and votes of 1, 2 and all, expectations are known."""
    scores = [[1.0, 1.0, 0.0, 0.0]] * 50
    samples = [[Candidate(text=a, answer=a) for a in ("x", "x", "y", "z")]] * 50
    found = by_size(samples, scores, "vote")
    assert found[1].mean() == 0.5 and found[4].mean() == 1.0
    # Of six pairs one is right twice, four are half right and the first of the two is taken.
    assert found[2].mean() == pytest.approx(0.5, abs=0.07)
    assert [p["samples"] for p in curve([s[:3] for s in samples], [s[:3] for s in scores], "vote")] == [1, 2, 3]


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("easy_vqa")
    model, out = str(tiny_directory(tmp_path / "model")), tmp_path / "report.json"
    common = [model, "--limit", "2", "--samples", "4", "--out", str(out), "--max-new-tokens", "4"]
    command([*common, "--select", "likelihood", "--temperature", "1.0"])
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [p["samples"] for p in report["samples"]["curve"]] == [1, 2, 4] and "4 replies  likelihood" in printed
    assert report["params"]["temperature"] == 1.0 and report["params"]["seed"] == 0
    assert "data:image/png" in out.with_suffix(".html").read_text()
    with pytest.raises(InputError, match=r"holds predictions with params.temperature 1.0, this run has 0.7; --fresh"):
        command([*common, "--select", "likelihood"])
    command([*common, "--cot", "--fresh"])
    report = json.loads(out.read_text())
    assert report["method"]["style"] == "final_answer" and report["samples"]["without_answer"] == 8 and report["value"] == 0
    pytest.importorskip("llguidance")
    command([*common, "--select", "judge", "--judge-model", model, "--fresh"])
    report = json.loads(out.read_text())
    assert report["samples"]["without_rating"] == 0 and report["judge"]["name"] == model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "need 1 to 10,000 replies to each question"),
        (["--select", "vote"], "--select vote chooses among several replies: give --samples 2 or more"),
        (["--samples", "4", "--select", "judge"], "--select judge needs one of --judge.model and --judge.url"),
        (["--samples", "4", "--select", "judge", "--judge-url", "http://x/v1"], "--judge.url needs --judge.url-model"),
        (["--temperature", "-1"], "temperature must be a number in"),
        (["--samples", "2", "--temperature", "0"], "at temperature 0 all 2 replies are the same"),
        (["--samples", "2", "--max-new-tokens", "0"], "max_new_tokens must be a whole number in"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command(["no-model", *options])
