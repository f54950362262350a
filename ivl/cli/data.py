"""`ivl data ...`: each command of the data engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import tyro

from ivl.data.config import DataConfig
from ivl.errors import DataError, InputError
from ivl.utils.progress import counting

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ivl.datasets.inspect import Watch
    from ivl.datasets.stats import Stats


def main(args: list[str]) -> None:
    from ivl.cli.data_convert import convert
    from ivl.cli.data_filter import filter_data
    from ivl.cli.data_pack import pack

    commands = {"validate": validate, "stats": stats, "convert": convert, "filter": filter_data, "pack": pack}
    tyro.extras.subcommand_cli_from_dict(commands, prog="ivl data", args=args)


Mixture = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MIXTURE")]


def validate(
    mixture: Mixture,
    *,
    root: str | None = None,
    format: str | None = None,
    model: str | None = None,
    workers: int = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Print every problem with its file and line, then how many of each kind; exit code 1 if there is one.

    Args:
        mixture: A meta JSON, or a file of rows of any format that is read.
        root: Folder of relative media paths when `mixture` is a file of rows.
        format: How the rows are read when `mixture` is a file of rows, such as parquet or sharegpt; by default it is found out.
        model: Model directory whose processor also encodes every row: finds rows that are too long or train nothing.
        workers: Processes that look at rows; 0 looks in this one.
        as_json: Print one JSON object a line instead: each problem, then the summary.
    """
    from ivl.datasets.inspect import kind_of
    from ivl.datasets.stats import Stats, total

    done: list[Stats] = []
    for found in _inspect(mixture, root, format, model, workers):
        if isinstance(found, Stats):
            done.append(found)
            if not as_json:
                print(f"{found.name}: {found.rows:,} rows ({found.format}), {_problems(found)}")
        elif as_json:
            source, problem = getattr(found, "source", None), getattr(found, "problem", str(found))
            print(json.dumps({"source": source, "kind": kind_of(found), "problem": problem}))
        else:
            print(f"{found} [{kind_of(found)}]")
    whole = total(done)
    if as_json:
        datasets = {each.name: {"rows": each.rows, "bad": each.bad, "format": each.format} for each in done}
        print(json.dumps({"rows": whole.rows, "bad": whole.bad, "kinds": whole.kinds, "datasets": datasets}))
    elif whole.bad:
        print(f"{whole.bad:,} problem{'s' * (whole.bad > 1)} in {whole.rows:,} rows: {_kinds(whole)}")
    if whole.bad:
        raise SystemExit(1)


def stats(
    mixture: Mixture,
    *,
    root: str | None = None,
    format: str | None = None,
    model: str | None = None,
    out: str | None = None,
    workers: int = 0,
) -> None:
    """Print how much each data set holds.

    Args:
        mixture: A meta JSON, or a file of rows of any format that is read.
        root: Folder of relative media paths when `mixture` is a file of rows.
        format: How the rows are read when `mixture` is a file of rows, such as parquet or sharegpt; by default it is found out.
        model: Model directory whose processor counts tokens and tiles; without one, lengths are in characters.
        out: Directory for stats.json and for stats.html, a page of plots.
        workers: Processes that look at rows; 0 looks in this one.
    """
    from rich.console import Console

    from ivl.datasets.stats import Stats
    from ivl.datasets.stats_report import tables, write_report

    found = [each for each in _inspect(mixture, root, format, model, workers, languages=True) if isinstance(each, Stats)]
    console = Console()
    for table in tables(found):
        Console(width=max(console.width, 200)).print(table)  # cut names and counts would be useless
    if bad := sum(each.bad for each in found):
        print(f"{bad:,} bad rows are not in these figures; `ivl data validate` tells where they are")
    if out:
        print(write_report(out, found, mixture=mixture, model=model))


def _inspect(
    mixture: str, root: str | None, format: str | None, model: str | None, workers: int, *, languages: bool = False
) -> Iterator[DataError | InputError | Stats]:
    """What there is to find, with a progress bar while standard error is a terminal."""
    from ivl.datasets.inspect import inspect

    processor = None
    if model:
        from ivl.checkpoint import load_processor, resolve

        processor = load_processor(resolve(model))
    config = DataConfig(mixture=mixture, root=root, format=format, num_workers=workers)
    with _progress() as watch:
        yield from inspect(config, processor, languages=languages, watch=watch)


@contextlib.contextmanager
def _progress() -> Iterator[Watch]:
    with counting() as bar:
        tasks: dict[str, TaskID] = {}

        def watch(name: str, done: int, rows: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=rows, note="")
            bar.update(tasks[name], completed=done, note=f"{bar.tasks[tasks[name]].speed or 0:,.0f} rows/s")

        yield watch


def _problems(found: Stats) -> str:
    return f"{found.bad:,} bad: {_kinds(found)}" if found.bad else "no problems"


def _kinds(found: Stats) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.kinds.items()))
