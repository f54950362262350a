"""`ivl train`: a recipe by name, your own by path, or an interrupted run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from ivl.cli.options import answer_foreign, parse
from ivl.cli.options_file import as_arguments, read_options, run_of
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.recipes import STAGES, find, recipes
from ivl.runs.config import RunConfig

USAGE = """usage: ivl train finetune|lora|mpo --model DIR_OR_HUB_ID --data ROWS ... [--val-share 0.1]
                                                 train any model on your own rows, or pairs
       ivl train RECIPE [--optim.lr 2e-5 ...]     train a recipe, with any option changed
       ivl train path/to/file.py:function ...    your own recipe
       ivl train RECIPE --lora.rank 8 ...        adapters in any recipe, in place of the parts that they lie in
       ivl train --config run.yaml ...           options from a file: `recipe: lora`, `model: DIR`, `optim: {lr: 1e-5}`
       ivl train --resume DIR                    go on with an interrupted run, exactly
       ivl train RECIPE --resume auto            begin, or go on with what is there: for launchers that start it again
       ivl train RECIPE --dry-run                check the run and print the plan: parameters, steps, memory;
                                                 with --nodes, --gpus or --card what `ivl plan` prints
       ivl train RECIPE --help                   every option of the recipe, with its value
"""
OptionsOfRun = TypeVar("OptionsOfRun")
FITTED = {
    "--data.format": str, "--val-share": float, "--data.epochs": int, "--num-steps": int, "--packs-per-step": int,
    "--optim.lr": float,
}  # fmt: skip
"""Options that the settings of any model go by, and that its first line tells."""
SIZES_OF_ROWS = ("--data.max-tokens", "--data.max-tiles", "--data.max-tiles-per-image")
"""Options that are not changed to fit the memory at hand."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `ivl train`: those of the run's configuration, and four more."""

    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check model and data, print the plan (parameters trained and frozen, steps, memory) and stop."""
    allow_changed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Resume although options differ from those that the run began with."""
    val_share: float | None = None
    """Keep this share of the rows from training, chosen by their content, for a validation loss."""
    val_mixture: str | None = None
    """Data of a validation loss, read and packed like the training data; see val_every and val_packs."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]

    def run_config(self) -> RunConfig:
        """Return the configuration with the validation data that the options name.

        Raises:
            InputError: if they name two.
        """
        config = self.config
        if self.val_share is not None and self.val_mixture is not None:
            raise InputError("give one of --val-share and --val-mixture: rows kept from the data, or other rows")
        if self.val_share is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, val_share=self.val_share))
        if config.val_data is not None and config.val_data.validation:
            config = dataclasses.replace(config, val_data=None)  # derived anew from the options of the data
        if self.val_mixture is not None:
            data = dataclasses.replace(config.data, mixture=self.val_mixture, root=None, epochs=1)
            config = dataclasses.replace(config, val_data=data)
        return config


def train(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(f"{USAGE}\nrecipes:\n" + "\n".join(f"  {name:18}{_summary(recipe)}" for name, recipe in recipes().items()))
        return
    if "--dry-run" in args and {"--nodes", "--gpus", "--card"} & {arg.partition("=")[0] for arg in args}:
        from ivl.cli.plan import plan

        plan([arg for arg in args if arg != "--dry-run"])
        return
    args, whole = _with_file(args)
    answer_foreign("train", args)
    resume, args = take(args, "--resume")
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
    elif whole is not None:
        name, start = whole
    elif not args or args[0].startswith("-"):
        raise InputError("name a recipe, or finetune, lora or mpo, before the options; in a file of --config, as `recipe`")
    else:
        name, start, args = starting_point(args)
    options = parse_run(TrainOptions, f"train {name}", _with_adapters(start, args), args)
    if name in STAGES:
        options = dataclasses.replace(options, config=_fitted(options.config, args))
    config = options.run_config()
    if options.dry_run:
        from ivl.runs.check import Check
        from ivl.runs.plan import describe_alone, describe_run

        check = Check(config, ranks=int(os.environ.get("WORLD_SIZE", "1")))
        print(f"{describe_run(config, check.length)}\n\n{describe_alone(config)}\n\n{check.describe()}")
        if check.problems:
            raise InputError(f"this run would stop: {'; '.join(check.problems)}")
        return
    from ivl.runs.outcome import describe
    from ivl.runs.run import run

    final = run(config, resume=resume is not None, allow_changed=options.allow_changed)
    if _is_first():
        print(describe(config), file=sys.stderr)
        print(final)


def starting_point(args: list[str]) -> tuple[str, RunConfig, list[str]]:
    """The name and the configuration of the recipe that the first argument names, and the arguments that are left."""
    name, *args = args
    if name not in STAGES:
        return name, find(name), args
    config, args = _any_model(name, args)
    return name, config, args


def parse_run(kind: type[OptionsOfRun], command: str, start: RunConfig, args: list[str]) -> OptionsOfRun:
    """The options of a command, whose field `config` has a recipe's configuration with the options of the command line.

    Raises:
        InputError: as `parse` does.
    """
    args = [re.sub("^--root(=|$)", r"--data.root\1", re.sub("^--data(=|$)", r"--data.mixture\1", arg)) for arg in args]
    args = [re.sub("^--preference[.]", "--objective.", arg) for arg in args]
    expected = start.architecture if start.model and not any(arg.startswith("--architecture.") for arg in args) else None
    if expected is not None:  # forty options of a model that is there already
        start = dataclasses.replace(start, architecture=None)
    # Other steps than before take as many epochs as they need; a run that is resumed with the steps that it has keeps its own.
    if take(args, "--num-steps")[0] not in (None, [str(start.train.num_steps)]) and take(args, "--data.epochs")[0] is None:
        start = dataclasses.replace(start, data=dataclasses.replace(start.data, epochs=None))
    default: Any = kind(config=start)  # type: ignore[call-arg]
    options: Any = parse(kind, command, args, description=start.name, default=default, config=(tyro.conf.AvoidSubcommands,))
    if expected is not None:
        options = dataclasses.replace(options, config=dataclasses.replace(options.config, architecture=expected))
    return options


def _any_model(stage: str, args: list[str]) -> tuple[RunConfig, list[str]]:
    """The configuration of `finetune`, `lora` or `mpo` from --model and --data, and the other arguments."""
    from ivl.recipes.any_model import any_model, unknown_model

    model, args = take(args, "--model")
    data, args = take(args, "--data", "--data.mixture")
    if {"-h", "--help"} & set(args):
        return unknown_model(stage), args
    if not model or not data:
        raise InputError(f"ivl train {stage} needs --model and --data, as in --model runs/quickstart/model --data rows.jsonl")
    given: dict[str, Any] = {}
    for name, kind in FITTED.items():
        with contextlib.suppress(ValueError, IndexError):  # the parser refuses it
            if (values := take(args, name)[0]) is not None:
                given[re.sub("^data[.]|^optim[.]", "", name[2:]).replace("-", "_")] = kind(values[-1])
    config, chosen = any_model(stage, model[-1], tuple(data), **given)
    if _is_first():
        print(chosen, file=sys.stderr)
    return config, args


def _fitted(config: RunConfig, args: list[str]) -> RunConfig:
    """The run with rows that fit the memory at hand; rows of a size that an argument gives stay as they are."""
    from ivl.recipes.fit import fit  # imports torch

    config, found = fit(config, keep=take(args, *SIZES_OF_ROWS)[0] is not None)
    if _is_first():
        print(found, file=sys.stderr)
    return config


def _with_file(args: list[str]) -> tuple[list[str], tuple[str, RunConfig] | None]:
    """The arguments, those of the file that --config names before them; or the whole configuration that it holds."""
    files, args = take(args, "--config")
    if files is None:
        return args, None
    if not files:
        raise InputError("--config needs a file of options (YAML or JSON), or the run.json of a run")
    path, given = Path(files[0]), [*files[1:], *args]
    values = read_options(path)
    if (whole := run_of(values, path)) is not None:
        return given, (f"--config {path}", whole)
    recipe, is_named = values.pop("recipe", None), bool(given) and not given[0].startswith("-")
    first, rest = (given[:1], given[1:]) if is_named else ([str(recipe)] if recipe else [], given)
    return [*first, *as_arguments(values, rest), *rest], None


def _with_adapters(start: RunConfig, args: list[str]) -> RunConfig:
    """The recipe with adapters if it has none and the arguments have --lora options. Parts that they lie in train no more."""
    if start.lora is not None or not any(arg.startswith("--lora.") for arg in args):
        return start
    targets = take(args, "--lora.targets")[0] or LoraConfig().targets
    inside = {target.partition(".")[0] for target in targets}
    whole = tuple(part for part in start.stage.trainable if part not in inside)
    stage = dataclasses.replace(start.stage, trainable=whole, vision_from_layer=0)
    return dataclasses.replace(start, stage=stage, lora=LoraConfig(targets=tuple(targets)))


def _is_first() -> bool:
    """Whether this process prints, of however many a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def take(args: list[str], *names: str) -> tuple[list[str] | None, list[str]]:
    """Split off the values of an option, up to the next option; None if the option is not there."""
    values, rest, inside = None, [], False
    for arg in args:
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") in names:
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
