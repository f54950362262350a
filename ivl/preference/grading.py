"""One reply -> the answer it gives, and whether it is right (spec 6.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ivl import scoring
from ivl.preference.questions import Source

ACCEPT = 0.9
"""A reply is right if its answer scores more."""
MARKER = re.compile(r"(?:final answer|最终答案|答案)\s*[:：]", re.IGNORECASE)


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
    answer, problem = final_answer(text) if source.style == "final_answer" else (text.strip(), "")
    if problem or not answer:
        return Grade(text, None, None, problem or "no answer")
    return Grade(text, answer, max(scoring.exact_match(answer, [truth]) for truth in answers) > ACCEPT)


def final_answer(text: str) -> tuple[str | None, str]:
    """The text after the last marker, or why there is none."""
    marks = list(MARKER.finditer(text))
    if not marks:
        return None, "no final answer"
    if len(marks) > 2:
        return None, "more than two final answers"
    reasoning, answer = text[: marks[-1].start()].strip(), text[marks[-1].end() :].strip()
    if text.count("\n") < 2 or not reasoning:
        return None, "no reasoning"
    if "\n" in answer:
        return None, "an answer of several lines"
    return answer, ""
