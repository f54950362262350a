"""The tasks by name."""

from __future__ import annotations

from ivl.errors import InputError, nearest
from ivl.evaluation.task import Task
from ivl.evaluation.tasks.easy_vqa import SHORT_ANSWER, EasyVQA

TASKS: dict[str, tuple[Task, str]] = {
    task.name: (task, text)
    for task, text in (
        (EasyVQA("easy-vqa"), "one-word questions about a coloured shape, as `make quickstart` trains them"),
        (EasyVQA("easy-vqa-short", SHORT_ANSWER), "the same, asking for a short answer: for models not trained on it"),
    )
}


def find(name: str) -> Task:
    """Return the task of this name.

    Raises:
        InputError: naming the nearest task.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; {nearest(name, TASKS, 'tasks')}")
    return TASKS[name][0]
