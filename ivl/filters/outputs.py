"""The files of a complete run, joined from those of its parts: rows kept and dropped, verdicts, the mixture and the report."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ivl.datasets.rows import from_record
from ivl.errors import DataError, InputError
from ivl.filters.report import FilterReport
from ivl.filters.rows import RowChecker, RowEntry, RowPart
from ivl.utils.files import NewFiles, write_atomic, write_json
from ivl.utils.jsonl import json_line
from ivl.utils.strict_json import read_json

OUTPUTS = ("meta.json", "dropped.jsonl", "verdicts.jsonl", "report.html", "report.json")
"""Files of a run beside kept/ and its journal."""
PARTS = "parts"
"""Folder of the files of parts, which is removed at the end."""
TEXT = ("jsonl", "json")
"""Containers whose rows are kept as they are."""


def finished_report(out: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Return the content of report.json, if it is of this very run; it is the last file that a run writes."""
    if not (out / "report.json").is_file():
        return None
    report = read_json(out / "report.json")
    return report if isinstance(report, dict) and report.get("run", about) == about else None


def remove_outputs(out: Path) -> None:
    """Remove the files of an earlier run: those that a run writes, and no others."""
    kept: Iterable[str] = ()
    with suppress(InputError, TypeError, KeyError):
        kept = kept_files(read_json(out / "report.json")["datasets"]).values()
    for name in ("report.json", *OUTPUTS, *kept):
        (out / name).unlink(missing_ok=True)


def part_outputs(checker: RowChecker, entries: list[RowEntry]) -> dict[str, bytes]:
    """The results of a part by their suffixes; the last says that it is done."""
    report, lines = FilterReport(checker), {"verdicts": bytearray(), "dropped": bytearray(), "kept": bytearray()}
    for entry in entries:
        report.count(entry)
        lines["verdicts"] += json_line(_without(entry, "problem", "repeats"))
        if entry["keep"]:
            lines["kept"] += _kept(checker, entry)
        else:
            told = _without(entry, "keep", "scores", "unjudged", "repeats")
            lines["dropped"] += json_line(told | {"row": _dropped(checker, entry)})
    return {suffix: bytes(data) for suffix, data in lines.items()} | {"figures": json_line(report.counted())}


def join_parts(
    out: Path, checker: RowChecker, parts: list[RowPart], about: dict[str, Any], judge: str | None
) -> dict[str, Any]:
    """Write every file of a run and return the content of report.json, which is written last.

    Args:
        about: what run it is.
        judge: the name of the judge, for the report.
    """
    report, kept = FilterReport(checker), kept_files(checker.specs)
    with NewFiles(out, ("verdicts.jsonl", "dropped.jsonl", *kept.values())) as files:
        for part in parts:
            path = out / PARTS / f"{part.number:06d}"
            report.add(read_json(path.with_suffix(".figures")))
            for name, suffix in (("verdicts.jsonl", ".verdicts"), ("dropped.jsonl", ".dropped"), (kept[part.dataset], ".kept")):
                files.copy(name, path.with_suffix(suffix))
    figures = report.figures(judge) | {"run": about}
    write_json(out / "meta.json", _meta(checker, kept, report.datasets))
    write_atomic(out / "report.html", report.page(figures))
    write_json(out / "report.json", figures)
    return read_json(out / "report.json")


def remove_parts(out: Path) -> None:
    """Remove the files of parts, and no others."""
    for path in (out / PARTS).glob("*"):
        if re.fullmatch(r"\.?(\d{6}|duplicates)\.\w+(\.np[yz])?(\.new)?", path.name) and path.is_file():
            path.unlink()
    shutil.rmtree(out / PARTS / "search", ignore_errors=True)
    with suppress(OSError):
        (out / PARTS).rmdir()


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
    except DataError:  # the reference's rows cannot hold it, such as conversations that show different media
        return json_line(from_record(record, layout="openai"))


def _dropped(checker: RowChecker, entry: RowEntry) -> Any:
    """Return the row: its text if it is not JSON, None if its bytes cannot be read; bytes of media as base64."""
    try:
        data = checker.files[entry["dataset"]].raw(entry["row"])
    except DataError:
        return None
    if not isinstance(data, bytes):
        return json.loads(json.dumps(data, default=_plain))
    text = data.decode("utf-8", "backslashreplace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


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
