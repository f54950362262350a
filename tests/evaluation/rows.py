"""Hand-made rows of benchmarks in the formats of their files, and predictors whose figures are known."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.run import Evaluated, evaluate_all
from ivl.evaluation.task import Example
from ivl.evaluation.tasks import TASKS
from ivl.types import Conversation, SamplingParams, TextDelta


def png(color: str = "red", size: tuple[int, int] = (16, 16)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


PICTURE = base64_of(png())


def write_tsv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as VLMEvalKit's TSV; a missing value is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(columns)
        writer.writerows([[row.get(column, "") for column in columns] for row in rows])
    return path


def benchmark(name: str, path: Path, **settings: Any) -> Benchmark:
    task = TASKS[name]
    assert isinstance(task, Benchmark)
    return replace(task, path=path, **settings)


def perfect(example: Example) -> str:
    return example.answers[0]


def always_a(example: Example) -> str:
    return "A"


def empty(example: Example) -> str:
    return ""


class Listed:
    """Gives replies in the order of the examples."""

    fingerprint = "listed"

    def __init__(self, replies: Sequence[str]) -> None:
        self.replies = iter(replies)

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
        yield TextDelta(next(self.replies), finish_reason="stop")


def evaluated(
    task: Benchmark, reply: Callable[[Example], str], folder: Path, *, name: str = "", **options: Any
) -> Evaluated:  # fmt: skip
    """Evaluate the predictor that answers an example by `reply`; its files are NAME.jsonl, NAME.scores.jsonl."""
    generator = Listed([reply(example) for example in task.examples()])
    predictions = folder / f"{name or f'{task.name}-{len(list(folder.iterdir()))}'}.jsonl"
    return evaluate_all(task, generator, model=name or "m", predictions=predictions, **options)


def figures(task: Benchmark, reply: Callable[[Example], str], folder: Path, **options: Any) -> dict[str, float]:
    """Return the figures by name, the headline under `headline`."""
    report = evaluated(task, reply, folder, **options).report
    return {"headline": report["value"], **{name: row["value"] for name, row in report["by_type"].items()}}
