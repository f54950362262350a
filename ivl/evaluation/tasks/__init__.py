"""The tasks by name."""

from __future__ import annotations

import difflib

from ivl.errors import InputError
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
    """The task of that name.

    Raises:
        InputError: suggesting near names.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"tasks are {', '.join(TASKS)}"
        raise InputError(f"unknown task {name!r}; {hint}")
    return TASKS[name][0]
