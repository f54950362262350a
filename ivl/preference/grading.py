"""Reads the answer of a reply and decides whether it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ivl.evaluation.scoring import compare, extract, fix_answer
from ivl.preference.questions import QuestionSource


@dataclass(frozen=True)
class Grade:
    """A reply with its answer.

    The text of a right reply has the answer in the form of the known one where it contained that.
    """

    text: str
    answer: str | None
    correct: bool | None
    """None where there is no answer to compare; `problem` then says why."""
    problem: str = ""
    """Why there is no answer, or which comparison of formulas was stopped and counts as different."""


def grade(text: str, finish_reason: str, answers: Sequence[str], source: QuestionSource) -> Grade:
    """Grade one reply by the accepted answers."""
    if finish_reason == "length":
        return Grade(text, None, None, "cut off at the limit")
    extracted = extract(text, source.style)
    if extracted.answer is None:
        return Grade(text, None, None, extracted.problem or "no answer")
    verdict = compare(extracted.answer, answers, mode=source.mode)
    fix = verdict.correct and source.style != "direct"
    fixed = fix_answer(text, extracted.answer, answers[0]) if fix else text
    return Grade(fixed, extracted.answer, verdict.correct, verdict.stopped)
