"""`ivl data validate` and `ivl data stats`."""

from __future__ import annotations

from typing import Annotated

import tyro

from ivl.data.config import DataConfig


def main(args: list[str]) -> None:
    tyro.extras.subcommand_cli_from_dict({"validate": validate, "stats": stats}, prog="ivl data", args=args)


Mixture = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MIXTURE")]


def validate(mixture: Mixture, *, root: str | None = None, model: str | None = None) -> None:
    """Print every problem with its file and line; exit code 1 if there is one.

    Args:
        mixture: A meta JSON, or a .jsonl or .json file of rows.
        root: Folder of relative media paths when `mixture` is a file of rows.
        model: Model directory whose processor also encodes every row: finds rows that are too long or train nothing.
    """
    bad = rows = 0
    for found in _inspect(mixture, root, model):
        if isinstance(found, Exception):
            print(f"{found} [{getattr(found, 'kind', 'unreadable_file')}]")
        else:
            rows, bad = rows + found.rows, bad + found.bad
            print(f"{found.name}: {found.rows} rows ({found.format or 'not read'}), {_problems(found)}")
    if bad:
        print(f"{bad} problems")
        raise SystemExit(1)


def stats(mixture: Mixture, *, root: str | None = None, model: str | None = None) -> None:
    """Print how much each data set holds.

    Args:
        mixture: A meta JSON, or a .jsonl or .json file of rows.
        root: Folder of relative media paths when `mixture` is a file of rows.
        model: Model directory whose processor counts tokens and tiles.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    columns = ["rows", "bad", "conversations", "images", "videos", *(["tokens", "tiles"] if model else [])]
    table.add_column("dataset")
    table.add_column("format")
    for column in columns:
        table.add_column(column, justify="right")
    for found in _inspect(mixture, root, model):
        if not isinstance(found, Exception):
            table.add_row(found.name, found.format or "not read", *(f"{getattr(found, column):,}" for column in columns))
    Console(width=max(Console().width, 200)).print(table)  # cut names and counts would be useless


def _inspect(mixture: str, root: str | None, model: str | None):
    from ivl.data.inspect import inspect

    processor = None
    if model:
        from ivl.model.checkpoint import resolve
        from ivl.processing.processor import Processor

        processor = Processor.load(resolve(model))
    return inspect(DataConfig(mixture=mixture, root=root), processor)


def _problems(found) -> str:
    if not found.bad:
        return "no problems"
    return f"{found.bad} bad: " + (", ".join(f"{count} {kind}" for kind, count in sorted(found.kinds.items())) or "the file")
