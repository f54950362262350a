"""`ivl models`: the published models, counted by building each one on the meta device."""

from __future__ import annotations

import json
from typing import Annotated

import tyro

from ivl.config import PUBLISHED, SIZES, published_config


def models(args: list[str]) -> None:
    tyro.cli(run, prog="ivl models", args=args)


def run(*, as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False) -> None:
    """List the fourteen published models with their parts and exact parameter counts.

    Args:
        as_json: Print a JSON list of objects instead of a table.
    """
    counts = {size: count_parameters(size) for size in SIZES}
    rows = [
        {"name": m.name, "hub_id": m.hub_id, "vision": m.vision, "language": m.language, **counts[m.size]} for m in PUBLISHED
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in rows[0]:
        table.add_column(column, justify="right" if column.endswith("parameters") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else v for v in row.values()))
    # A terminal or a pipe may be narrow, but cut ids and counts would be useless: let lines run over instead.
    Console(width=max(Console().width, 200)).print(table)


def count_parameters(size: str) -> dict[str, int]:
    """Exact parameter counts of one published size, by part."""
    import torch

    from ivl.model.vlm import VLM

    with torch.device("meta"):
        model = VLM(published_config(size))
    parts = {"vision": model.vision, "projector": model.projector, "language": model.decoder}
    counts = {f"{name}_parameters": sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return {**counts, "parameters": sum(counts.values())}
