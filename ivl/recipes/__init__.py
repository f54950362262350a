"""Recipes: functions that return a complete RunConfig. Importing them costs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ivl.errors import InputError
from ivl.recipes import nano, published
from ivl.runs.config import RunConfig
from ivl.utils.imports import import_object

Recipe = Callable[[], RunConfig]


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
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes are {', '.join(known)}"
    raise InputError(f"unknown recipe {name!r}; {hint} Your own is path/to/file.py:function")
