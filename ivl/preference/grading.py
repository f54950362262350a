"""One reply -> the answer it gives, and whether it is right (spec 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ivl.evaluation.scoring import ACCEPT, extract, fix_answer, verify
from ivl.preference.questions import Source


@dataclass(frozen=True)
class Grade:
    """correct is None where there is no answer to compare; problem then says why. The text of a right reply has the answer in
    the form of the known one where it contained that."""

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
    correct = verify(found.answer, list(answers), mode=source.mode) > ACCEPT
    fixed = fix_answer(text, found.answer, answers[0]) if correct and source.style != "direct" else text
    return Grade(fixed, found.answer, correct)
