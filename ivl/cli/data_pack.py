"""`ivl data pack`: the packs and steps that a mixture will make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from ivl.cli.data import MixtureOptions
from ivl.data.config import DataConfig
from ivl.errors import InputError
from ivl.utils.progress import print_table, reporting, wide_console

if TYPE_CHECKING:
    from rich.table import Table

    from ivl.datasets.estimate import PackEstimate


@dataclass(frozen=True, kw_only=True)
class PackOptions(MixtureOptions):
    model: str
    """Model directory whose processor encodes the rows."""
    ranks: int = 1
    """Processes that train."""
    accumulation: int = 1
    """Packs that every rank takes in one optimizer step."""
    rows: int = 1000
    """Rows to encode."""
    seed: int = 0
    """Seed of the order and of the choice of rows."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Changes nothing: this command always prints and never writes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ranks", "accumulation", "rows"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be >= 1, got {getattr(self, name)}")


def pack(options: Annotated[PackOptions, tyro.conf.arg(name="")]) -> None:
    """Print how full packs get, how many samples they hold, and how many steps an epoch takes.

    Random rows are encoded, an epoch is drawn from their lengths and packed. Nothing is written: packs are made in training.
    """
    from ivl.checkpoint import load_processor, resolve
    from ivl.data.loader import Loader
    from ivl.datasets.estimate import estimate_packs

    loader = Loader(options, load_processor(resolve(options.model)), seed=options.seed, world_size=options.ranks)
    with reporting("encoding", "rows") as show:
        estimate = estimate_packs(loader, options.rows, on_progress=show)
    console = wide_console()
    print_table(_table(estimate))
    for line in describe(estimate, options, ranks=options.ranks, accumulation=options.accumulation):
        console.print(line, highlight=False)


def _table(estimate: PackEstimate) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    names = ("data set", "rows", "drawn an epoch", "each", "encoded", "tokens", "most", "tiles", "most", "over budget", "bad")
    for name in names:
        table.add_column(name, justify="left" if name == "data set" else "right", no_wrap=True)
    for part in estimate.datasets:
        table.add_row(
            part.name, f"{part.rows:,}", f"{part.draws:,}", f"x {part.draws / part.rows:.3g}", f"{part.sampled:,}",
            f"{part.tokens:,.0f}", f"{part.max_tokens:,}", f"{part.tiles:.1f}", f"{part.max_tiles}", f"{part.over_budget:,}",
            f"{part.bad:,}",
        )  # fmt: skip
    return table


def describe(estimate: PackEstimate, config: DataConfig, *, ranks: int, accumulation: int) -> list[str]:
    """The estimate in words and numbers, a line each."""
    steps, packs = estimate.num_steps(accumulation), estimate.packs * ranks
    lines = [
        "",
        f"budgets          {config.max_tokens:,} tokens and {config.max_tiles} tiles a pack",
        f"token fill       {estimate.token_fill:.1%}",
        f"tile fill        {estimate.tile_fill:.1%}",
        f"samples a pack   {estimate.samples_per_pack:.1f}",
        f"packs an epoch   {packs:,} (standard error {estimate.error:.1%}, from {estimate.sampled:,} rows)",
        f"steps an epoch   {steps:,} on {ranks} rank(s), {accumulation} pack(s) each: {ranks * accumulation} packs a step",
    ]
    policy = {
        "refuse": "the first stops training",
        "truncate": "cut at a turn",
        "cut": "cut at the budget",
        "skip": "left out",
    }[config.over_budget]
    if estimate.over_budget:
        lines.append(f"over budget      {estimate.over_budget:,} of {estimate.sampled:,} rows; {policy} (data.over_budget)")
    if bad := sum(part.bad for part in estimate.datasets):
        lines.append(f"bad rows         {bad:,} of {estimate.sampled:,}; `ivl data validate` names their places")
    return lines
