"""`ivl eval`: scores a model on a task."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ivl.errors import InputError
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.tasks import TASKS, find
from ivl.generators import LoadConfig


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Score a model on a benchmark, with a 95% confidence interval (Wilson).

    Predictions are saved as they come; the same command continues a run that was interrupted.
    """

    model: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """A model directory or hub id."""
    list_tasks: Annotated[bool, tyro.conf.arg(name="list"), tyro.conf.FlagCreatePairsOff] = False
    """Show the tasks and stop."""
    config: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)
    load: Annotated[LoadConfig, tyro.conf.arg(name="")] = field(default_factory=LoadConfig)


def evaluate(args: list[str]) -> None:
    """Run the command."""
    args = [re.sub("^--judge-", "--judge.", arg) for arg in args]
    without_help = [arg for arg in args if arg not in ("-h", "--help")]
    # The defaults of sampling follow from the task and the method, which are read first.
    first, _ = tyro.cli(EvalOptions, args=without_help, return_unknown_args=True, config=(tyro.conf.AvoidSubcommands,))
    sampling = first.config.sampling_for(find(first.config.task).params)
    try:
        default = EvalOptions(config=EvalConfig(sampling=sampling))
        options = tyro.cli(EvalOptions, prog="ivl eval", args=args, default=default, config=(tyro.conf.AvoidSubcommands,))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    if options.list_tasks:
        print("\n".join(f"{name:20}{text}" for name, (_, text) in TASKS.items()))
        return
    if options.model is None:
        raise InputError("name a model to evaluate: ivl eval MODEL --task easy-vqa")
    show(options.model, options.config, options.load)


def show(name: str, config: EvalConfig, load: LoadConfig) -> None:
    """Evaluate a model and print its scores."""
    from ivl.evaluation.run import run

    report, predictions = run(config, name, load)
    rows = {group: (report["metric"], row) for group, row in {"all": report, **report["by_type"]}.items()}
    if config.method.samples > 1:
        rows |= {f"{point['samples']} replies": (config.method.select, point) for point in report["samples"]["curve"]}
    for group, (what, row) in rows.items():
        low, high = row["ci95"]
        print(f"{group:12}{what} {row['value']:7.2%}  95% interval {low:.2%} to {high:.2%}  n {row['n']:,}")
    print(f"predictions: {predictions}")
    if config.out:
        print(f"report: {config.out}")
        if config.method.samples > 1:
            print(f"page: {config.out.with_suffix('.html')}")
