"""Filter a mixture by a chain, into a folder (docs/filtering.md lists its files).

Every verdict goes to the journal first. When the journal is complete, the other files are written from it, so that they do
not depend on where the run was interrupted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.data.mixture import load_mixture
from ivl.errors import InputError
from ivl.filters.chain import Chain
from ivl.filters.cluster import AHEAD, in_order_on_ray
from ivl.filters.judge import DataJudge
from ivl.filters.outputs import OUTPUTS, finished_report, read_entries, remove_outputs, write_outputs
from ivl.filters.rows import Results, RowChecker, RowEntry, add_verdict
from ivl.filters.rules import KEEP, FilterVerdict
from ivl.formats.rows import RowFormat, hash_rows, row_files
from ivl.utils.jsonl import Journal, reading_line
from ivl.utils.progress import ShowProgress
from ivl.utils.workers import in_order

BLOCK = 64
"""Rows checked at a time; with a judge, several for each request in flight."""


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """How a mixture is read and filtered; none of it changes a verdict."""

    root: str | None = None
    """Folder of relative media paths when the mixture is a file or folder of rows."""
    format: RowFormat | None = None
    """Format of the rows when the mixture is a file or folder of rows; by default it is detected."""
    workers: int = 0
    """Processes for the stages that need no judge; 0 runs them in this one. With --ray local, its processors."""
    ray: str | None = None
    """Address of a Ray cluster that runs these stages instead, or `local` for one on this machine."""
    fresh: bool = False
    """Forget an earlier run in the same folder, but not the judge's replies."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise InputError(f"need workers >= 0, got {self.workers}")


def run(
    chain: Chain,
    mixture: str | Path,
    out: str | Path,
    options: FilterOptions | None = None,
    *,
    judge: DataJudge | None = None,
    on_progress: ShowProgress = lambda *_, **__: None,
) -> dict[str, Any]:
    """Filter every row of a mixture once, in order, and return the content of report.json.

    The same call continues an interrupted run, and returns at once after a complete one.

    Raises:
        InputError: if the folder holds the input, or files of something else, or a run of other data or settings, or another
            process is at work there; if a file cannot be read, a stage needs a judge and there is none, or the judge fails.
    """
    options, out = options or FilterOptions(), Path(out)
    judge = judge if chain.needs_judge else None
    if chain.needs_judge and judge is None:
        names = ", ".join(stage.name for stage in chain.stages if stage.judged)
        raise InputError(f"the stages {names} need a judge: give a model or an endpoint, or take the filter `heuristic`")
    checker = RowChecker(chain, load_mixture(mixture, root=options.root, format=options.format))
    inputs = [str(mixture)]
    for spec in checker.specs.values():
        inputs += [spec.annotation, spec.root, *map(str, row_files(spec.annotation))]  # the folder may hold links to files
    try:
        _check_folder(out, inputs)
        with _journal(out, checker, judge, fresh=options.fresh) as journal:
            if options.fresh:
                remove_outputs(out)
            report = finished_report(out, journal.about)
            return report or _run(checker, judge, out, journal, options, on_progress)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror or error}; the same command goes on from here") from error


def _run(
    checker: RowChecker, judge: DataJudge | None, out: Path, journal: Journal, options: FilterOptions, on_progress: ShowProgress
) -> dict[str, Any]:
    """Check the rows that the journal lacks, and write the other files from it."""
    total, stages, first, kept = sum(map(len, checker.files.values())), _OrderedStages(checker, judge), 0, 0
    for number, entry in read_entries(journal.path, checker):
        with reading_line(journal.path, number):
            stages.replay(entry)
        first += 1
    done, size = first, max(BLOCK, 4 * judge.threads) if judge else BLOCK
    on_progress(done, total, resumed=first)
    blocks, workers = checker.blocks(done, size), options.workers
    if options.ray:
        checked = in_order_on_ray(checker, blocks, address=options.ray, workers=workers)
    else:
        checked = in_order(checker, blocks, num_workers=workers, prefetch=AHEAD)
    for rows in checked:
        entries = stages.judge_rows(rows)
        journal.add(entries)
        done, kept = done + len(entries), kept + sum(entry["keep"] for entry in entries)
        on_progress(done, total, resumed=first, note=f"{kept / (done - first):.1%} kept")
    report = write_outputs(out, checker, journal, judge.name if judge else None)
    journal.clear()
    return report


