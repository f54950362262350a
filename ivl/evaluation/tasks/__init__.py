"""The tasks by name, gathered from `TASKS` of every file of this folder: a benchmark is one file, or one row of a family's."""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from importlib import import_module

from ivl.errors import InputError, nearest
from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.task import Task
from ivl.evaluation.tasks.own import OwnData
from ivl.utils.imports import import_object

_MODULES = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
TASKS: dict[str, Task] = {task.name: task for module in _MODULES for task in getattr(module, "TASKS", ())}


def find(name: str) -> Task:
    """Return the task of this name, or of a class that is named by FILE.py:Class.

    Raises:
        InputError: naming the nearest task.
    """
    if ":" in name:
        return import_object(name, "task")()
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; {nearest(name, TASKS, 'tasks')}")
    return TASKS[name]


def task_of(config: EvalConfig) -> Task:
    """Return the task that a configuration names, with its prompt, rules and rows.

    Raises:
        InputError: as `find`, and for settings of benchmarks with a task of another kind.
    """
    if config.metric:
        assert config.data is not None, "EvalConfig has checked it"
        return OwnData(config.data, config.metric)
    task, settings = find(config.task), (config.prompt, config.extraction, config.defects, config.data)
    if isinstance(task, Benchmark):
        return replace(task, **dict(zip(("prompt", "profile", "defects", "path"), settings, strict=True)))
    if settings != ("published", "2024-12", False, None):
        raise InputError(
            f"--prompt, --extraction, --defects and --data are for benchmarks of files, and task {task.name} is none"
        )
    return task
