"""The files of a complete run, written from its journal: rows kept and dropped, verdicts, the mixture and the report."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ivl.data.mixture import DatasetSpec
from ivl.data.rows import from_record
from ivl.errors import DataError
from ivl.filters.report import FilterReport
from ivl.filters.rows import RowChecker
from ivl.utils.files import write_atomic, write_json
from ivl.utils.jsonl import AppendLog, json_line

TEXT = ("jsonl", "json")
"""Containers whose rows are kept as they are."""


def write_outputs(out: Path, checker: RowChecker, entries: Iterator[dict[str, Any]], judge: str | None) -> None:
    """Write every file of a run; report.json, written last, tells that the others are complete.

    Args:
        entries: the entries of the journal, in order.
        judge: the name of the judge, for the report.
    """
    datasets = {spec.name: n for n, spec in enumerate(checker.specs)}
    report = FilterReport(checker)
    for path in out.glob("kept/*.jsonl"):
        path.unlink()
    names = kept_files(checker.specs)
    logs = {name: AppendLog(out / name, 0) for name in ("verdicts.jsonl", "dropped.jsonl", *names)}
    for entry in entries:
        report.count(entry)
        dataset, row = datasets[entry["dataset"]], entry["row"]
        logs["verdicts.jsonl"].append_bytes(json_line({k: v for k, v in entry.items() if k not in ("problem", "signatures")}))
        if entry["keep"]:
            logs[names[dataset]].append_bytes(_kept(checker, dataset, row))
        else:
            head = {k: v for k, v in entry.items() if k not in ("keep", "scores", "unjudged", "signatures")}
            text = json_line(head).removesuffix(b"}\n")
            logs["dropped.jsonl"].append_bytes(text + b', "row": ' + _dropped(checker, dataset, row) + b"}\n")
    for log in logs.values():
        log.sync()
        log.close()
    figures = report.figures(judge)
    _write_meta(out, checker, figures)
    write_atomic(out / "report.html", report.page(figures))
    write_json(out / "report.json", figures)


def _kept(checker: RowChecker, dataset: int, row: int) -> bytes:
    """Return a row as a line: its own bytes if they are one, the same JSON, or else its Record written anew."""
    rows = checker.rows(dataset)
    data = rows.raw(row)
    if isinstance(data, bytes) and rows.container in TEXT:
        return data + b"\n" if rows.container == "jsonl" else json_line(json.loads(data))
    record = checker.record(dataset, row)
    try:
        return json_line(from_record(record))
    except DataError:  # the reference's rows cannot hold it, such as a question about the word <image>
        return json_line(from_record(record, layout="openai"))


def _dropped(checker: RowChecker, dataset: int, row: int) -> bytes:
    """Return a row as JSON on one line; a string if it is not JSON, null if its bytes cannot be read."""
    try:
        data = checker.rows(dataset).raw(row)
    except DataError:
        return b"null"
    if isinstance(data, bytes):
        try:
            text = data.decode().strip()
            data = json.loads(text)
            if "\n" not in text and "\r" not in text:
                return text.encode()
        except (ValueError, RecursionError):
            data = data.decode("utf-8", "backslashreplace")
    return json.dumps(data, ensure_ascii=False, default=_plain).encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else str(value)


def kept_files(specs: tuple[DatasetSpec, ...]) -> list[str]:
    """Return a file for each data set, named like it; equal names are numbered."""
    taken: Counter[str] = Counter()
    files = []
    for spec in specs:
        stem = re.sub(r"[^\w.-]+", "_", spec.name).strip("._")[:100] or "rows"
        taken[stem.casefold()] += 1
        number = taken[stem.casefold()]
        files.append(f"kept/{stem}.jsonl" if number == 1 else f"kept/{stem}~{number}.jsonl")
    return files


def _write_meta(out: Path, checker: RowChecker, figures: dict[str, Any]) -> None:
    """Write the mixture again, with the kept rows; a data set that lost all of its rows is left out."""
    meta = {}
    for n, (spec, file) in enumerate(zip(checker.specs, kept_files(checker.specs), strict=True)):
        if kept := figures["datasets"][spec.name]["kept"]:
            entry: dict[str, Any] = {"root": str(Path(spec.root).absolute()), "annotation": file}
            entry |= {"data_augment": spec.data_augment, "repeat_time": spec.repeat_time, "length": kept}
            if spec.max_dynamic_patch is not None:
                entry["max_dynamic_patch"] = spec.max_dynamic_patch
            rows = checker.rows(n)
            if rows.container in TEXT and rows.layout is not None:
                entry["format"] = rows.layout
            meta[spec.name] = entry
    write_json(out / "meta.json", meta)
