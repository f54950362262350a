"""`ivl data convert`: rows of one format in another."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import tyro

from ivl.cli.data import SHOWN
from ivl.datasets.convert import ConvertConfig
from ivl.errors import DataError
from ivl.formats.rows import RowFormat
from ivl.utils.progress import reporting


@dataclass(frozen=True, kw_only=True)
class ConvertRowsOptions(ConvertConfig):
    format: Annotated[RowFormat | None, tyro.conf.arg(name="from")] = None
    """Format of the source; by default it is found out."""
    show_all: Annotated[bool, tyro.conf.arg(name="all")] = False
    """Print every row that is left out, not the first ten of each kind."""


def convert(
    options: Annotated[
        ConvertRowsOptions, tyro.conf.arg(name=""), tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff
    ],
) -> None:
    """Write the rows of a file or folder in another format. parquet and webdataset take the images in; the others name files.

    A bad row, or one that the target cannot hold, stops with its file and line, and no target is left.
    """
    from ivl.datasets.convert import convert as convert_rows

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # cleans up, as after Ctrl-C
    shown: Counter[str] = Counter()

    def on_bad(error: DataError) -> None:
        shown[error.kind] += 1
        if options.show_all or shown[error.kind] <= SHOWN:
            print(f"{error} [{error.kind}]", file=sys.stderr)

    with reporting(options.target.name, "rows") as show:
        report = convert_rows(options, on_bad=on_bad, on_progress=show)
    print(f"{options.target}: {report.rows:,} rows from {report.format}")
    for key, count in report.dropped.items():
        print(f"`{key}` of {count:,} rows is not carried over")
    if report.bad:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(report.bad.items()))
        print(f"{sum(report.bad.values()):,} rows left out: {kinds}")
