"""Progress of long work on standard error: what is counted, how far it has come, a note, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10


def counting(*, on: bool | None = None, lasting: bool = False) -> Progress:
    """A bar that counts; every task needs a `note`, which may be empty.

    on: None shows it on a terminal only. lasting: it stays there when it is done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    shown = sys.stderr.isatty() if on is None else on
    return Progress(*columns, console=Console(stderr=True), disable=not shown, transient=not lasting)


@contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far long work has come: a bar on a terminal, elsewhere a line every ten seconds.

    Args:
        what: What is counted, such as `questions`.

    Yields:
        A function of the number done, the number in all and a note.
    """
    shown = started = time.monotonic()
    first: int | None = None
    with counting(lasting=True) as bar:
        row = bar.add_task(what, total=None, note="")

        def show(done: int, total: int, note: str) -> None:
            nonlocal shown, first
            first = done if first is None else first  # an earlier run may have done some
            now = time.monotonic()
            bar.update(row, completed=done, total=total, note=note)
            if bar.disable and now - shown > SECONDS_BETWEEN_LINES:
                shown = now
                left = (total - done) * (now - started) / max(1, done - first)
                print(f"{done:,}/{total:,} {what}, {note}, {left:,.0f} s left", file=sys.stderr, flush=True)

        yield show
