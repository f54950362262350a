"""`ivl train`: a recipe by name, your own by path, or an interrupted run."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ivl.errors import InputError
from ivl.recipes import find, recipes
from ivl.runs.config import RunConfig

USAGE = """usage: ivl train RECIPE [--optim.lr 2e-5 ...]     train a recipe, with any option changed
       ivl train path/to/file.py:function ...    your own recipe
       ivl train --resume DIR                    go on with an interrupted run, exactly
       ivl train RECIPE --dry-run                print the plan: parameters, steps, memory
       ivl train RECIPE --help                   every option of the recipe, with its value
"""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `ivl train`: those of the run's configuration, and three more."""

    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the plan (parameters trained and frozen, steps, memory) and stop."""
    allow_changed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Resume although options differ from those that the run began with."""
    val_mixture: str | None = None
    """Data of a validation loss, read and packed like the training data; see val_every and val_packs."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


def train(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(f"{USAGE}\nrecipes:\n" + "\n".join(f"  {name:18}{_summary(recipe)}" for name, recipe in recipes().items()))
        return
    resume, args = _take_resume(args)
    if resume is not None:
        from ivl.runs.directory import load_run_config, run_dir_of

        run_dir = run_dir_of(resume)
        start, name = dataclasses.replace(load_run_config(run_dir), out_dir=str(run_dir)), f"--resume {resume}"
    else:
        name, *args = args
        start = find(name)
    options = tyro.cli(
        TrainOptions,
        prog=f"ivl train {name}",
        description=start.name,
        default=TrainOptions(config=start),
        args=[re.sub("^--preference[.]", "--objective.", arg) for arg in args],  # as they were named once
        config=(tyro.conf.AvoidSubcommands,),
    )
    config = options.config
    if options.val_mixture is not None:
        data = dataclasses.replace(config.data, mixture=options.val_mixture, root=None, epochs=1)
        config = dataclasses.replace(config, val_data=data)
    if options.dry_run:
        from ivl.runs.plan import make_plan

        print(make_plan(config).describe(config))
        return
    from ivl.runs.run import run

    final = run(config, resume=resume is not None, allow_changed=options.allow_changed)
    if os.environ.get("RANK", "0") == "0":  # once, however many processes
        print(final)


def _take_resume(args: list[str]) -> tuple[Path | None, list[str]]:
    """Split off `--resume DIR` (or --resume=DIR)."""
    for at, arg in enumerate(args):
        if arg.startswith("--resume="):
            return Path(arg.removeprefix("--resume=")), args[:at] + args[at + 1 :]
        if arg == "--resume":
            if at + 1 == len(args):
                raise InputError("--resume needs the directory of a run, such as --resume runs/NAME")
            return Path(args[at + 1]), args[:at] + args[at + 2 :]
    return None, args


def _summary(recipe: object) -> str:
    """First line of a recipe's docstring."""
    function = getattr(recipe, "func", recipe)
    return (function.__doc__ or "").strip().split("\n")[0]
