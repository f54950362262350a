"""CRPE: objects and their relations, every question in four rotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.figures import Figure, all_right
from ivl.evaluation.task import Example, Score, Scored


class Crpe(Benchmark):
    """The share of questions whose four rotations are all right."""

    def cluster(self, row: Mapping[str, Any]) -> str:
        return f"question {int(row['index']) // 4}"

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Compare the letter, or look for the text of the answer."""
        return Score(value=float(names_answer(text, example.truth, cut=4 if self.defects else 3)), answer=text.strip())

    def figure(self, scored: Sequence[Scored]) -> Figure:
        return all_right(scored, lambda s: s.cluster)


def names_answer(reply: str, answer: str, *, cut: int = 3) -> bool:
    """Return whether a reply begins with the answer's letter, or has no capital A to D first and contains its text.

    Args:
        cut: Characters of the letter before the text. The tool cuts four, and so the first of the text.
    """
    if len(reply) == 1 or reply[:1] in tuple("ABCD"):
        return reply[:1] == answer[:1]
    return bool(reply) and answer[cut:].lower() in reply.lower()


TASKS = (
    Crpe(
        name="crpe-exist", file="CRPE_EXIST", about="whether objects are there", md5="315584e23ac1ff7f8719ed3b7ad90f08",
        categories=("category",), reduced=True,
    ),
    Crpe(
        name="crpe-relation", file="CRPE_RELATION", about="subjects, predicates and objects of relations",
        md5="bad7094cde0b572288f4b119c2d0c656", categories=("category",), reduced=True,
    ),
)  # fmt: skip
