"""`ivl train`: a recipe by name, your own by path, or an interrupted run."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ivl.errors import InputError
from ivl.recipes import STAGES, find, recipes
from ivl.runs.config import RunConfig

USAGE = """usage: ivl train finetune|lora|mpo --model DIR_OR_HUB_ID --data ROWS ...
                                                 train any model on your own rows, or pairs
       ivl train RECIPE [--optim.lr 2e-5 ...]     train a recipe, with any option changed
       ivl train path/to/file.py:function ...    your own recipe
       ivl train --resume DIR                    go on with an interrupted run, exactly
       ivl train RECIPE --resume auto            begin, or go on with what is there: for launchers that start it again
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
    resume, args = _take(args, "--resume")
    if resume is not None and not resume:
        raise InputError("--resume needs the directory of a run, such as --resume runs/NAME, or auto and a recipe")
    args = [*(resume or [])[1:], *args]
    if resume and resume[0] == "auto" and not args:
        raise InputError("--resume auto needs a recipe, as in ivl train RECIPE --out-dir DIR --resume auto")
    if resume is not None and resume[0] != "auto":
        from ivl.runs.directory import load_run_config

        given = Path(resume[0])
        run_dir = given.parent if given.name.startswith("checkpoint-") and (given / "trainer").is_dir() else given
        start, name = dataclasses.replace(load_run_config(run_dir), out_dir=str(run_dir)), f"--resume {given}"
    elif args[0] in STAGES:
        name, *args = args
        start, args = _any_model(name, args)
    else:
        name, *args = args
        start = find(name)
    try:
        config, options = _parse(name, start, args)
    except InputError:
        raise
    except (ValueError, ArithmeticError) as error:  # checks of the configuration
        raise InputError(str(error)) from error
    if options.dry_run:
        from ivl.runs.plan import make_plan

        print(make_plan(config).describe(config))
        return
    from ivl.runs.run import run

    final = run(config, resume=resume is not None, allow_changed=options.allow_changed)
    if _is_first():
        print(final)


def _parse(name: str, start: RunConfig, args: list[str]) -> tuple[RunConfig, TrainOptions]:
    """The recipe's configuration with the options of the command line."""
    options = tyro.cli(
        TrainOptions,
        prog=f"ivl train {name}",
        description=start.name,
        default=TrainOptions(config=start),
        args=[re.sub("^--data(=|$)", r"--data.mixture\1", re.sub("^--preference[.]", "--objective.", arg)) for arg in args],
        config=(tyro.conf.AvoidSubcommands,),
    )
    config = options.config
    if options.val_mixture is not None:
        data = dataclasses.replace(config.data, mixture=options.val_mixture, root=None, epochs=1)
        config = dataclasses.replace(config, val_data=data)
    return config, options


def _any_model(stage: str, args: list[str]) -> tuple[RunConfig, list[str]]:
    """The configuration of `finetune`, `lora` or `mpo` from --model and --data, and the other arguments."""
    from ivl.recipes.any_model import any_model, unknown_model

    model, args = _take(args, "--model")
    data, args = _take(args, "--data", "--data.mixture")
    if {"-h", "--help"} & set(args):
        return unknown_model(stage), args
    if not model or not data:
        raise InputError(f"ivl train {stage} needs --model and --data, as in --model runs/quickstart/model --data rows.jsonl")
    forced = _take(args, "--data.format")[0]
    config, chosen = any_model(stage, model[-1], tuple(data), format=forced[-1] if forced else None)
    if _is_first():
        print(chosen, file=sys.stderr)
    return config, args


def _is_first() -> bool:
    """Whether this process prints, of however many a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _take(args: list[str], *names: str) -> tuple[list[str] | None, list[str]]:
    """Split off the values of an option, up to the next option; None if the option is not there."""
    values, rest, inside = None, [], False
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in names:
            inside = not equals
            values = [*(values or []), *([value] if equals else [])]
        elif inside and not arg.startswith("--") and values is not None:
            values.append(arg)
        else:
            inside = False
            rest.append(arg)
    return values, rest


def _summary(recipe: object) -> str:
    """First line of a recipe's docstring."""
    function = getattr(recipe, "func", recipe)
    return (function.__doc__ or "").strip().split("\n")[0]
