"""The rows of a mixture in parts, and the verdicts of the stages that look at one row alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ivl.data.mixture import DatasetSpec
from ivl.data.records import read_record
from ivl.errors import DataError
from ivl.filters.chain import UNREADABLE, Chain, FilterStage
from ivl.filters.rules import FilterVerdict
from ivl.formats.rows import open_rows
from ivl.types import Record

MAX_PARTS, MAX_PART = 256, 16_384
"""A small mixture has at most so many parts, a large one at most so many rows in each."""
RowEntry = dict[str, Any]
"""A row and its verdict: id, dataset, row, source, keep; scores and unjudged by stage; of a dropped row also stage, reason,
score, and problem, or of a duplicate duplicate_of and repeats (source and place of the earlier row)."""


class RowPart(NamedTuple):
    """Neighboring rows of one data set, which one process takes through a pass."""

    number: int
    dataset: str
    first: int
    end: int
    start: int
    """Number of the first row among those of all data sets."""


def add_verdict(entry: RowEntry, stage: str, verdict: FilterVerdict) -> None:
    """Add the verdict of the next stage to an entry."""
    if verdict.score is not None:
        entry["scores"][stage] = verdict.score
    elif verdict.reason == "unjudged":
        entry["unjudged"] = [*entry.get("unjudged", ()), stage]
    if not verdict.keep:
        entry |= {"keep": False, "stage": stage, "reason": verdict.reason, "score": verdict.score}


class RowChecker:
    """Reads the rows of a mixture, and applies the stages that look at one row alone."""

    def __init__(self, chain: Chain, specs: tuple[DatasetSpec, ...]) -> None:
        self.chain = chain
        self.specs = {spec.name: spec for spec in specs}
        self.files = {spec.name: open_rows(spec.annotation, format=spec.format) for spec in specs}

    def record(self, entry: RowEntry) -> Record:
        """Read the row of an entry; a bad one raises DataError."""
        dataset = entry["dataset"]
        root = Path(self.specs[dataset].root).absolute()
        return read_record(self.files[dataset], entry["row"], root=root, dataset=dataset)

    def parts(self, least: int) -> list[RowPart]:
        """Cut all rows into parts, which do not depend on how many processes there are; `least` rows make one."""
        total = sum(map(len, self.files.values()))
        size = min(max(least, -(-total // MAX_PARTS)), MAX_PART)
        parts: list[RowPart] = []
        start = 0
        for dataset, rows in self.files.items():
            for first in range(0, len(rows), size):
                parts.append(RowPart(len(parts), dataset, first, min(first + size, len(rows)), start + first))
            start += len(rows)
        return parts

    def place(self, parts: list[RowPart], number: int) -> tuple[str, int]:
        """The data set and the row of a number among the rows of all data sets."""
        part = parts[bisect_right(parts, number, key=lambda part: part.start) - 1]
        return part.dataset, part.first + number - part.start

    def entry(self, dataset: str, row: int) -> RowEntry:
        """Return the entry of a row without any verdict."""
        source = self.files[dataset].source(row)
        return {"id": source, "dataset": dataset, "row": row, "source": source, "keep": True, "scores": {}}

    def apply(self, stages: Sequence[FilterStage], entry: RowEntry) -> bytes | None:
        """Add the verdicts of stages that ask no judge, up to the first that drops the row.

        Returns:
            The signature for the stage that compares, if the row reaches one.
        """
        if not entry["keep"]:
            return None
        try:
            record = self.record(entry)
            entry["id"] = record.id
            for stage in stages:
                if stage.exempts(entry["dataset"]):
                    continue
                if stage.compares:
                    return stage.rule.signature(record)
                add_verdict(entry, stage.name, stage.rule(record))
                if not entry["keep"]:
                    break
        except DataError as error:
            entry["scores"] = {}
            entry.pop("unjudged", None)
            add_verdict(entry, UNREADABLE, FilterVerdict(False, error.kind))
            entry["problem"] = error.problem
        return None
