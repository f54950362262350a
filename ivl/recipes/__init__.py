"""Recipes: functions that return a complete RunConfig. Importing them costs no torch."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable
from pathlib import Path

from ivl.errors import InputError
from ivl.recipes import nano, published
from ivl.runs.config import RunConfig
from ivl.utils.imports import import_object

Recipe = Callable[[], RunConfig]
STAGES = ("finetune", "lora", "mpo")
"""Recipes of any model, which ivl.recipes.any_model makes of a model and rows."""


def recipes() -> dict[str, Recipe]:
    """Every recipe by name."""
    return {**nano.RECIPES, **published.RECIPES}


def find(name: str) -> RunConfig:
    """A recipe's configuration, by its name or as `path/to/file.py:function`.

    Raises:
        InputError: for an unknown name, with the nearest known ones; for a function that returns something else.
    """
    known = recipes()
    if ".py:" in name:
        config = import_object(name, "recipe")()
        if not isinstance(config, RunConfig):
            raise InputError(f"{name} returned {type(config).__name__}, a recipe returns a RunConfig")
        return config
    if name in known:
        return known[name]()
    if name.endswith(".py") and Path(name).is_file():
        functions = [node.name for node in ast.parse(Path(name).read_bytes()).body if isinstance(node, ast.FunctionDef)]
        raise InputError(f"{name}: name the function, as in {name}:{functions[0] if functions else 'FUNCTION'}; "
                         f"it has {', '.join(functions) or 'none'}")  # fmt: skip
    near = difflib.get_close_matches(name, [*known, *STAGES], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes are {', '.join(known)}"
    raise InputError(f"unknown recipe {name!r}; {hint} Your own is path/to/file.py:function")
