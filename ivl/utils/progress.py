"""The bar of long work: what, how far, a note such as the rate, and the time left; on standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


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
