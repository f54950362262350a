"""`ivl plan`: whether a run or a model fits on given cards, how long it takes, and what would fit instead."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import tyro

from ivl.cli.options import parse
from ivl.cli.train import parse_run, starting_point, take
from ivl.errors import InputError
from ivl.parallel.cards import Machines
from ivl.runs.config import RunConfig
from ivl.utils.checks import check_ranges

if TYPE_CHECKING:
    from ivl.config import ModelConfig
    from ivl.runs.plan import RankPlan

USAGE = """usage: ivl plan RECIPE [--nodes N] [--gpus N] [--card NAME] [--tensor-parallel N] [--json]
                                    memory, traffic, time and checkpoints of a training run; RECIPE and its options
                                    are those of `ivl train`, such as --data.max-tokens, --shard or --replicate
       ivl plan --serve MODEL [--card NAME] [--tensor-parallel N] [--context N] [--batch N] [--json]
                                    what a model needs to answer; MODEL is a size, a directory or a hub id

A plan that does not fit ends with exit code 1 and with changes that do, each planned in the same way.
"""
MOST_PROPOSALS = 4


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `ivl plan RECIPE`: the machines, and those of the run's configuration."""

    machines: Annotated[Machines, tyro.conf.arg(name="")] = field(default_factory=Machines)
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object instead of a page."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class ServePlanOptions:
    """Options of `ivl plan --serve MODEL`."""

    serve: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A size (`8B`, `3-14B`), a directory or a hub id."""
    card: str = "h100-80gb"
    """The card, as for training."""
    tensor_parallel: int | None = None
    """Cards that share the decoder; by default the fewest that fit."""
    context: int = 8192
    """Tokens of prompt and reply together."""
    batch: int = 16
    """Replies at once."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON list instead of a table."""


def plan(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return
    if take(args, "--serve")[0] is not None:
        _plan_serving(args)
    else:
        _plan_training(args)


def _plan_training(args: list[str]) -> None:
    name, start, args = starting_point(args)
    options = parse_run(PlanOptions, f"plan {name}", start, args)
    from ivl.runs.plan import describe_run, plan_ranks, proposals

    plan = plan_ranks(options.config, options.machines)
    if not options.json:
        print(f"{describe_run(options.config)}\n\n{plan.describe()}", flush=True)
    found = [] if plan.fits else list(islice(proposals(plan, _lora_of(name)), MOST_PROPOSALS))
    if options.json:
        changes = [{"change": change, "peak": other.peak, "tokens_per_second": other.tokens_per_second}
                   for change, other in found]  # fmt: skip
        print(json_format.dumps(plan.to_json() | {"proposals": changes}, indent=2))
    if not plan.fits:
        raise _refusal(plan, found)


def _refusal(plan: RankPlan, found: list[tuple[str, RankPlan]]) -> InputError:
    """Return the error for a plan that does not fit, and print the changes that do."""
    from ivl.parallel.cards import BUFFERS, GIB

    for change, other in found:
        print(f"fits: {change:46}{other.peak / GIB:6.1f} GiB{other.tokens_per_second:12,.0f} tokens/s", file=sys.stderr)
    return InputError(
        f"does not fit: {plan.peak / GIB:.1f} GiB and {BUFFERS // GIB} for buffers, a {plan.machines.card} has "
        f"{plan.card.size / GIB:.1f}; "
        + ("the changes above do" if found else "nor does a smaller pack, more machines or a larger card")
    )


def _lora_of(name: str) -> dict[str, RunConfig]:
    """The adapters' run beside a recipe, where there is one."""
    from ivl.recipes import recipes

    other = f"{name.rpartition('-')[0]}-lora"
    return {f"{other} (trains adapters alone)": recipes()[other]()} if other in recipes() and other != name else {}


def _plan_serving(args: list[str]) -> None:
    options = parse(ServePlanOptions, "plan", args)
    check_ranges(options, tensor_parallel="[1, inf)", context="[1, inf)", batch="[1, inf)")
    from ivl.serve.plan import describe_serving, plan_serving

    plans = plan_serving(
        _architecture(options.serve), options.card, context=options.context, batch=options.batch,
        parallel=options.tensor_parallel,
    )  # fmt: skip
    if options.json:
        print(json_format.dumps([asdict(plan) for plan in plans], indent=2))
    else:
        print(describe_serving(options.serve, options.card, plans, context=options.context, batch=options.batch))
    if not any(plan.fits for plan in plans):
        raise InputError(
            f"does not fit on {options.card}, not even in int4: fewer replies, a shorter context, or a larger card"
        )


def _architecture(model: str) -> ModelConfig:
    """The architecture of a published model by its size or hub id, without a download, or of a model's directory."""
    from ivl.checkpoint import load_config, resolve
    from ivl.checkpoint.releases import MODELS

    published = {key: model.config for key, model in MODELS.items()} | {m.hub_id: m.config for m in MODELS.values()}
    return published[model] if model in published else load_config(resolve(model))
