"""Ask, score, report. Predictions are saved as they come, and a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.evaluation.curve import curve
from ivl.evaluation.prompts import reasoned
from ivl.evaluation.scoring import wilson
from ivl.evaluation.task import Example, Method, Task
from ivl.evaluation.voting import Candidate, Rater, choose, rate, sample
from ivl.generators import Generator, answers_of
from ivl.types import Conversation, SamplingParams
from ivl.utils.files import write_atomic

PACKAGES = ("ivl", "torch", "tokenizers", "pillow", "easy-vqa")
"""Versions noted in a report."""
FIRST_BATCH = 16
"""Batches grow from here, up to what is answered in a few seconds: a slow model too shows progress and saves often."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One line of a predictions file."""

    id: str
    group: str
    answers: tuple[str, ...]
    prediction: str
    """The reply that counts."""
    score: float
    samples: tuple[Candidate, ...] = ()
    """All replies, where there is more than the text of one to tell."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    done: int
    total: int
    resumed: int
    """Predictions of an earlier run among the done."""
    value: float
    """The metric so far."""


ONE_REPLY = Method()


def evaluate(
    task: Task,
    generator: Generator,
    *,
    model: str,
    predictions: Path,
    fingerprint: str = "",
    limit: int | None = None,
    batch_size: int = 512,
    params: SamplingParams | None = None,
    method: Method = ONE_REPLY,
    judge: Rater | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Answer a task's first `limit` examples and return the report.

    predictions: jsonl file, continued if it exists; model and fingerprint say whose predictions they are.
    batch_size: most examples asked, and saved, at a time.
    params: in place of the task's; what is sampled follows from their seed (0 if none) and the example's id.
    method: how often a question is asked and which reply counts. judge: who rates replies, if the method has one.

    Raises:
        InputError: if the file holds predictions of something else, or an example cannot be answered.
    """
    if (method.select == "judge" and method.samples > 1) != (judge is not None):
        raise InputError(f"a judge is needed to select by judge, and then only; got select {method.select!r}, judge {judge}")
    examples = list(islice(task.examples(), limit))
    if not examples:
        raise InputError(f"task {task.name} has no examples")
    asking = _Asking(task, generator, params or task.params, method, judge)
    settings = {**asdict(asking.params), "stop": list(asking.params.stop)}
    about = {"task": task.name, "model": model, "fingerprint": fingerprint, "params": settings}
    if method != ONE_REPLY:
        about["method"] = asdict(method)
    store = Predictions(predictions, about)
    wanted = {example.id: example for example in examples}
    if len(wanted) != len(examples):
        raise InputError(f"task {task.name} gives {len(examples)} examples but only {len(wanted)} different ids")
    done = {p.id: asking.rescored(wanted[p.id], p) for p in store.read() if p.id in wanted}
    resumed, total = len(done), sum(p.score for p in done.values())
    todo = iter([example for example in examples if example.id not in done])
    size = min(FIRST_BATCH, batch_size)
    with store:
        while batch := list(islice(todo, size)):
            started = time.monotonic()
            try:
                new = asking.answered(batch)
            except InputError as error:
                raise InputError(f"task {task.name}, examples {batch[0].id} to {batch[-1].id}: {error}") from error
            store.append(new)
            done.update((p.id, p) for p in new)
            total += sum(p.score for p in new)
            seconds = time.monotonic() - started
            if seconds < 2:
                size = min(2 * size, batch_size)
            elif seconds > 20:
                size = max(1, size // 2)
            on_progress(Progress(done=len(done), total=len(examples), resumed=resumed, value=total / len(done)))
    by_type = defaultdict(list)
    for prediction in done.values():
        by_type[prediction.group].append(prediction.score)
    return {
        "task": task.name,
        "metric": task.metric,
        **summary([p.score for p in done.values()]),
        "by_type": {group: summary(scores) for group, scores in sorted(by_type.items())},
        **({} if method == ONE_REPLY else {"method": asdict(method), "samples": asking.about([*done.values()])}),
        "model": model,
        "params": settings,
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Asking:
    """From examples to predictions."""

    task: Task
    generator: Generator
    params: SamplingParams
    method: Method
    judge: Rater | None

    def answered(self, examples: list[Example]) -> list[Prediction]:
        asked = [self.conversation(example) for example in examples]
        if self.method == ONE_REPLY:
            texts = answers_of(self.generator, asked, [self.seeded(example) for example in examples])
            return [self.prediction(example, text) for example, text in zip(examples, texts, strict=True)]
        found = sample(
            self.generator,
            asked,
            [self.seeded(example) for example in examples],
            self.method.samples,
            style=self.method.style,
            likelihood=self.method.select == "likelihood" or self.method.likelihood,
        )
        if self.judge is not None:
            found = rate(self.judge, asked, found)
        return [self.selected(example, tuple(some)) for example, some in zip(examples, found, strict=True)]

    def conversation(self, example: Example) -> Conversation:
        return reasoned(example.conversation, self.method.style) if self.method.instruct else example.conversation

    def seeded(self, example: Example) -> SamplingParams:
        """Other random numbers for every example, and the same on every run."""
        if self.params.temperature == 0:
            return self.params
        digest = hashlib.sha256(f"{self.params.seed or 0} {example.id}".encode()).digest()
        return replace(self.params, seed=int.from_bytes(digest[:4], "little") >> 2)

    def prediction(self, example: Example, text: str, samples: tuple[Candidate, ...] = ()) -> Prediction:
        score = self.task.score(text, example.answers)
        return Prediction(
            id=example.id, group=example.group, answers=example.answers, prediction=text, score=score, samples=samples
        )

    def selected(self, example: Example, samples: tuple[Candidate, ...]) -> Prediction:
        chosen = samples[choose(samples, self.method.select)]
        return replace(self.prediction(example, chosen.text, samples), score=self.worth(chosen, example.answers))

    def worth(self, candidate: Candidate, answers: tuple[str, ...]) -> float:
        return 0.0 if candidate.answer is None else self.task.score(candidate.answer, answers)

    def rescored(self, example: Example, saved: Prediction) -> Prediction:
        """A saved prediction under the rules of today."""
        return self.selected(example, saved.samples) if saved.samples else self.prediction(example, saved.prediction)

    def about(self, predictions: list[Prediction]) -> dict[str, Any]:
        """The metric for fewer replies, and how many replies had nothing to give."""
        samples = [p.samples for p in predictions]
        every = [candidate for some in samples for candidate in some]
        scores = [[self.worth(c, p.answers) for c in p.samples] for p in predictions]
        return {
            "replies": len(every),
            "without_answer": sum(c.answer is None for c in every),
            "without_rating": sum(c.rating is None for c in every) if self.judge is not None else None,
            "curve": [asdict(point) for point in curve(samples, scores, self.method.select)],
        }


def summary(scores: list[float]) -> dict[str, Any]:
    """Mean score with its 95% interval."""
    total = sum(scores)
    return {"value": total / len(scores), "ci95": list(wilson(total, len(scores))), "n": len(scores)}


def versions() -> dict[str, str]:
    """Installed versions of what may influence a score."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Predictions:
    """A jsonl file of predictions under a first line that says whose they are.

    Lines are appended in batches, each on disk before the next begins. A run killed while writing leaves at most one
    unfinished line, at the end; it is removed and asked again.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.about = about

    def read(self) -> list[Prediction]:
        """What is saved; an unfinished last line is cut off the file."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            return []
        self._check(self._parse(lines[0], 1))
        return [self._prediction(line, number) for number, line in enumerate(lines[1:], 2)]

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{self.path}:{number}: not JSON ({error}); delete the file to start again") from error
        if not isinstance(row, dict):
            raise InputError(f"{self.path}:{number}: expected an object, got {row!r}; delete the file to start again")
        return row

    def _prediction(self, line: bytes, number: int) -> Prediction:
        row = self._parse(line, number)
        try:
            samples = tuple(Candidate(**each) for each in row.get("samples", ()))
            return Prediction(**{**row, "answers": tuple(row["answers"]), "samples": samples})
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.path}:{number}: not a prediction ({error}); delete the file to start again") from error

    def _check(self, found: dict[str, Any]) -> None:
        for key in {**self.about, **found}:
            if found.get(key) != self.about.get(key):
                raise InputError(
                    f"{self.path}: holds predictions with {key} {found.get(key)!r}, this run has {self.about.get(key)!r}; "
                    "delete the file or name another with --predictions"
                )

    def __enter__(self) -> Predictions:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("ab")
        if self.file.tell() == 0:
            self._write([self.about])
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, predictions: Iterable[Prediction]) -> None:
        rows = map(asdict, predictions)
        self._write({key: value for key, value in row.items() if key != "samples" or value} for row in rows)

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        self.file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self.file.flush()
        os.fsync(self.file.fileno())


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The report as JSON; a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
