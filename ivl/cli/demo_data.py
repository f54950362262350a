"""`ivl demo-data`: the files that the documentation's examples use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ivl.cli.options import parse


@dataclass(frozen=True, kw_only=True)
class DemoDataOptions:
    """Write small pictures, rows, questions and preference pairs, so that the documentation's examples run as they stand.

    The rows ask how many shapes a picture shows: 400 to train on, 100 held out. They take 0.5 MB.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Where they go; the examples expect them in the folder where commands run (`ivl demo-data .`)."""


def demo_data(args: list[str]) -> None:
    from ivl.datasets.demo import PARQUET, write_demo

    folder = parse(DemoDataOptions, "demo-data", args).folder
    paths = write_demo(folder)
    for path in sorted(path for path in paths if path.parent.name not in ("frames", "pictures")):
        print(path)
    print(f"and {len(paths)} files in all, with {folder / 'frames'} and {folder / 'data/pictures'}")
    if folder / PARQUET not in paths:
        print(f"{folder / PARQUET} was left out: tables need pip install 'ivl[data]'")
    rows = folder / "data/train.jsonl"
    print(f"next: ivl data validate {rows}; ivl train finetune --model MODEL --data {rows}")
