"""What the stages say about one row without looking at other rows or asking a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ivl.data.mixture import DatasetSpec
from ivl.data.records import read_record
from ivl.errors import DataError
from ivl.filters.chain import UNREADABLE, Chain, Deduplicates
from ivl.filters.rules import KEEP, Verdict
from ivl.formats.base import Rows
from ivl.formats.rows import open_rows
from ivl.types import Record


@dataclass
class FilteredRow:
    """A row on its way through the stages."""

    id: str
    dataset: int
    row: int
    source: str
    problem: str = ""
    """Why the row cannot be read."""
    results: list[Verdict | bytes | None] = field(default_factory=list)
    """For each stage up to the first that drops the row: its verdict, a signature, or None (exempt, or judged)."""
    stage: str = ""
    """The stage that drops the row."""
    verdict: Verdict = KEEP
    duplicate_of: str = ""
    """Source of the earlier row that it duplicates."""
    scores: dict[str, float] = field(default_factory=dict)
    unjudged: list[str] = field(default_factory=list)
    signatures: dict[str, str] = field(default_factory=dict)
    """Signatures by stage, which a resumed run gives to its indexes."""

    def add(self, stage: str, verdict: Verdict) -> None:
        """Add the verdict of the next stage."""
        if verdict.score is not None:
            self.scores[stage] = verdict.score
        elif verdict.reason == "unjudged":
            self.unjudged.append(stage)
        if not verdict.keep:
            self.stage, self.verdict = stage, verdict

    def entry(self, dataset: str) -> dict[str, Any]:
        """Return the row as an entry of the journal; what is empty is left out."""
        head = {"id": self.id, "dataset": dataset, "row": self.row, "source": self.source, "keep": self.verdict.keep}
        if not self.verdict.keep:
            head |= {"stage": self.stage, "reason": self.verdict.reason, "score": self.verdict.score}
        rest = {name: getattr(self, name) for name in ("duplicate_of", "unjudged", "problem", "signatures")}
        return head | {"scores": self.scores} | {name: value for name, value in rest.items() if value}


class RowChecker:
    """Reads rows and applies the stages that look at one row alone. Pickled, it opens the files again where it arrives."""

    def __init__(self, chain: Chain, specs: tuple[DatasetSpec, ...]) -> None:
        self.chain, self.specs = chain, specs
        self._files: dict[int, Rows] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def rows(self, dataset: int) -> Rows:
        if dataset not in self._files:
            spec = self.specs[dataset]
            self._files[dataset] = open_rows(spec.annotation, format=spec.format)
        return self._files[dataset]

    def record(self, dataset: int, row: int) -> Record:
        """Read a row; a bad one raises DataError."""
        spec = self.specs[dataset]
        return read_record(self.rows(dataset), row, root=Path(spec.root).absolute(), dataset=spec.name)

    def __call__(self, places: Sequence[tuple[int, int]]) -> list[FilteredRow]:
        """Check each (data set, row)."""
        return [self._check(dataset, row) for dataset, row in places]

    def _check(self, dataset: int, row: int) -> FilteredRow:
        source = self.rows(dataset).source(row)
        checked = FilteredRow(source, dataset, row, source)
        try:
            record = self.record(dataset, row)
            checked.id = record.id
            checked.results = self._results(record)
        except DataError as error:
            checked.problem = error.problem
            checked.add(UNREADABLE, Verdict(False, error.kind))
        return checked

    def _results(self, record: Record) -> list[Verdict | bytes | None]:
        results: list[Verdict | bytes | None] = []
        for stage in self.chain.stages:
            if stage.judged or stage.exempts(record.dataset):
                results.append(None)
                continue
            result = stage.rule.signature(record) if isinstance(stage.rule, Deduplicates) else stage.rule(record)
            results.append(result)
            if isinstance(result, Verdict) and not result.keep:
                break
        return results
