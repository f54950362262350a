"""The tasks by name, gathered from `TASKS` of every file of this folder: a benchmark is one file, or one row of a family's."""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from ivl.errors import InputError, nearest, short
from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.task import Task
from ivl.evaluation.tasks.own import OwnData
from ivl.utils.imports import import_object

_MODULES = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
DEFAULT = EvalConfig()
TASKS: dict[str, Task] = {task.name: task for module in _MODULES for task in getattr(module, "TASKS", ())}


def find(name: str) -> Task:
    """Return the task of this name, or of a class that is named by FILE.py:Class.

    Raises:
        InputError: naming the nearest task.
    """
    if ":" in name:
        found = import_object(name, "task")
        if not (isinstance(found, type) and issubclass(found, Task)):
            raise InputError(f"{name} must be a class that derives from ivl.evaluation.task.Task, got {short(found)}")
        return found()
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; {nearest(name, TASKS, 'tasks')}")
    return TASKS[name]


def task_of(config: EvalConfig) -> Task:
    """Return the task that a configuration names, with its prompt, rules and rows.

    Raises:
        InputError: as `find`, and for settings of benchmarks with a task of another kind.
    """
    if config.metric:
        return OwnData(config.data, config.metric, config.task_name, config.val_share, config.root)
    task = find(config.task)
    if isinstance(task, Benchmark):
        frames = task.frames if config.frames is None else config.frames
        if frames < 0 or bool(frames) != bool(task.frames):
            raise InputError(f"--frames is for benchmarks of videos, at least 1; got {config.frames} for {task.name}")
        return replace(
            task, prompt=config.prompt, profile=config.extraction, defects=config.defects, frames=frames,
            path=Path(config.data[0]) if config.data else None,
        )  # fmt: skip
    for name in ("prompt", "extraction", "defects", "frames", "data"):
        if getattr(config, name) != getattr(DEFAULT, name):
            remedy = "; name a benchmark by --task, or a metric for rows of your own by --metric" if name == "data" else ""
            raise InputError(f"--{name} is for benchmarks of files, and task {task.name} is none{remedy}")
    return task
