"""`ivl data ...`: the commands for training data."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ivl.data.config import DataConfig
from ivl.utils.progress import counting

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ivl.datasets.inspect import Watch
    from ivl.datasets.stats import DatasetStats
    from ivl.errors import InputError

COMMANDS = ("validate", "stats", "convert", "filter", "pack")
SHOWN = 10
"""Problems of each kind that `validate` prints without `--all`."""


def main(args: list[str]) -> None:
    from ivl.cli.data_convert import convert
    from ivl.cli.data_filter import filter_data
    from ivl.cli.data_pack import pack

    functions: tuple[Callable[..., None], ...] = (validate, stats, convert, filter_data, pack)
    commands: dict[str, Callable[..., Any]] = dict(zip(COMMANDS, functions, strict=True))
    tyro.extras.subcommand_cli_from_dict(commands, prog="ivl data", args=args)


@dataclass(frozen=True, kw_only=True)
class MixtureOptions(DataConfig):
    """The data configuration as options of a command that reads a mixture."""

    mixture: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MIXTURE")]
    """A meta JSON, or a file or folder of rows of any format that is read."""
    num_workers: Annotated[int, tyro.conf.arg(name="workers")] = 0
    """Processes that read and encode rows; 0 does so in this one."""


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(MixtureOptions):
    model: str | None = None
    """Model directory whose processor also encodes every row: finds rows that are too long or train nothing."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object a line instead: each problem, then the summary."""
    show_all: Annotated[bool, tyro.conf.arg(name="all")] = False
    """Print every problem, not the first ten of each kind."""


@dataclass(frozen=True, kw_only=True)
class StatsOptions(MixtureOptions):
    model: str | None = None
    """Model directory whose processor counts tokens and tiles; without one, lengths are in characters."""
    out: str | None = None
    """Directory for stats.json and for stats.html, a page of plots."""


def validate(options: Annotated[ValidateOptions, tyro.conf.arg(name="")]) -> None:
    """Print problems with file and line, the first ten of each kind, then the number of each; exit code 1 if there is one."""
    from ivl.datasets.inspect import kind_of
    from ivl.datasets.stats import DatasetStats, total

    done: list[DatasetStats] = []
    shown: Counter[str] = Counter()
    for finding in _inspect(options, options.model):
        if isinstance(finding, DatasetStats):
            done.append(finding)
            if not options.as_json:
                print(f"{finding.name}: {finding.rows:,} rows ({finding.format}), {_problems(finding)}")
                print("".join(f"{finding.name}: note: {note}\n" for note in finding.notes), end="")
        elif options.as_json:
            source, problem = getattr(finding, "source", None), getattr(finding, "problem", str(finding))
            print(json.dumps({"source": source, "kind": kind_of(finding), "problem": problem}))
        elif options.show_all or shown[kind_of(finding)] < SHOWN:
            shown[kind_of(finding)] += 1
            print(f"{finding} [{kind_of(finding)}]")
    whole = total(done)
    if options.as_json:
        names = ("rows", "bad", "format", "repeated_ids", "letters")
        datasets = {each.name: {name: getattr(each, name) for name in names} for each in done}
        print(json.dumps({"rows": whole.rows, "bad": whole.bad, "kinds": whole.kinds, "datasets": datasets}))
    elif whole.bad:
        print(f"{whole.bad:,} problem{'s' * (whole.bad > 1)} in {whole.rows:,} rows: {_kinds(whole)}")
        if hidden := whole.bad - shown.total():
            print(f"{hidden:,} more problems are not printed; --all prints them")
    if whole.bad:
        raise SystemExit(1)


def stats(options: Annotated[StatsOptions, tyro.conf.arg(name="")]) -> None:
    """Print the number of rows, turns, media and characters of each data set, and how long they are."""
    from ivl.datasets.stats import DatasetStats
    from ivl.datasets.stats_report import check, tables, write_report
    from ivl.utils.progress import print_table

    if options.out:
        check(options.out)
    datasets = [finding for finding in _inspect(options, options.model) if isinstance(finding, DatasetStats)]
    for table in tables(datasets):
        print_table(table)
    if bad := sum(each.bad for each in datasets):
        print(f"{bad:,} bad rows are not in these figures; `ivl data validate` names their places")
    if options.out:
        print(write_report(options.out, datasets, mixture=options.mixture, model=options.model))


def _inspect(config: DataConfig, model: str | None) -> Iterator[InputError | DatasetStats]:
    """Problems and counts, with a progress bar while standard error is a terminal."""
    from ivl.checkpoint import load_processor, resolve
    from ivl.datasets.inspect import inspect

    with _progress() as watch:
        yield from inspect(config, load_processor(resolve(model)) if model else None, watch=watch)


@contextlib.contextmanager
def _progress() -> Iterator[Watch]:
    with counting() as bar:
        tasks: dict[str, TaskID] = {}

        def watch(name: str, done: int, rows: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=rows, note="")
            bar.update(tasks[name], completed=done, note=f"{bar.tasks[tasks[name]].speed or 0:,.0f} rows/s")

        yield watch


def _problems(dataset: DatasetStats) -> str:
    return f"{dataset.bad:,} bad: {_kinds(dataset)}" if dataset.bad else "no problems"


def _kinds(dataset: DatasetStats) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(dataset.kinds.items()))
