"""A file of options for `ivl train --config`: YAML or JSON, with the names of the command line; or the run.json of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.runs.config import RunConfig, run_config
from ivl.utils.files import regular
from ivl.utils.strict_json import read_json

MAX_BYTES, MAX_DEPTH, MAX_ALIASES = 1 << 18, 20, 20
"""Of a YAML file. Deep levels take quadratic time, and aliases of aliases stand for billions of values."""
FLAGS = ("dry-run", "allow-changed")
"""Options that can only be given, not taken back."""


def read_options(path: Path) -> dict[str, Any]:
    """Read the options of a file.

    Raises:
        InputError: if it cannot be read, or holds something else than options by name.
    """
    if path.suffix == ".json":
        values = read_json(path)
    else:
        import yaml

        try:
            if regular(path).st_size > MAX_BYTES:
                raise InputError(f"{path}: more than {MAX_BYTES:,} bytes, which no file of options has")
            text = path.read_bytes()[: MAX_BYTES + 1].decode("utf-8-sig")
            depth = aliases = 0
            for event in yaml.parse(text, yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                aliases += isinstance(event, yaml.AliasEvent)
                if depth > MAX_DEPTH or aliases > MAX_ALIASES:
                    raise InputError(f"{path}: has more than {MAX_DEPTH} levels, or {MAX_ALIASES} aliases (*name)")
            values = yaml.safe_load(text)
        except InputError:
            raise
        except (yaml.YAMLError, RecursionError) as error:
            raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{path}: expected options by name, such as `model: DIR` and `num-steps: 100`")
    return values


def run_of(values: dict[str, Any], path: Path) -> RunConfig | None:
    """Return the configuration that a file holds whole, as run.json does; None if it holds options."""
    is_run = isinstance(values.get("data"), dict) and isinstance(values.get("train"), dict) and "stage" in values
    return run_config(values, str(path)) if is_run else None


def as_arguments(values: dict[str, Any], given: Sequence[str]) -> list[str]:
    """Return the options of a file as arguments, without those that the command line gives itself.

    Args:
        values: nested objects are prefixes: `optim: {lr: 1e-5}` is `--optim.lr 1e-5`.
        given: the arguments of the command line.
    """
    names = {_name(arg) for arg in given if arg.startswith("--")}
    try:
        return [part for option in _options(values) if _name(option[0]) not in names for part in option]
    except RecursionError:  # an alias of YAML may name what it lies in
        raise InputError("the options of the file are nested without end") from None


def _name(option: str) -> str:
    """The name of an option without its value, its hyphens and what negates it."""
    *groups, last = option.partition("=")[0].replace("_", "-").lstrip("-").split(".")
    return ".".join([*groups, last.removeprefix("no-")])


def _options(values: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', '-')}"
        if isinstance(value, dict):
            yield from _options(value, f"{name}.")
        elif isinstance(value, bool):
            group, _, last = name.rpartition(".")
            if value or name not in FLAGS:
                yield [f"--{group}{'.' * bool(group)}{'' if value else 'no-'}{last}"]
        elif isinstance(value, list):
            yield [f"--{name}", *map(str, value)]
        else:
            yield [f"--{name}", str(value)]
