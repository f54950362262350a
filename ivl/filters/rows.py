"""The rows of a mixture, and the verdicts of the stages that look at one row alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ivl.data.mixture import DatasetSpec
from ivl.data.records import read_record
from ivl.errors import DataError
from ivl.filters.chain import UNREADABLE, Chain
from ivl.filters.rules import FilterVerdict
from ivl.formats.rows import open_rows
from ivl.types import Record

Place = tuple[str, int]
"""Data set and row."""
RowEntry = dict[str, Any]
"""A row in the journal: id, dataset, row, source, keep; scores and unjudged by stage; of a dropped row also stage, reason,
score, and problem, or of a duplicate duplicate_of and repeats (source and place of the earlier row); signatures by stage,
for a resumed run."""
Results = list[FilterVerdict | bytes | None]
"""For each stage up to the first that drops the row: its verdict, a signature, or None (exempt, or judged)."""


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

    def places(self) -> Iterator[Place]:
        """Yield the places of all rows, in order."""
        return ((dataset, row) for dataset, rows in self.files.items() for row in range(len(rows)))

    def blocks(self, start: int, size: int) -> Iterator[list[Place]]:
        """Yield the places of all rows from row `start` on, `size` at a time."""
        places = islice(self.places(), start, None)
        while block := list(islice(places, size)):
            yield block

    def __call__(self, places: Sequence[Place]) -> list[tuple[RowEntry, Results]]:
        """Check a block of rows."""
        return [self._check(dataset, row) for dataset, row in places]

    def _check(self, dataset: str, row: int) -> tuple[RowEntry, Results]:
        source = self.files[dataset].source(row)
        entry: RowEntry = {"id": source, "dataset": dataset, "row": row, "source": source, "keep": True, "scores": {}}
        results: Results = []
        try:
            record = self.record(entry)
            entry["id"] = record.id
            for stage in self.chain.stages:
                if stage.judged or stage.exempts(dataset):
                    results.append(None)
                else:
                    results.append(stage.rule.signature(record) if stage.compares else stage.rule(record))
                    if isinstance(results[-1], FilterVerdict) and not results[-1].keep:
                        break
        except DataError as error:
            add_verdict(entry, UNREADABLE, FilterVerdict(False, error.kind))
            entry["problem"] = error.problem
        return entry, results
