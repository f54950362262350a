"""CRPE: objects and their relations, every question in four rotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.figures import Figures, all_right
from ivl.evaluation.task import Example, Score, Scored

ROTATIONS = 4


class Crpe(Benchmark):
    """The share of questions whose rotations are all right."""

    def cluster(self, row: Mapping[str, Any]) -> str:
        return f"question {int(row['index']) // ROTATIONS}"

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (str(row["answer"]),)

    def grade(self, text: str, example: Example) -> Score:
        """Compare the letter, or look for the text of the answer."""
        return Score(value=float(names_answer(text, example.answers[0], cut=4 if self.defects else 3)), answer=text.strip())

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Return all questions and each category."""
        groups = {"total": scored, **self.grouped(scored)}
        return {name: all_right(rows, lambda s: s.cluster) for name, rows in groups.items()}


def names_answer(reply: str, answer: str, *, cut: int = 3) -> bool:
    """Return whether a reply begins with the answer's letter, or has no capital A to D first and contains its text.

    Args:
        cut: Characters of the letter before the text. The tool cuts four, and so the first of the text.
    """
    if len(reply) == 1 or reply[:1] in tuple("ABCD"):
        return reply[:1] == answer[:1]
    return bool(reply) and answer[cut:].lower() in reply.lower()


TASKS = tuple(
    Crpe(
        name=f"crpe-{kind}", file=f"CRPE_{kind.upper()}", about=about, md5=md5, categories=("category",), reduced=True,
    )
    for kind, about, md5 in (
        ("exist", "whether objects are there", "315584e23ac1ff7f8719ed3b7ad90f08"),
        ("relation", "subjects, predicates and objects of relations", "bad7094cde0b572288f4b119c2d0c656"),
    )
)  # fmt: skip
