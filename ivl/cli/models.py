"""`ivl models`: the published models, counted by building each one on the meta device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from ivl.config import SIZES, published_config
from ivl.utils.progress import wide_console

LANGUAGE_MODELS = {
    "1B": "Qwen2.5-0.5B-Instruct", "2B": "internlm2_5-1_8b-chat", "4B": "Qwen2.5-3B-Instruct", "8B": "internlm2_5-7b-chat",
    "26B": "internlm2_5-20b-chat", "38B": "Qwen2.5-32B-Instruct", "78B": "Qwen2.5-72B-Instruct",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List the fourteen published models with their parts and exact parameter counts."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON list of objects instead of a table."""


def models(args: list[str]) -> None:
    options = tyro.cli(ModelsOptions, prog="ivl models", args=args)
    about = {size: describe(size) for size in SIZES}
    names = [(f"InternVL2_5-{size}{suffix}", size) for suffix in ("", "-MPO") for size in SIZES]
    rows = [{"name": name, "hub_id": f"OpenGVLab/{name}", **about[size]} for name, size in names]
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


def describe(size: str) -> dict[str, str | int]:
    """Name the parts of one published size, and count their parameters exactly."""
    from ivl.checkpoint.model_dir import empty_model

    config = published_config(size)
    model = empty_model(config)
    vision = f"InternViT-{'6B' if config.vision.qk_norm else '300M'}-448px-V2_5"
    parts = {"vision": model.vision, "projector": model.projector, "language": model.decoder}
    counts = {f"{name}_parameters": sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return {"vision": vision, "language": LANGUAGE_MODELS[size], **counts, "parameters": sum(counts.values())}
