"""Decides whether an answer is right, by the kind of question it answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ivl.errors import InputError
from ivl.evaluation.scoring.choices import same_choice, same_text, split_option
from ivl.evaluation.scoring.formulas import same_formula
from ivl.evaluation.scoring.metrics import agreement, anls, exact_match, normalize
from ivl.evaluation.scoring.numbers import quantities, same_quantity
from ivl.evaluation.scoring.spelling import bare, wording
from ivl.utils.killable import CallStopped
from ivl.utils.unicode import normal_form

AnswerMode = Literal["exact", "choice", "number", "relaxed", "anls", "vqa", "math", "geometry", "mavis", "auto"]
ACCEPT = 0.9
"""A reply is right if its score is above this."""
MOST_CHARACTERS = 1000
"""Longer texts are compared as texts only: nothing longer is a number, a choice or a formula."""
FEWEST_PEOPLE = 10
"""So many answers are those of people who were asked, and agreement with them counts; fewer are alternatives."""

_BY_NAME: tuple[tuple[str, AnswerMode], ...] = (
    ("chartqa", "relaxed"), ("docvqa", "anls"), ("infographic", "anls"), ("infovqa", "anls"), ("sroie", "geometry"),
    ("clevr", "geometry"), ("geo", "geometry"), ("mavis", "mavis"), ("", "auto"),
)  # fmt: skip


@dataclass(frozen=True)
class AnswerVerdict:
    """The score of an answer; `stopped` says that a comparison of formulas met a limit, so that the score is 0 by default."""

    score: float
    stopped: str = ""

    @property
    def correct(self) -> bool:
        """Whether the answer is right."""
        return self.score > ACCEPT


_AnswerRule = Callable[[str, str, Sequence[str]], bool | None]
"""Prediction, truth and the texts of the options -> right, wrong, or None where the rule does not apply."""


def mode_for(dataset: str) -> AnswerMode:
    """Return the mode of a data set by its name; auto for unknown names."""
    return next(mode for part, mode in _BY_NAME if part in dataset.lower())


def compare(
    prediction: str, truth: str | Sequence[str], *, mode: AnswerMode = "auto", choices: Sequence[str] = ()
) -> AnswerVerdict:
    """Score an answer from 0 to 1. An empty answer scores 0.

    Args:
        truth: The answer, or accepted answers, of which the best match counts; in mode vqa ten or more are people's.
        mode: exact, choice, number (units converted, 0.1%), relaxed (5%, years exact), anls, vqa, math (math-verify); or the
            rules of several in turn for a family of data sets, the first that applies deciding: geometry (choice, relaxed,
            vqa, math), mavis (choice, number, vqa, math), auto (as mavis).
        choices: The texts of options A, B, ..., where they are known.

    Raises:
        InputError: for an unknown mode, no truth, or without the library that the mode needs.
    """
    if mode not in get_args(AnswerMode):
        raise InputError(f"mode {mode!r} is not one of {', '.join(get_args(AnswerMode))}")
    truths = [truth] if isinstance(truth, str) else list(truth)
    if not truths:
        raise InputError("no truth to compare with; give at least one accepted answer")
    if not prediction.strip():
        return AnswerVerdict(0.0)
    if mode == "vqa" and len(truths) >= FEWEST_PEOPLE:
        words = wording(prediction)
        return AnswerVerdict(agreement(words, [wording(answer) for answer in truths]) if words else 0.0)
    verdicts = [_verdict(prediction, answer, choices, mode) for answer in truths]
    best = max(verdict.score for verdict in verdicts)
    return AnswerVerdict(best, "" if best > ACCEPT else next((v.stopped for v in verdicts if v.stopped), ""))


def _verdict(prediction: str, truth: str, choices: Sequence[str], mode: AnswerMode) -> AnswerVerdict:
    if not truth.strip():
        return AnswerVerdict(0.0)
    if prediction == truth:
        return AnswerVerdict(1.0)
    if mode == "exact":
        return AnswerVerdict(exact_match(prediction, [truth]) if normalize(prediction) else 0.0)
    if max(len(prediction), len(truth)) > MOST_CHARACTERS:
        return AnswerVerdict(float(normalize(prediction) == normalize(truth)))
    if mode == "anls":
        return AnswerVerdict(anls(normal_form("NFC", prediction), [normal_form("NFC", truth)]))
    try:
        decisions = (rule(prediction, truth, choices) for rule in _RULES[mode])
        return AnswerVerdict(float(next((decision for decision in decisions if decision is not None), False)))
    except CallStopped as stopped:
        return AnswerVerdict(0.0, str(stopped))


def _named_option(prediction: str, truth: str, _: Sequence[str]) -> bool | None:
    """`B. 5` where the truth is 5."""
    option = split_option(prediction)
    return same_text(option[1], truth) or None if option and option[1] else None


def _numbers(**how: Any) -> _AnswerRule:
    return lambda prediction, truth, _: same_quantity(*both, **how) if (both := quantities(prediction, truth)) else None


def _words(prediction: str, truth: str, _: Sequence[str]) -> bool | None:
    """Decides for right only: the same thing may be written as a formula."""
    words = wording(prediction)
    return (bool(words) and words == wording(truth)) or None


def _yes_or_no(prediction: str, truth: str, _: Sequence[str]) -> bool | None:
    """`Yes, it is.` for yes, unless the sentence goes on to the contrary."""
    expected = bare(truth).lower()
    match = re.match(r"(yes|no)[,.;] ?(.*)", bare(prediction).lower())
    if expected not in ("yes", "no") or not match:
        return None
    other = {"yes": r"\b(?:no|not|never)\b|n't\b", "no": r"\byes\b"}[match[1]]
    return match[1] == expected and not re.search(other, match[2])


def _formula(prediction: str, truth: str, _: Sequence[str]) -> bool | None:
    return same_formula(prediction, truth)


_number, _relaxed = _numbers(), _numbers(tolerance=0.05, relaxed=True)
_ANY_KIND = (same_choice, _number, _words, _yes_or_no, _named_option, _formula)
_RULES: dict[AnswerMode, tuple[_AnswerRule, ...]] = {
    "choice": (same_choice, _words, _yes_or_no),
    "number": (_number, _words),
    "relaxed": (_relaxed, _words, _yes_or_no),
    "vqa": (_words,),
    "math": (_number, _words, _formula),
    "geometry": (same_choice, _relaxed, _words, _yes_or_no, _named_option, _formula),
    "mavis": _ANY_KIND,
    "auto": _ANY_KIND,
}
