"""`ivl data pack`: what packing will make of a mixture, before any training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ivl.data.config import DataConfig, Weighting
from ivl.errors import InputError
from ivl.utils.progress import counting

if TYPE_CHECKING:
    from rich.table import Table

    from ivl.data.loader import Loader
    from ivl.datasets.estimate import PackEstimate


def pack(
    mixture: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MIXTURE")],
    *,
    model: str,
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    root: str | None = None,
    max_tokens: int = DataConfig.max_tokens,
    max_tiles: int = DataConfig.max_tiles,
    max_samples: int | None = None,
    max_buffer: int = DataConfig.max_buffer,
    max_tiles_per_image: int | None = None,
    weighting: Weighting = "size",
    over_budget: Literal["refuse", "truncate", "skip"] = "refuse",
    ranks: int = 1,
    accumulation: int = 1,
    rows: int = 1000,
    seed: int = 0,
    workers: int = 0,
) -> None:
    """Print how full packs get, how many samples they hold, and how many steps an epoch takes.

    Rows are drawn at random and encoded, an epoch is drawn from their lengths and packed. Nothing is written: packs are made
    while training.

    Args:
        mixture: A meta JSON, or a file of rows of any format that is read.
        model: Model directory whose processor encodes the rows.
        dry_run: Must be given, for there is nothing else that this does.
        root: Folder of relative media paths when `mixture` is a file of rows.
        max_tokens: Tokens of a pack.
        max_tiles: Tiles of a pack.
        max_samples: Samples of a pack; 1 turns packing off.
        max_buffer: Packs that stay open.
        max_tiles_per_image: Tile budget of one sample's images.
        weighting: Share of a data set in an epoch: size, root, or a temperature.
        over_budget: What happens to a sample larger than a pack.
        ranks: Processes that train.
        accumulation: Packs that every rank takes in one optimiser step.
        rows: Rows to encode.
        seed: Of the order and of the rows chosen.
        workers: Processes that encode; 0 encodes in this one.
    """
    from rich.console import Console

    from ivl.checkpoint import load_processor, resolve
    from ivl.data.loader import Loader

    if not dry_run:
        raise InputError("packs are made while training; --dry-run shows what they will be")
    for name, value in {"ranks": ranks, "accumulation": accumulation, "rows": rows}.items():
        if value < 1:
            raise InputError(f"--{name} must be >= 1, got {value}")
    try:
        config = DataConfig(
            mixture=mixture, root=root, max_tokens=max_tokens, max_tiles=max_tiles, max_samples=max_samples,
            max_buffer=max_buffer, max_tiles_per_image=max_tiles_per_image, weighting=weighting, over_budget=over_budget,
            num_workers=workers,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from None
    loader = Loader(config, load_processor(resolve(model)), seed=seed, world_size=ranks)
    found = _estimate(loader, rows)
    console = Console()
    console = Console(width=max(console.width, 160))  # cut names and counts would be useless
    console.print(_table(found))
    for line in describe(found, config, ranks=ranks, accumulation=accumulation):
        console.print(line, highlight=False)


def _estimate(loader: Loader, rows: int) -> PackEstimate:
    with counting() as bar:
        task = bar.add_task("encoding", total=min(rows, len(loader.mixture)), note="")

        def watch() -> None:
            bar.update(task, advance=1, note=f"{bar.tasks[0].speed or 0:,.0f} rows/s")

        return loader.estimate_packs(rows, watch=watch)


def _table(found: PackEstimate) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    names = ("data set", "rows", "drawn an epoch", "each", "encoded", "tokens", "most", "tiles", "most", "over budget", "bad")
    for name in names:
        table.add_column(name, justify="left" if name == "data set" else "right", no_wrap=True)
    for each in found.datasets:
        table.add_row(
            each.name, f"{each.rows:,}", f"{each.draws:,}", f"x {each.draws / each.rows:.3g}", f"{each.sampled:,}",
            f"{each.tokens:,.0f}", f"{each.max_tokens:,}", f"{each.tiles:.1f}", f"{each.max_tiles}", f"{each.over_budget:,}",
            f"{each.bad:,}",
        )  # fmt: skip
    return table


def describe(found: PackEstimate, config: DataConfig, *, ranks: int, accumulation: int) -> list[str]:
    """The estimate in words and numbers, a line each."""
    steps = found.num_steps(accumulation)
    lines = [
        "",
        f"budgets          {config.max_tokens:,} tokens and {config.max_tiles} tiles a pack",
        f"token fill       {found.token_fill:.1%}",
        f"tile fill        {found.tile_fill:.1%}",
        f"samples a pack   {found.samples_per_pack:.1f}",
        f"packs an epoch   {found.packs * ranks:,} (standard error {found.error:.1%}, from {found.sampled:,} rows)",
        f"steps an epoch   {steps:,} on {ranks} rank(s), {accumulation} pack(s) each: {ranks * accumulation} packs a step",
    ]
    does = {"refuse": "the first stops training", "truncate": "cut at a turn", "skip": "left out"}[config.over_budget]
    if found.over_budget:
        lines.append(f"over budget      {found.over_budget:,} of {found.sampled:,} rows; {does} (data.over_budget)")
    if bad := sum(each.bad for each in found.datasets):
        lines.append(f"bad rows         {bad:,} of {found.sampled:,}; `ivl data validate` tells where they are")
    return lines
