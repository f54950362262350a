"""The tables of docs/scale.md: memory and speed of all sizes and stages on 8, 64 and 512 cards, and cards for answering.

`python -m studies.scale_table` prints the table of training, of the sizes and stages that are named, or of all: 20 minutes.
`--full` tracks every layer instead, and prints both peaks. `--serve` prints the table of answering.
"""

from __future__ import annotations

import sys
import time

from ivl.config import SIZES, published_config
from ivl.errors import InputError
from ivl.parallel.cards import CARDS, GIB, Machines
from ivl.recipes import find
from ivl.recipes.published import STAGES
from ivl.runs.plan import RankPlan, plan_ranks
from ivl.serve.plan import WIDTHS, plan_serving

NODES = (1, 8, 64)


def cells(size: str, stage: str) -> list[str]:
    found: list[str] = []
    before: RankPlan | None = None
    for nodes in NODES:
        config, machines = find(f"{size}-{stage}"), Machines(nodes=nodes)
        # Whole models need the same on any number of ranks.
        alike = before is not None and before.setup.shards == 1 and (before.packs_per_rank > 1) == (
            config.train.packs_per_step > machines.ranks
        )  # fmt: skip
        try:
            plan = before = plan_ranks(config, machines, tracked=before.tracked if before and alike else None)
        except InputError:  # fewer packs in a step than ranks
            found.append("-")
            continue
        memory = f"{plan.peak / GIB:.0f}"
        found.append(f"{memory}, {plan.tokens_per_second / 1000:,.0f} k" if plan.fits else f"**{memory}**")
    return found


def training(sizes: list[str], stages: list[str]) -> None:
    print(f"| | {' | '.join(f'{8 * nodes} cards' for nodes in NODES)} |\n|---|{'---|' * len(NODES)}")
    for size in sizes:
        for stage in stages:
            print(f"| {size} {stage} | {' | '.join(cells(size, stage))} |", flush=True)


def full(names: list[str]) -> None:
    for name in names:
        size, _, nodes = name.partition("@")
        config, machines = find(size), Machines(nodes=int(nodes))
        for whole in (False, True):
            began = time.monotonic()
            plan = plan_ranks(config, machines, whole=whole)
            kind = "every layer" if whole else "two layers"
            took = time.monotonic() - began
            print(f"{size} on {machines}: {kind} {plan.peak / GIB:.3f} GiB, {plan.tracked.fullest}, {took:.0f} s", flush=True)


def serving() -> None:
    print(f"| | {' | '.join(CARDS)} |\n|---|{'---|' * len(CARDS)}")
    for size in SIZES:
        for width in WIDTHS:
            cells = []
            for card in CARDS:
                plans = plan_serving(published_config(size), card, context=8192, batch=16, parallel=None)
                plan = next(plan for plan in plans if plan.width == width)
                cells.append(f"{plan.tensor_parallel}, {plan.tokens_per_second:,.0f}" if plan.fits else "-")
            print(f"| {size} {width} | {' | '.join(cells)} |")


def main(args: list[str]) -> None:
    if args[:1] == ["--serve"]:
        serving()
    elif args[:1] == ["--full"]:
        full(args[1:])
    else:
        training([a for a in args if a in SIZES] or list(SIZES), [a for a in args if a in STAGES] or list(STAGES))


if __name__ == "__main__":
    main(sys.argv[1:])
