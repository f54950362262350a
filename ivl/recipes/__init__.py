"""Recipes: functions that return a complete TrainConfig. Importing them costs no torch."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from ivl.errors import InputError
from ivl.recipes import nano, published
from ivl.train.config import TrainConfig

Recipe = Callable[[], TrainConfig]


def recipes() -> dict[str, Recipe]:
    """Every recipe by name."""
    return {**nano.RECIPES, **published.RECIPES}


def find(name: str) -> TrainConfig:
    """A recipe by name, or `path/to/file.py:function`.

    Raises:
        InputError: for an unknown name, with the nearest known ones.
    """
    if ".py:" in name:
        return _from_file(name)
    known = recipes()
    if name in known:
        return known[name]()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes are {', '.join(known)}"
    raise InputError(f"unknown recipe {name!r}; {hint} Your own is path/to/file.py:function")


def _from_file(name: str) -> TrainConfig:
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such recipe file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        there = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise InputError(f"{path} has no function {function!r}; it has {', '.join(there) or 'none'}")
    config = getattr(module, function)()
    if not isinstance(config, TrainConfig):
        raise InputError(f"{name} returned {type(config).__name__}, a recipe returns a TrainConfig")
    return config
