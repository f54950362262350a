"""`ivl data convert`: rows of one format into another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ivl.utils.progress import counting

Formats = Literal[
    "jsonl", "json", "parquet", "arrow", "webdataset", "reference", "openai", "sharegpt", "swift", "finevision"
]  # fmt: skip


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    *,
    to: Literal["reference", "openai", "sharegpt", "swift", "parquet", "webdataset"] | None = None,
    format: Annotated[Formats | None, tyro.conf.arg(name="from")] = None,
    root: str | None = None,
    on_error: Literal["refuse", "skip"] = "refuse",
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Write the rows of SRC in another format. parquet and webdataset take the images in; the others name files.

    A bad row, or one that the target cannot hold, stops with its file and line, and no DST is left.

    Args:
        source: A file or folder of rows.
        target: The file to write: .jsonl, .json (an array), .parquet or .tar. Images that SRC holds as bytes go to
            DST's name with _media, beside it.
        to: What to write; by default what the suffix of DST says, or reference.
        format: How SRC is read; by default it is found out.
        root: Folder of relative media paths; by default SRC's.
        on_error: refuse stops at a bad row; skip leaves it out, prints it and counts it.
        overwrite: Replace DST if it exists.
    """
    from ivl.datasets.convert import convert as run

    with counting() as bar:
        task = bar.add_task(target.name, total=None, note="")

        def progress(done: int, rows: int) -> None:
            bar.update(task, completed=done, total=rows, note=f"{bar.tasks[task].speed or 0:,.0f} rows/s")

        done = run(
            source, target, to=to, format=format, root=root, on_error=on_error, overwrite=overwrite,
            on_bad=lambda error: print(f"{error} [{error.kind}]", file=sys.stderr), on_progress=progress,
        )  # fmt: skip
    print(f"{target}: {done.rows:,} rows from {done.format}")
    for key, count in done.dropped.items():
        print(f"`{key}` of {count:,} rows is not carried over")
    if done.bad:
        print(
            f"{sum(done.bad.values()):,} rows left out: " + ", ".join(f"{n:,} {kind}" for kind, n in sorted(done.bad.items()))
        )
