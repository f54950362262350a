"""`ivl models`: the published models, counted by building each one on the meta device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import tyro

from ivl.checkpoint.releases import MODELS, PublishedModel
from ivl.utils.progress import wide_console


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List the published models of InternVL2.5, 3 and 3.5 (dense) with their parts and exact parameter counts."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON list of objects instead of a table."""


def models(args: list[str]) -> None:
    options = tyro.cli(ModelsOptions, prog="ivl models", args=args)
    rows: list[dict[str, str | int]] = []
    for versions, group in groupby(MODELS.values(), key=lambda model: model.versions):
        about = {model.hub_id: describe(model) for model in group}
        ids = [(f"{hub_id}{version}", hub_id) for version in versions for hub_id in about]
        rows += [{"name": hub_id.split("/")[1], "hub_id": hub_id, **about[final]} for hub_id, final in ids]
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


def describe(model: PublishedModel) -> dict[str, str | int]:
    """Name the parts of a published model, and count their parameters exactly."""
    from ivl.checkpoint.model_dir import empty_model

    empty = empty_model(model.config)
    vision = f"InternViT-{'6B' if model.config.vision.qk_norm else '300M'}-448px-V2_5"
    parts = {"vision": empty.vision, "projector": empty.projector, "language": empty.decoder}
    counts = {f"{name}_parameters": sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return {"vision": vision, "language": model.language, **counts, "parameters": sum(counts.values())}
