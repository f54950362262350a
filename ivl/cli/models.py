"""`ivl models`: the published models, counted by building each one on the meta device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from ivl.config import PUBLISHED, SIZES, published_config
from ivl.utils.progress import wide_console


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List the fourteen published models with their parts and exact parameter counts."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON list of objects instead of a table."""


def models(args: list[str]) -> None:
    options = tyro.cli(ModelsOptions, prog="ivl models", args=args)
    counts = {size: count_parameters(size) for size in SIZES}
    rows = [
        {"name": m.name, "hub_id": m.hub_id, "vision": m.vision, "language": m.language, **counts[m.size]} for m in PUBLISHED
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in rows[0]:
        table.add_column(column, justify="right" if column.endswith("parameters") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else v for v in row.values()))
    wide_console().print(table)


def count_parameters(size: str) -> dict[str, int]:
    """Count the parameters of one published size exactly, by part."""
    from ivl.checkpoint.model_dir import empty_model

    model = empty_model(published_config(size))
    parts = {"vision": model.vision, "projector": model.projector, "language": model.decoder}
    counts = {f"{name}_parameters": sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return {**counts, "parameters": sum(counts.values())}
