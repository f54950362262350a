"""Objects named by their import path: `package.module:name`, or `path/to/file.py:name` for a file outside every package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ivl.errors import InputError


def import_object(path: str, kind: str) -> Any:
    """Import a module or a file, and return its object of that name.

    Args:
        path: `package.module:name` or `path/to/file.py:name`.
        kind: what the object is, such as `recipe`, for errors.

    Raises:
        InputError: if there is no such module or file, or it has no such object.
    """
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise InputError(f"{path!r} names no {kind}: give package.module:name or path/to/file.py:name")
    module = _run_file(Path(place), kind) if place.endswith(".py") else _import_module(place, kind)
    if not hasattr(module, name):
        own = [
            n for n, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise InputError(f"{place} has no {kind} {name!r}; it has {', '.join(own) or 'none'}")
    return getattr(module, name)


def _import_module(name: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(f"{name}: no such module, where a {kind} is named") from None
        raise


def _run_file(path: Path, kind: str) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path}: no such {kind} file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)  # as for a script, which may import its neighbors
    spec.loader.exec_module(module)
    return module
