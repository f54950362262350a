"""The options of a command, and what those of other tools are here."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from ivl.errors import InputError, nearest
from ivl.generators import LoadConfig

T = TypeVar("T")
OPTIONS: dict[str, dict[str, str]] = {
    command: {name: ours for ours, names in answers.items() for name in names}
    for command, answers in tomllib.loads(Path(__file__).with_name("foreign.toml").read_text("utf-8")).items()
}
"""By command: the name of an option elsewhere, with hyphens, and what it is here."""


@dataclass(frozen=True, kw_only=True)
class ReplyLoadConfig(LoadConfig):
    """How a model is loaded whose replies are all of one adapter, or of none."""

    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")] = ()
    """LoRA adapter to reply with, unmerged: its directory. What follows it is no further adapter, but a picture or a model."""


def parse(kind: type[T], command: str, args: Sequence[str], **settings: Any) -> T:
    """Return the options of a command.

    Args:
        kind: A dataclass of the options.
        command: As it is called, such as `chat`.
        args: What follows it.
        settings: Further arguments of tyro.cli.

    Raises:
        InputError: for options of other tools, and for values that the dataclass refuses.
    """
    answer_foreign(command, args)
    try:
        return tyro.cli(kind, prog=f"ivl {command}", args=args, **settings)
    except InputError:
        raise
    except (ValueError, ArithmeticError) as error:  # the dataclass's own checks
        raise InputError(str(error)) from error


def run_subcommand(commands: Mapping[str, Callable[..., Any]], command: str, args: Sequence[str], **settings: Any) -> Any:
    """Call the function, or make the dataclass, that the first argument names; an InputError names the nearest one."""
    answer_foreign(command, args)
    name, *rest = args or [""]
    if name in commands:
        return tyro.cli(commands[name], prog=f"ivl {command} {name}", args=rest, **settings)
    if name and not name.startswith("-"):
        raise InputError(f"unknown command {name!r}; {nearest(name, commands, 'commands')}")
    page = [name] if name in ("-h", "--help") else []
    return tyro.extras.subcommand_cli_from_dict(dict(commands), prog=f"ivl {command}", args=page, **settings)


def answer_foreign(command: str, args: Sequence[str]) -> None:
    """Name our options for those of other tools among the arguments.

    Raises:
        InputError: if there are any.
    """
    known, found = OPTIONS.get(command.partition(" ")[0], {}), dict[str, str]()
    for arg in args:
        name = arg.partition("=")[0]
        if name.startswith("--") and (ours := known.get(name[2:].lower().replace("_", "-"))):
            found[name] = ours
    if found:
        raise InputError("; ".join(f"{name} is {ours}" for name, ours in found.items()) + f" (`ivl {command} --help`)")
