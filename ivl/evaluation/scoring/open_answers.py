"""Answers of a stated kind, and open answers, by the rules of the tools that published figures come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from ivl.evaluation.scoring.metrics import edit_distance
from ivl.evaluation.scoring.options import Options, Profile, infer_option

AnswerKind = Literal["choice", "integer", "float", "list", "text"]
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = tuple(map(re.compile, (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)))  # fmt: skip
"""With commas, scientific, plain."""


def typed_answer(
    text: str, kind: AnswerKind, truth: str, options: Options | None = None, profile: Profile = "2024-12", *,
    texts_never_match: bool = False,
) -> tuple[str | int | float | None, bool]:  # fmt: skip
    """Read a text as a letter, a number or itself, as VLMEvalKit does.

    Args:
        options: Of a choice, whose truth is a letter.
        texts_never_match: Count lists and texts as wrong, as the tool does.

    Returns:
        What was read, and whether it is right. A number or text that is not the truth counts as not read.
    """
    if kind == "choice":
        letter = infer_option(text, options or {}, profile)
        return letter, letter == truth
    read = {"integer": int, "float": float}.get(kind, str.strip)
    try:
        said, right = read(text), read(truth)
    except (ValueError, OverflowError):
        return None, False
    if said != right or (texts_never_match and isinstance(said, str)):
        return None, False
    return said, True


def normalized_answer(text: str, kind: AnswerKind, choices: Sequence[str] = (), precision: float | None = None) -> str | None:
    """Write an extracted answer as the truth is written, to be compared as text (arXiv:2310.02255's own code).

    Args:
        choices: Of a choice, which becomes the text of its letter or the nearest text.
        precision: Decimal places of a float.
    """
    try:
        if kind == "integer":
            return str(int(float(text)))
        if kind == "float":
            return None if precision is None else str(round(float(text), int(precision)))
    except (ValueError, OverflowError):
        return None
    if kind != "choice":
        return text
    text = text.strip()
    if match := re.search(r"\(([a-zA-Z])\)", text):
        text = match[1].upper()
    letters = [chr(ord("A") + n) for n in range(len(choices))]
    if text in letters:
        return choices[letters.index(text)]
    return min(choices, key=lambda choice: edit_distance(text, choice), default=None)


def open_answers(reply: str) -> list[str | float]:
    """Return the texts and numbers that an open reply may mean, without doubles (arXiv:2311.16502's own code)."""
    reply = reply.strip().strip(".").lower()
    *before, last = reply.split("\n")
    tails = [tail for line in before if (tail := _shortest_tail(line, _INDICATORS))]
    tails += [tail] if (tail := _shortest_tail(last, (*_INDICATORS, "="))) else []
    found = tails or [reply]
    numbers = [number for tail in found for pattern in _NUMBERS for number in pattern.findall(tail)]
    return list(dict.fromkeys(form for text in (*found, *numbers) for form in _forms(text)))


def _shortest_tail(line: str, indicators: Iterable[str]) -> str:
    """Return the shortest text behind the last of an indicator; empty for a mark alone."""
    shortest = ""
    for indicator in indicators:
        if indicator in line:
            tail = line.rpartition(indicator)[2].strip()
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
    return "" if shortest in (":", ",", ".", "!", "?", ";", "'") else shortest


def _forms(text: str) -> list[str] | list[float]:
    """Write a number rounded to two places, other text in lower case, and a single character beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_answer_right(reply: str, answers: Sequence[str]) -> bool:
    """Return whether one of the answers is contained in a text that an open reply may mean, or equals such a number."""
    right = [form for answer in answers for form in _forms(answer)]
    return any(
        any(isinstance(form, str) and form in said for form in right) if isinstance(said, str) else said in right
        for said in open_answers(reply)
    )
