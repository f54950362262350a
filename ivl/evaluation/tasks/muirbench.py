"""MuirBench: questions about several pictures, whose marks stand inside the question and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ivl.evaluation.tasks.choice import Choice
from ivl.evaluation.tasks.several_pictures import with_numbers


class MuirBench(Choice):
    """Pictures come first, and each mark in the text becomes the number of its picture."""

    def question(self, row: Mapping[str, Any]) -> str:
        return with_numbers(super().question(row), row, "<Image-{}>")


TASKS = (
    MuirBench(
        name="muirbench", file="MUIRBench", about="12 tasks about several pictures", rows=2600, hub="MUIRBENCH/MUIRBENCH",
        columns={"idx": "index", "task": "category"},
    ),
)  # fmt: skip