def _check_folder(out: Path, inputs: Sequence[str]) -> None:
    """Refuse a folder of results that holds the input, or files that no filter run wrote."""
    real = out.resolve()
    for place in inputs:
        if real == (path := Path(place).resolve()) or real in path.parents:
            raise InputError(f"{out}: holds the input {place}; choose another folder for the results")
    journal = out / "progress.jsonl"
    if not (os.path.lexists(journal) and journal.stat().st_size):
        for path in (*(out / name for name in OUTPUTS), *out.glob("kept/*")):
            if os.path.lexists(path):
                raise InputError(f"{out}: holds {path.name}, which is not of a filter run; choose another folder")


def _journal(out: Path, checker: RowChecker, judge: DataJudge | None, *, fresh: bool) -> Journal:
    """Open the journal. Its first line tells chain, data and judge, so that a run with others does not continue it.

    Rows that were edited are other data, at the same size, too: the journal names rows by their numbers.
    """
    roots = [str(Path(spec.root).absolute()) for spec in checker.specs.values()]
    hashes = {name: hash_rows(checker.specs[name].annotation, rows.container) for name, rows in checker.files.items()}
    num_rows = sum(map(len, checker.files.values()))
    about = {
        "chain": ", ".join(stage.name for stage in checker.chain.stages) + _digest(checker.chain.spelled_out()),
        "data": f"{len(hashes)} data sets of {num_rows:,} rows" + _digest([roots, hashes]),
        "judge": judge and judge.name,
    }
    try:
        return Journal(out / "progress.jsonl", about, fresh=fresh)
    except InputError as error:
        remedy = ", or give --fresh to start again" if "belongs to another run" in str(error) else ""
        raise InputError(f"{error}{remedy}") from None


def _digest(value: Any) -> str:
    return f" ({hashlib.blake2b(json.dumps(value).encode(), digest_size=6).hexdigest()})"


class _OrderedStages:
    """Completes the verdicts of the rows in order: takes those of the workers, finds duplicates and asks the judge."""

    def __init__(self, checker: RowChecker, judge: DataJudge | None) -> None:
        self.checker, self.judge, self.chain = checker, judge, checker.chain
        self.indexes = {stage.name: stage.rule.index() for stage in self.chain.stages if stage.compares}

    def replay(self, entry: RowEntry) -> None:
        """Feed the indexes with a row of an earlier run."""
        for stage, signature in entry.get("signatures", {}).items():
            self.indexes[stage].seen(base64.b85decode(signature), (entry["dataset"], entry["row"]))

    def judge_rows(self, rows: Sequence[tuple[RowEntry, Results]]) -> list[RowEntry]:
        """Send a block of rows through all stages, and return its entries."""
        for n, stage in enumerate(self.chain.stages):
            alive = [(entry, results) for entry, results in rows if entry["keep"] and not stage.exempts(entry["dataset"])]
            if self.judge and stage.judged:
                asked = [(self.checker.record(entry), self.chain.domain_of(entry["dataset"])) for entry, _ in alive]
                verdicts = self.judge.verdicts(stage.rule, asked)
            else:
                verdicts = [self._verdict(stage.name, entry, results[n]) for entry, results in alive]
            for (entry, _), verdict in zip(alive, verdicts, strict=True):
                add_verdict(entry, stage.name, verdict)
        return [entry for entry, _ in rows]

    def _verdict(self, stage: str, entry: RowEntry, result: FilterVerdict | bytes | None) -> FilterVerdict:
        if not isinstance(result, bytes):
            assert result is not None
            return result
        entry.setdefault("signatures", {})[stage] = base64.b85encode(result).decode()
        if (earlier := self.indexes[stage].seen(result, (entry["dataset"], entry["row"]))) is None:
            return KEEP
        dataset, row = earlier
        entry |= {"duplicate_of": self.checker.files[dataset].source(row), "repeats": [dataset, row]}
        return FilterVerdict(False, "near-duplicate")
