"""Ask, score, report. Predictions are saved as they come, and a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.evaluation.task import Example, Task
from ivl.generators import Generator, answers_of
from ivl.journal import write_whole
from ivl.scoring import wilson

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
    score: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    done: int
    total: int
    resumed: int
    """Predictions of an earlier run among the done."""
    value: float
    """The metric so far."""


def evaluate(
    task: Task,
    generator: Generator,
    *,
    model: str,
    predictions: Path,
    fingerprint: str = "",
    limit: int | None = None,
    batch_size: int = 512,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Answer a task's first `limit` examples and return the report.

    predictions: jsonl file, continued if it exists; model and fingerprint say whose predictions they are.
    batch_size: most examples asked, and saved, at a time.

    Raises:
        InputError: if the file holds predictions of something else, or an example cannot be answered.
    """
    examples = list(islice(task.examples(), limit))
    if not examples:
        raise InputError(f"task {task.name} has no examples")
    params = {**asdict(task.params), "stop": list(task.params.stop)}
    store = Predictions(predictions, {"task": task.name, "model": model, "fingerprint": fingerprint, "params": params})
    wanted = {example.id: example for example in examples}
    if len(wanted) != len(examples):
        raise InputError(f"task {task.name} gives {len(examples)} examples but only {len(wanted)} different ids")
    done = {p.id: _rescored(task, wanted[p.id], p) for p in store.read() if p.id in wanted}
    resumed, total = len(done), sum(p.score for p in done.values())
    todo = iter([example for example in examples if example.id not in done])
    size = min(FIRST_BATCH, batch_size)
    with store:
        while batch := list(islice(todo, size)):
            started = time.monotonic()
            try:
                texts = answers_of(generator, [example.conversation for example in batch], task.params)
            except InputError as error:
                raise InputError(f"task {task.name}, examples {batch[0].id} to {batch[-1].id}: {error}") from error
            new = [_prediction(task, example, text) for example, text in zip(batch, texts, strict=True)]
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
        "model": model,
        "params": params,
        "versions": versions(),
    }


def _prediction(task: Task, example: Example, text: str) -> Prediction:
    score = task.score(text, example.answers)
    return Prediction(id=example.id, group=example.group, answers=example.answers, prediction=text, score=score)


def _rescored(task: Task, example: Example, saved: Prediction) -> Prediction:
    """A saved prediction under the scoring rule of today."""
    return _prediction(task, example, saved.prediction)


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
            return Prediction(**{**row, "answers": tuple(row["answers"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.path}:{number}: not a prediction ({error}); delete the file to start again") from error

    def _check(self, found: dict[str, Any]) -> None:
        for key, value in self.about.items():
            if found.get(key) != value:
                raise InputError(
                    f"{self.path}: holds predictions with {key} {found.get(key)!r}, this run has {value!r}; "
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
        self._write(asdict(prediction) for prediction in predictions)

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        self.file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self.file.flush()
        os.fsync(self.file.fileno())


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The report as JSON; a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
