"""Progress of long work on standard error: a name, a count, a note such as the rate, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from ivl.utils.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

FITS = 100
"""Columns of text that every terminal is taken to have."""


def counting(*, on: bool | None = None, lasting: bool = False) -> Progress:
    """Return a progress bar with a count; every task needs a `note`, which may be empty.

    Args:
        on: Whether the bar is shown; None shows it on a terminal only.
        lasting: Whether the bar stays on the screen when it is done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )  # fmt: skip
    shown = sys.stderr.isatty() if on is None else on
    return Progress(*columns, console=Console(stderr=True), disable=not shown, transient=not lasting)


class ShowProgress(Protocol):
    def __call__(self, done: int, total: int, *, resumed: int = 0, note: str = "") -> None:
        """Show how far work is; `resumed` is the part of `done` that an earlier run did, which does not count for the rate."""


@contextmanager
def reporting(what: str, unit: str) -> Iterator[ShowProgress]:
    """Show a bar on a terminal, elsewhere a line every ten seconds, with the rate and the time left; on standard error."""
    started = shown = time.monotonic()
    with counting() as bar:
        task = bar.add_task(what, total=None, note="")

        def show(done: int, total: int, *, resumed: int = 0, note: str = "") -> None:
            nonlocal shown
            now = time.monotonic()
            rate = (done - resumed) / max(1e-9, now - started)
            note = f"{rate:,.0f} {unit}/s{', ' if note else ''}{note}"
            bar.update(task, total=total, completed=done, note=note)
            if bar.disable and now - shown > 10:
                shown = now
                left = (total - done) / max(1e-9, rate)
                print(f"{what}: {done:,}/{total:,} {unit}, {note}, {left:,.0f} s left", file=sys.stderr, flush=True)

        yield show


def wide_console(width: int = 200) -> Console:
    """A console of at least this width, since tables with cut names and counts would be useless."""
    from rich.console import Console

    return Console(width=max(Console().width, width), markup=False)  # names of data sets are a stranger's


def print_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, words: Set[str] = frozenset()
) -> None:
    """Print a table; one that is wider than the terminal, or than FITS columns, as columns for as many rows as fit.

    Args:
        heads: Names of the columns.
        rows: Cells of each row.
        title: Stands above the table.
        words: Columns of words, which are set flush left, as the first one is.
    """
    from rich.console import Console
    from rich.table import Table

    wide, room, rows = wide_console(), max(Console().width, FITS), [list(map(printable, row)) for row in rows]
    table = Table(box=None, header_style="bold", title=title, title_justify="left")
    for number, name in enumerate(heads):
        table.add_column(name, justify="right" if number and name not in words else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if wide.measure(table).maximum <= room:
        wide.print(table)
        return
    widths, first = [max(map(len, row)) + 2 for row in rows], max(map(len, heads)) + 2
    while rows:
        count = next((n for n in range(len(rows), 1, -1) if first + sum(widths[:n]) <= room), 1)
        turned = Table(box=None, show_header=False, title=title, title_justify="left")
        turned.add_column(no_wrap=True)
        for _ in range(count):
            turned.add_column(justify="right", no_wrap=True)
        for number, head in enumerate(heads):
            turned.add_row(head, *(row[number] for row in rows[:count]))
        wide.print(turned)
        rows, widths = rows[count:], widths[count:]
