"""MuirBench: questions about several pictures, whose marks stand inside the question and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ivl.evaluation.data import PICTURES
from ivl.evaluation.tasks.choice import Choice


class MuirBench(Choice):
    """Pictures come first, and each mark in the text becomes the number of its picture."""

    def question(self, row: Mapping[str, Any]) -> str:
        text, pictures = super().question(row), len(row.get(PICTURES, ()))
        text = text.replace(" ".join(["<image>"] * pictures), "")  # marks of all pictures in a row say nothing
        for number in range(1, pictures + 1):
            text = text.replace("<image>", f"<Image-{number}>", 1)
        return text


TASKS = (
    MuirBench(
        name="muirbench", file="MUIRBench", about="12 tasks about several pictures", rows=2600, hub="MUIRBENCH/MUIRBENCH",
        columns={"idx": "index", "task": "category"},
    ),
)  # fmt: skip
