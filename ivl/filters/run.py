"""Filter a mixture by a chain, into a folder (docs/filtering.md lists its files).

The mixture is cut into parts. Each goes through the passes of the chain in one process, which writes files of its own; at the
end they are joined. So the results depend neither on the number of processes nor on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ivl.data.mixture import load_mixture
from ivl.errors import InputError
from ivl.filters.buckets import MapInOrder, R, T
from ivl.filters.chain import Chain
from ivl.filters.cluster import AHEAD, ray_processes
from ivl.filters.judge import DataJudge
from ivl.filters.outputs import OUTPUTS, PARTS, finished_report, join_parts, remove_outputs, remove_parts
from ivl.filters.passes import PartPass, cut_passes
from ivl.filters.rows import RowChecker, RowPart
from ivl.formats.rows import RowFormat, hash_rows, row_files
from ivl.utils.budgets import MAX_PROCESSES
from ivl.utils.files import NewFiles, real
from ivl.utils.jsonl import Journal
from ivl.utils.progress import ShowProgress
from ivl.utils.workers import in_order

BLOCK = 256
"""Least rows of a part."""


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """How a mixture is read and filtered; none of it changes a verdict."""

    root: str | None = None
    """Folder of relative media paths when the mixture is a file or folder of rows."""
    format: RowFormat | None = None
    """Format of the rows when the mixture is a file or folder of rows; by default it is detected."""
    workers: int = 0
    """Processes that share the rows; 0 runs everything in this one. With --ray local, its processors."""
    ray: str | None = None
    """Address of a Ray cluster that takes the stages without a judge instead, or `local` for one on this machine."""
    fresh: bool = False
    """Forget an earlier run in the same folder, but not the judge's replies."""

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= MAX_PROCESSES:
            raise InputError(f"need workers >= 0 and at most {MAX_PROCESSES:,}, got {self.workers}")


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
            if options.fresh or report:
                remove_parts(out)
            return report or _run(checker, judge, out, journal, options, on_progress)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror or error}; the same command goes on from here") from error


def _run(
    checker: RowChecker, judge: DataJudge | None, out: Path, journal: Journal, options: FilterOptions, on_progress: ShowProgress
) -> dict[str, Any]:
    """Take all parts through all passes, and join their files."""
    journal.clear()  # of the rows that older versions kept in it
    parts, passes, folder = checker.parts(BLOCK), cut_passes(checker.chain), out / PARTS
    total = sum(map(len, checker.files.values()))
    with _processes(options) as mapped:
        for number in range(len(passes)):
            step = PartPass(checker, judge, folder, parts, passes, number)
            todo = [part for part in parts if not step.done(part)]
            first = total - sum(part.end - part.first for part in todo)
            done, kept = first, 0
            on_progress(done, total, resumed=first)
            for rows, left in _through(step, todo, options, mapped):
                done, kept = done + rows, kept + left
                note = f"pass {number + 1} of {len(passes)}, {kept / max(1, done - first):.1%} kept"
                on_progress(done, total, resumed=first, note=note)
            if step.compared is not None:
                _compare(step, folder, mapped)
    report = join_parts(out, checker, parts, journal.about, judge.name if judge else None)
    remove_parts(out)
    return report


@contextmanager
def _processes(options: FilterOptions) -> Generator[MapInOrder]:
    if options.ray:
        with ray_processes(address=options.ray, workers=options.workers) as mapped:
            yield mapped
    else:
        yield partial(_in_processes, options.workers)


def _in_processes(workers: int, function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
    return in_order(function, items, num_workers=workers if len(items) > 1 else 0, prefetch=AHEAD)


def _through(step: PartPass, todo: list[RowPart], options: FilterOptions, mapped: MapInOrder) -> Iterable[tuple[int, int]]:
    """Take parts through a pass. A judge that takes several requests is asked from several processes of this machine, which
    share them out; one that runs here is asked from this process."""
    if step.judge is None:
        yield from mapped(step, todo)
        return
    threads = step.judge.threads
    workers = min(options.workers, threads, len(todo)) if sys.platform == "linux" and threads > 1 else 0
    step.judge.threads = threads // max(1, workers)
    try:
        yield from _in_processes(workers, step, todo)
    finally:
        step.judge.threads = threads


def _compare(step: PartPass, folder: Path, mapped: MapInOrder) -> None:
    """Find the duplicates among the rows that are through a pass."""
    place, search = folder / f"duplicates.{step.compared}.npy", folder / "search"
    if place.is_file():
        return
    shutil.rmtree(search, ignore_errors=True)
    search.mkdir(parents=True)
    from ivl.filters.duplicates import find_duplicates  # needs the packages of the `data` extra

    limits = step.checker.chain.stages[step.compared or 0].rule
    found = find_duplicates(limits, step.signatures, len(step.parts), search, mapped)
    with io.BytesIO() as file, NewFiles(folder, [place.name]) as new:
        np.save(file, found)
        new.write(place.name, file.getvalue())
    shutil.rmtree(search)


def _check_folder(out: Path, inputs: Sequence[str]) -> None:
    """Refuse a folder of results that holds the input, or files that no filter run wrote."""
    folder = real(out)
    for place in inputs:
        if folder == (path := real(place)) or folder in path.parents:
            raise InputError(f"{out}: holds the input {place}; choose another folder for the results")
    journal = out / "progress.jsonl"
    if not (os.path.lexists(journal) and journal.stat().st_size):
        for path in (*(out / name for name in OUTPUTS), *out.glob("kept/*"), *out.glob(f"{PARTS}/*")):
            if os.path.lexists(path):
                raise InputError(f"{out}: holds {path.name}, which is not of a filter run; choose another folder")


def _journal(out: Path, checker: RowChecker, judge: DataJudge | None, *, fresh: bool) -> Journal:
    """Open the journal, which holds the folder. Its line tells chain, data and judge, so that a run with others does not go on.

    Rows that were edited are other data, at the same size, too: the files of parts name rows by their numbers.
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
