"""Evaluation: nothing is lost or doubled by a crash, whatever the engine is."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ivl.errors import InputError
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.run import evaluate
from ivl.evaluation.scoring import exact_match, wilson
from ivl.evaluation.task import Example, Task
from ivl.evaluation.tasks import TASKS, find
from ivl.types import Conversation, Message, SamplingParams, Text, TextDelta
from ivl.utils.files import write_json


class Sums(Task):
    """Forty sums; the group is the parity of the first number."""

    name, metric, params = "sums", "exact_match", SamplingParams(max_new_tokens=3)

    def examples(self) -> Iterator[Example]:
        for n in range(40):
            question = (Message("user", (Text(f"{n}+1"),)),)
            yield Example(id=f"sum-{n}", conversation=question, answers=(str(n + 1),), group="even" if n % 2 == 0 else "odd")

    def score(self, reply: str, example: Example) -> float:
        return exact_match(reply, example.answers)


class Streaming:
    """Answers sums one character at a time, wrongly for multiples of five."""

    def __init__(self, pause: float = 0.0) -> None:
        self.asked: list[str] = []
        self.pause = pause

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
        self.asked.append(prompt[0].text)
        time.sleep(self.pause)
        n = int(prompt[0].text.split("+")[0])
        text = "wrong" if n % 5 == 0 else f"{n + 1}."
        for character in text:
            yield TextDelta(character)


@dataclass
class Answer:
    text: str


class Batching(Streaming):
    def generate(self, conversations: Sequence[Conversation], params: SamplingParams) -> list[Answer]:
        return [Answer("".join(d.text for d in self.stream(c, params))) for c in conversations]


def run(path: Path, generator: Streaming | None = None, **options: object) -> dict:
    about = {"model": options.pop("model", "m"), "predictions": path, "task": options.pop("task", Sums())}
    about |= {key: options.pop(key) for key in ("on_progress", "judge") if key in options}
    return evaluate(generator=generator or Batching(), config=EvalConfig(**{"batch_size": 7, **options}), **about)


def test_report(tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []
    report = run(tmp_path / "p.jsonl", on_progress=lambda done, total, *, resumed=0, note="": seen.append((done, note)))
    assert (report["task"], report["metric"], report["n"], report["value"]) == ("sums", "exact_match", 40, 0.8)
    assert report["ci95"] == list(wilson(32, 40)) and report["model"] == "m" and "ivl" in report["versions"]
    assert {name: (row["n"], row["value"]) for name, row in report["by_type"].items()} == {"even": (20, 0.8), "odd": (20, 0.8)}
    assert [done for done, _ in seen] == [7, 14, 21, 28, 35, 40] and seen[-1][1] == "80.00% so far"
    write_json(tmp_path / "deep" / "report.json", report)
    assert json.loads((tmp_path / "deep" / "report.json").read_text()) == report
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["report.json"]


def test_a_generator_without_batches_gives_the_same(tmp_path: Path) -> None:
    assert run(tmp_path / "a.jsonl", Streaming()) == run(tmp_path / "b.jsonl", Batching())
    lines = [(tmp_path / name).read_text().splitlines()[1:] for name in ("a.jsonl", "b.jsonl")]
    assert lines[0] == lines[1]


def test_a_file_cut_anywhere_is_completed_without_loss_or_repetition(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    expected = run(whole)
    data = whole.read_bytes()
    cuts = [*range(0, 300, 37), *random.Random(0).sample(range(300, len(data)), 12), len(data)]
    for cut in cuts:
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:cut])
        generator = Batching()
        assert run(path, generator) == expected
        assert path.read_bytes() == data
        assert len(generator.asked) == 40 - max(0, data[:cut].count(b"\n") - 1)


def in_a_child(path: Path, pause: float) -> int:
    """Start a run in a process of its own, and return its id."""
    child = os.fork()
    if child:
        return child
    try:
        run(path, Batching(pause), batch_size=6)
    finally:
        os._exit(0)


def grown(path: Path, size: int) -> None:
    """Wait until a file is larger than this."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > size) and time.monotonic() < deadline:
        time.sleep(0.001)


def test_a_file_of_predictions_belongs_to_one_process_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    child = in_a_child(path, 60)
    grown(path, 0)
    data = path.read_bytes()
    for fresh in (False, True):
        with pytest.raises(InputError, match=r"p\.jsonl: another process is writing this file"):
            run(path, fresh=fresh)
    assert path.read_bytes() == data
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert run(path, fresh=True)["n"] == 40


def test_a_limit_can_be_raised_later(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    assert run(path, limit=10)["n"] == 10
    generator = Batching()
    assert run(path, generator)["n"] == 40 and len(generator.asked) == 30
    assert run(path, limit=5) == run(tmp_path / "other.jsonl", limit=5)


def test_predictions_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    run(path)
    with pytest.raises(InputError, match=r"p.jsonl: holds predictions with model 'm', this run has 'n'"):
        run(path, model="n")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "{broken", *lines[3:]]) + "\n")
    with pytest.raises(InputError, match=r"p\.jsonl:4: not valid JSON"):
        run(path)


def test_tasks_are_found_by_name() -> None:
    assert find("easy-vqa").metric == "exact_match" and "easy-vqa" in TASKS
    with pytest.raises(InputError, match="unknown task 'easy_vqa'; did you mean 'easy-vqa"):
        find("easy_vqa")
    with pytest.raises(InputError, match=r"tasks are .*easy-vqa, "):
        find("zzz")


def test_easy_vqa_is_the_official_test_split() -> None:
    pytest.importorskip("easy_vqa")
    examples = list(find("easy-vqa").examples())
    assert len(examples) == len({e.id for e in examples}) == 9673
    counts = {group: sum(e.group == group for e in examples) for group in ("color", "shape", "yes/no")}
    assert counts == {"color": 1280, "shape": 1257, "yes/no": 7136}
    assert all(len(e.answers) == 1 and len(e.conversation) == 1 for e in examples)


def test_training_asks_what_evaluation_asks() -> None:
    pytest.importorskip("easy_vqa")
    from ivl.evaluation.tasks import easy_vqa

    for row, example in zip(easy_vqa.rows("test")[:50], find("easy-vqa").examples(), strict=False):
        trained = easy_vqa.conversation(row, answered=True)
        assert trained[:1] == example.conversation and trained[1].text == example.answers[0]
