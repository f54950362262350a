"""The files of a complete run, written from its journal: rows kept and dropped, verdicts, the mixture and the report."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ivl.data.rows import from_record
from ivl.errors import DataError
from ivl.filters.report import FilterReport
from ivl.filters.rows import RowChecker, RowEntry
from ivl.utils.files import write_atomic, write_json
from ivl.utils.jsonl import AppendLog, json_line

TEXT = ("jsonl", "json")
"""Containers whose rows are kept as they are."""


def write_outputs(out: Path, checker: RowChecker, entries: Iterator[RowEntry], judge: str | None) -> None:
    """Write every file of a run; report.json, written last, tells that the others are complete.

    Args:
        entries: the entries of the journal, in order.
        judge: the name of the judge, for the report.
    """
    for path in out.glob("kept/*.jsonl"):
        path.unlink()
    report, files = FilterReport(checker), kept_files(checker.specs)
    logs = {name: AppendLog(out / name, 0) for name in ("verdicts.jsonl", "dropped.jsonl", *files.values())}
    for entry in entries:
        report.count(entry)
        logs["verdicts.jsonl"].append_bytes(json_line(_without(entry, "problem", "signatures")))
        if entry["keep"]:
            logs[files[entry["dataset"]]].append_bytes(_kept(checker, entry))
        else:
            head = json_line(_without(entry, "keep", "scores", "unjudged", "signatures")).removesuffix(b"}\n")
            logs["dropped.jsonl"].append_bytes(head + b', "row": ' + _dropped(checker, entry) + b"}\n")
    for log in logs.values():
        log.sync()
        log.close()
    figures = report.figures(judge)
    write_json(out / "meta.json", _meta(checker, files, report.datasets))
    write_atomic(out / "report.html", report.page(figures))
    write_json(out / "report.json", figures)


def _without(entry: RowEntry, *keys: str) -> RowEntry:
    return {key: value for key, value in entry.items() if key not in keys}


def _kept(checker: RowChecker, entry: RowEntry) -> bytes:
    """Return a row as a line: its own bytes if they are one, the same JSON, or else its Record written anew."""
    rows = checker.files[entry["dataset"]]
    data = rows.raw(entry["row"])
    if isinstance(data, bytes) and rows.container in TEXT:
        return data + b"\n" if rows.container == "jsonl" else json_line(json.loads(data))
    record = checker.record(entry)
    try:
        return json_line(from_record(record))
    except DataError:  # the reference's rows cannot hold it, such as a question about the word <image>
        return json_line(from_record(record, layout="openai"))


def _dropped(checker: RowChecker, entry: RowEntry) -> bytes:
    """Return a row as JSON on one line; a string if it is not JSON, null if its bytes cannot be read."""
    try:
        data = checker.files[entry["dataset"]].raw(entry["row"])
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


def kept_files(datasets: Iterable[str]) -> dict[str, str]:
    """Return a file for each data set, named like it; equal names are numbered."""
    taken: Counter[str] = Counter()
    files = {}
    for name in datasets:
        stem = re.sub(r"[^\w.-]+", "_", name).strip("._")[:100] or "rows"
        taken[stem.casefold()] += 1
        number = taken[stem.casefold()]
        files[name] = f"kept/{stem}.jsonl" if number == 1 else f"kept/{stem}~{number}.jsonl"
    return files


def _meta(checker: RowChecker, files: dict[str, str], datasets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the mixture of the kept rows; a data set that lost all of its rows is left out."""
    meta = {}
    for name, spec in checker.specs.items():
        if kept := datasets[name]["kept"]:
            meta[name] = {"root": str(Path(spec.root).absolute()), "annotation": files[name], "length": kept}
            meta[name] |= {"data_augment": spec.data_augment, "repeat_time": spec.repeat_time}
            if spec.max_dynamic_patch is not None:
                meta[name]["max_dynamic_patch"] = spec.max_dynamic_patch
            rows = checker.files[name]
            if rows.container in TEXT and rows.layout is not None:
                meta[name]["format"] = rows.layout
    return meta
