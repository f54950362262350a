"""`ivl completion bash|zsh`: a script by which a shell completes commands, recipes and options. It starts no Python later."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ivl.cli.options import parse

SCRIPT = Path(__file__).with_name("completion.bash").read_text("utf-8").rstrip()
"""With @commands@, @options@ and @seconds@ where the words of each go."""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit"


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Print a script that completes `ivl` in a shell.

    For bash, add `eval "$(ivl completion bash)"` to ~/.bashrc; for zsh, `eval "$(ivl completion zsh)"` to ~/.zshrc. Shells
    start faster with the script in a file that is sourced.
    """

    shell: Annotated[tyro.conf.Positional[Literal["bash", "zsh"]], tyro.conf.arg(metavar="bash|zsh")]


def completion(args: list[str]) -> None:
    """Run the command."""
    options = parse(CompletionOptions, "completion", args)
    print(f"{ZSH}\n{script()}" if options.shell == "zsh" else script())


def script() -> str:
    """Return the script for bash; zsh reads it after ZSH."""
    from ivl.cli import COMMANDS

    seconds = second_words()
    pages = [(name, "") for name in COMMANDS if name not in seconds]
    pages += [(name, word) for name, words in seconds.items() if name != "train" for word in words]
    pages += [("train", word) for word in ("finetune", "lora", "mpo")]
    options = {f'"{name} {word}"' if word else f'"{name} "*': flags(name, word) for name, word in pages}
    options['"train "*'] = flags("train", "nano-mpo") | flags("train", "nano-language") | {"--resume", "--config"}
    indent = " " * 12
    cases = [f'{indent}{case}) words="{" ".join(sorted(names))}";;' for case, names in options.items()]
    words = [f'{indent}{name}) words="{" ".join(words)}";;' for name, words in seconds.items()]
    text = SCRIPT.replace("@commands@", " ".join(COMMANDS)).replace("@options@", "\n".join(cases))
    return text.replace("@seconds@", "\n".join(words))


def second_words() -> dict[str, tuple[str, ...]]:
    """Return the words that may follow a command."""
    from ivl.cli.data import COMMANDS as DATA
    from ivl.cli.prefer import COMMANDS as PREFER
    from ivl.recipes import STAGES, recipes

    return {"train": (*STAGES, *recipes()), "data": tuple(DATA), "prefer": tuple(PREFER), "completion": ("bash", "zsh")}


@cache
def flags(command: str, word: str) -> frozenset[str]:
    """Return the options on a page of help, which takes a second or two to make."""
    from ivl.cli import COMMANDS

    module, _, function = COMMANDS[command][0].partition(":")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        getattr(importlib.import_module(module), function)([*filter(None, [word]), "--help"])
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w.-]*\b", out.getvalue()))
