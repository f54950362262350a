"""The `ivl` command. Subcommands are imported when they are called, so `ivl --help` imports neither torch nor tyro."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys

GROUPS = {
    "use a model": {
        "chat": ("ivl.cli.chat:chat", "talk to a model about images and video"),
        "serve": ("ivl.cli.serve:serve", "serve a model to OpenAI's clients, and a page to talk with it"),
        "eval": ("ivl.cli.eval:evaluate", "score a model on a benchmark or on your rows, with a confidence interval"),
    },
    "train one": {
        "train": ("ivl.cli.train:train", "fine-tune any model on your rows, or train a recipe"),
        "plan": ("ivl.cli.plan:plan", "memory, time and traffic of a run or a model on given cards"),
        "data": ("ivl.cli.data:main", "validate, count, filter, convert and pack rows"),
        "prefer": ("ivl.cli.prefer:main", "sample replies and build preference pairs"),
    },
    "models and files": {
        "models": ("ivl.cli.models:models", "the published models with exact parameter counts"),
        "convert": ("ivl.cli.convert:convert", "rewrite a checkpoint: another dialect, 8 or 4 bits, GGUF"),
        "compose": ("ivl.cli.convert:compose", "build a model from a ViT, a language model and a projector"),
        "merge": ("ivl.cli.convert:merge", "merge a LoRA adapter into its model"),
        "demo-data": ("ivl.cli.demo_data:demo_data", "write the small files that the documentation uses"),
        "completion": ("ivl.cli.completion:completion", "print the completion of a shell: bash or zsh"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def usage() -> str:
    """Return the list of commands."""
    groups = (
        "\n".join([f"{title}:", *(f"  {name:12}{text}" for name, (_, text) in group.items())])
        for title, group in GROUPS.items()
    )
    rows = "\n\n".join(groups)
    return (
        f"usage: ivl COMMAND ...\n\nInternVL2.5 in plain PyTorch.\n\n{rows}\n\n"
        "`ivl COMMAND --help` shows its options, `ivl --version` the version."
    )


def _open_closed_streams() -> None:
    """Lead standard streams that are closed to nowhere: the first files that are opened would take their places and get what
    is written to them, such as a warning in the middle of a journal."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the least free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def main() -> None:
    """Entry point of the `ivl` command."""
    from ivl.errors import InputError, nearest
    from ivl.utils.terminal import printable

    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and rows may hold what no encoding has
    args = sys.argv[1:]
    if args[:1] == ["help"]:  # ivl help train is ivl train --help
        args = [*args[1:], "--help"]
    if not args or args[0] in ("-h", "--help"):
        with contextlib.suppress(BrokenPipeError):  # a reader such as head has closed the pipe
            print(usage(), flush=True)
        raise SystemExit(0 if args else 2)
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("ivl"))
        return
    if args[0] not in COMMANDS:
        print(f"ivl: unknown command {args[0]!r}; {nearest(args[0], COMMANDS, 'commands')}", file=sys.stderr)
        raise SystemExit(2)
    module, _, function = COMMANDS[args[0]][0].partition(":")
    try:
        getattr(importlib.import_module(module), function)(args[1:])
        sys.stdout.flush()
    except InputError as error:
        print(f"ivl {args[0]}: {printable(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:  # a reader such as head has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:  # a full disk, a name that is too long, a folder that cannot be read
        if error.errno is None:
            raise
        print(f"ivl {args[0]}: {printable(error.filename or 'a file')}: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None
