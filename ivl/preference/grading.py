"""One reply -> the answer it gives, and whether it is right (spec 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ivl.preference.questions import Source
from ivl.scoring.extraction import extract
from ivl.scoring.metrics import exact_match

ACCEPT = 0.9
"""A reply is right if its answer scores more."""


@dataclass(frozen=True)
class Grade:
    """correct is None where there is no answer to compare; problem then says why."""

    text: str
    answer: str | None
    correct: bool | None
    problem: str = ""


def grade(text: str, finish_reason: str, answers: Sequence[str], source: Source) -> Grade:
    if finish_reason == "length":
        return Grade(text, None, None, "cut off at the limit")
    found = extract(text, source.style)
    if found.answer is None:
        return Grade(text, None, None, found.problem or "no answer")
    return Grade(text, found.answer, max(exact_match(found.answer, [truth]) for truth in answers) > ACCEPT)
