"""Files of other tools, written and scored: VLMEvalKit's predictions, lmms-eval's samples; and submissions to servers."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.config import EvalConfig, Export
from ivl.evaluation.data import md5
from ivl.evaluation.task import Scored, Task
from ivl.evaluation.tasks import TASKS, task_of
from ivl.types import Conversation, SamplingParams, TextDelta
from ivl.utils.files import new_file, write_atomic
from ivl.utils.jsonl import json_line
from ivl.utils.sealed import put_in_place

LONGEST_CELL = 32_767
"""Characters of a cell of xlsx; Excel's own limit."""


def given_task(path: Path, config: EvalConfig) -> Benchmark:
    """Return the benchmark that takes questions and replies from a file.

    It is the one that the configuration names, or else the one whose file's name ends the name of this file, `MODEL_NAME.tsv`
    or `..._samples_TASK.jsonl`.

    Raises:
        InputError: if no task fits.
    """
    if config.data or config.metric:
        raise InputError("--score takes questions and replies from its own file; leave out --data and --metric")
    if not path.is_file():
        raise InputError(f"{path}: no such file of predictions")
    if not isinstance(TASKS.get(config.task), Benchmark):
        fits = {
            task.file: name for name, task in TASKS.items() if isinstance(task, Benchmark)
            and path.stem.endswith((f"_{task.file}", f"_samples_{name}", f"_samples_{task.file.lower()}"))
        }  # fmt: skip
        if not fits:
            raise InputError(f"{path}: its name tells no benchmark of `ivl eval --list`; name it with --task")
        config = replace(config, task=fits[max(fits, key=len)])
    task = task_of(replace(config, data=(str(path),)))
    assert isinstance(task, Benchmark), "it is one of the benchmarks"
    return replace(task, given=True)


def model_of(path: Path, task: Benchmark) -> str:
    """Return the model's name: what stands before the benchmark in a name of VLMEvalKit, and the folder of samples."""
    if "_samples_" in path.stem:
        return path.absolute().parent.name.rpartition("__")[2]
    return path.stem.removesuffix(f"_{task.file}")


class Given:
    """Gives the reply that comes as the last message."""

    def __init__(self, path: Path) -> None:
        self.fingerprint = f"replies of {md5(path)}"

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
        """Yield the last message."""
        del params
        yield TextDelta(prompt[-1].text, finish_reason="stop")


def export(
    kind: Export, folder: Path, task: Task, report: Mapping[str, Any], scored: Sequence[Scored], replies: Sequence[str]
) -> list[Path]:
    """Write the files of a run; return their paths.

    Raises:
        InputError: if a reply does not fit into a cell of xlsx, a library is missing or a file cannot be written.
    """
    model = re.sub(r"[^\w.-]+", "_", str(report["model"]).rstrip("/").rpartition("/")[2])
    try:
        if kind == "lmms-eval":
            return _lmms_eval(folder / model, task, report, scored, replies)
        stem = folder / model / f"{model}_{getattr(task, 'file', task.name)}"
        table = getattr(task, "table", "acc")
        figures = {"Overall": report, **report["by_type"]}
        percent = {name: 1 if table == "acc" or row.get("points") else 100 for name, row in figures.items()}
        line = {"split": "none", **{name: percent[name] * row["value"] for name, row in figures.items()}}
        files = [write_table(Path(f"{stem}.{kind}"), _predictions(scored, replies))]
        return [*files, *([] if report["value"] is None else [write_table(Path(f"{stem}_{table}.csv"), [line])])]
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def _predictions(scored: Sequence[Scored], replies: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows as VLMEvalKit saves them: all columns but the picture, and the reply."""
    return [{"index": s.example.id, **s.example.row, "prediction": reply} for s, reply in zip(scored, replies, strict=True)]


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as tsv, csv or xlsx, by the name."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [[row.get(column, "") for column in columns] for row in rows]
    if path.suffix == ".xlsx":
        return _put(path, _sheet(path, columns, cells))
    text = io.StringIO()
    writer = csv.writer(text, delimiter="," if path.suffix == ".csv" else "\t", lineterminator="\n")
    writer.writerows([columns, *cells])
    return _put(path, text.getvalue().encode("utf-8", "backslashreplace"))


def _put(path: Path, content: bytes) -> Path:
    """Write a file. One of other content, perhaps of the tool that names its files so, is renamed to NAME.old, never lost."""
    if not path.is_file() or path.read_bytes() != content:
        with new_file(path) as file:
            file.write(content)
        put_in_place(Path(file.name), path)
    return path


def _sheet(path: Path, columns: list[str], cells: Iterable[list[Any]]) -> bytes:
    try:
        import openpyxl
    except ImportError:
        raise InputError(f"{path}: writing xlsx needs openpyxl: pip install openpyxl; or export as tsv") from None
    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    sheet.append(columns)
    for number, line in enumerate(cells, 2):
        texts = [cell if isinstance(cell, int | float) else str(cell) for cell in line]
        if any(isinstance(cell, str) and len(cell) > LONGEST_CELL for cell in texts):
            raise InputError(f"{path}:{number}: a cell of xlsx holds {LONGEST_CELL:,} characters at most; export as tsv")
        sheet.append(texts)
    with io.BytesIO() as file:
        book.save(file)
        return file.getvalue()


def _lmms_eval(
    folder: Path, task: Task, report: Mapping[str, Any], scored: Sequence[Scored], replies: Sequence[str]
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    stamp, metric = time.strftime("%Y%m%d_%H%M%S"), re.sub(r"\W+", "_", report["metric"])
    low, high = report["ci95"] or (0.0, 0.0)
    results = {
        "results": {task.name: {"alias": task.name, f"{metric},none": report["value"],
                                f"{metric}_stderr,none": (high - low) / (2 * 1.959964)}},
        "configs": {task.name: {"task": task.name, "generation_kwargs": report["params"]}}, "versions": {task.name: 0},
        "n-shot": {task.name: 0}, "model_name": report["model"], "n-samples": {task.name: {"effective": len(scored)}},
    }  # fmt: skip
    samples = [
        {
            "doc_id": number, "doc": dict(s.example.row), "target": list(s.example.answers),
            "arguments": s.example.conversation[-1].text, "resps": [[reply]], "filtered_resps": [reply], metric: s.score.value,
            "doc_hash": hashlib.sha256(json.dumps(dict(s.example.row), default=str).encode()).hexdigest(),
        }
        for number, (s, reply) in enumerate(zip(scored, replies, strict=True))
    ]  # fmt: skip
    paths = [folder / f"{stamp}_results.json", folder / f"{stamp}_samples_{task.name}.jsonl"]
    write_atomic(paths[0], json.dumps(results, indent=2))
    write_atomic(paths[1], b"".join(map(json_line, samples)).decode())
    return paths


def submit(path: Path, task: Task, scored: Sequence[Scored], replies: Sequence[str]) -> Path:
    """Write the answers to questions whose references are hidden, as the benchmark's server takes them.

    Args:
        path: The file without its suffix.
    """
    form = getattr(task, "submission", "map")
    if form == "table":
        suffix = "xlsx" if find_spec("openpyxl") else "tsv"  # the server takes xlsx
        return write_table(Path(f"{path}.{suffix}"), _predictions(scored, replies))
    texts = {str(s["id"] or s.example.id): s.score.answer or reply for s, reply in zip(scored, replies, strict=True)}
    answers: Any = texts
    if form == "list":
        answers = [{"questionId": int(key) if key.isdigit() else key, "answer": text} for key, text in texts.items()]
    path = Path(f"{path}.json")
    return _put(path, json.dumps(answers, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace"))
