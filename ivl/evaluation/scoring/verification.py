"""Whether an answer is right, by the kind of question it answers (spec 6.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from ivl.errors import InputError
from ivl.evaluation.scoring.choices import same_choice, same_text, split_option
from ivl.evaluation.scoring.dates import same_day, same_time
from ivl.evaluation.scoring.lists import same_items
from ivl.evaluation.scoring.metrics import agreement, anls, exact_match, normalise
from ivl.evaluation.scoring.quantities import quantities, same_quantity
from ivl.evaluation.scoring.spelling import bare, wording
from ivl.evaluation.scoring.symbolic import same_formula

Mode = Literal["exact", "choice", "number", "relaxed", "anls", "vqa", "math", "date", "list", "geometry", "mavis", "auto"]
ACCEPT = 0.9
"""A reply is right if its score is above this (spec 6.1)."""
MOST_CHARACTERS = 1000
"""Beyond, texts are compared as texts only: nothing longer is a number, a choice or a formula."""
FEWEST_PEOPLE = 10
"""So many answers are those of people who were asked, and agreement with them counts; fewer are alternatives."""

_BY_NAME: tuple[tuple[str, Mode], ...] = (
    ("chartqa", "relaxed"), ("docvqa", "anls"), ("infographic", "anls"), ("infovqa", "anls"), ("sroie", "geometry"),
    ("clevr", "geometry"), ("geo", "geometry"), ("unigeo", "geometry"), ("mavis", "mavis"),
)  # fmt: skip

Judge = Callable[[str, str, Sequence[str]], bool | None]
"""Prediction, truth and options -> right, wrong, or None: not for this judge to say."""


def mode_for(dataset: str) -> Mode:
    """The mode of a data set, by its name (spec 6.1); auto for names that are not known."""
    name = dataset.lower()
    for part, mode in _BY_NAME:
        if part in name:
            return mode
    return "auto"


def verify(prediction: str, truth: str | Sequence[str], *, mode: Mode = "auto", choices: Sequence[str] = ()) -> float:
    """The score of an answer from 0 to 1; it is right above ACCEPT. An empty answer scores 0.

    truth: the answer, or accepted answers, of which the best match counts; in mode vqa ten or more are the answers of people.
    mode: exact, choice, number (units converted, 0.1%), relaxed (5%, years exact), anls, vqa, math (math-verify), date, list;
        or for a family of data sets the judges of several in turn, the first that knows deciding: geometry (choice, relaxed,
        vqa, math), mavis (choice, number, vqa, math), auto (choice, date, number, list, vqa, math).
    choices: the texts of options A, B, ..., where they are known.

    Raises:
        InputError: for an unknown mode, no truth, or without the library that the mode needs.
    """
    if mode not in get_args(Mode):
        raise InputError(f"mode {mode!r} is not one of {', '.join(get_args(Mode))}")
    truths = [truth] if isinstance(truth, str) else list(truth)
    if not truths:
        raise InputError("no truth to compare with; give at least one accepted answer")
    if not prediction.strip():
        return 0.0
    if mode == "vqa" and len(truths) >= FEWEST_PEOPLE:
        said = wording(prediction)
        return agreement(said, [wording(each) for each in truths]) if said else 0.0
    return max(_score(prediction, each, mode, choices) for each in truths)


def correct(prediction: str, truth: str | Sequence[str], *, mode: Mode = "auto", choices: Sequence[str] = ()) -> bool:
    """Whether `verify` scores above ACCEPT."""
    return verify(prediction, truth, mode=mode, choices=choices) > ACCEPT


def _score(prediction: str, truth: str, mode: Mode, choices: Sequence[str]) -> float:
    if not truth.strip():
        return 0.0
    if prediction == truth:
        return 1.0
    if mode == "exact":
        return exact_match(prediction, [truth]) if normalise(prediction) else 0.0
    if max(len(prediction), len(truth)) > MOST_CHARACTERS:
        return float(_long(prediction, truth))
    if mode == "anls":
        return anls(prediction, [truth])
    for judge in _JUDGES[mode]:
        if (verdict := judge(prediction, truth, choices)) is not None:
            return float(verdict)
    return 0.0


def _long(prediction: str, truth: str) -> bool:
    return normalise(prediction) == normalise(truth)


def _choice(prediction: str, truth: str, choices: Sequence[str]) -> bool | None:
    return same_choice(prediction, truth, choices)


def _named_option(prediction: str, truth: str, choices: Sequence[str]) -> bool | None:
    """`B. 5` where the truth is 5."""
    option = split_option(prediction)
    return same_text(option[1], truth) or None if option and option[1] else None


def _number(prediction: str, truth: str, choices: Sequence[str]) -> bool | None:
    return same_quantity(*both) if (both := quantities(prediction, truth)) else None


def _relaxed(prediction: str, truth: str, choices: Sequence[str]) -> bool | None:
    return same_quantity(*both, tolerance=0.05, relaxed=True) if (both := quantities(prediction, truth)) else None


def _relaxed_items(prediction: str, truth: str, choices: Sequence[str]) -> bool | None:
    return same_items(prediction, truth, lambda a, b: found if (found := _relaxed(a, b, ())) is not None else same_text(a, b))


def _items(prediction: str, truth: str, choices: Sequence[str]) -> bool | None:
    return same_items(prediction, truth, same_text)


def _date(prediction: str, truth: str, choices: Sequence[str]) -> bool | None:
    day = same_day(prediction, truth)
    return same_time(prediction, truth) if day is None else day


def _words(prediction: str, truth: str, choices: Sequence[str]) -> bool | None:
    """Right or not to say: the same thing may be written as a formula."""
    said, meant = wording(prediction), wording(truth)
    return (bool(said) and said == meant) or None


def _yes_or_no(prediction: str, truth: str, choices: Sequence[str]) -> bool | None:
    """`Yes, it is.` for yes, unless the sentence goes on to the contrary."""
    meant = bare(truth).lower()
    found = re.match(r"(yes|no)[,.;] ?(.*)", bare(prediction).lower())
    if meant not in ("yes", "no") or not found:
        return None
    other = {"yes": r"\b(?:no|not|never)\b|n't\b", "no": r"\byes\b"}[found[1]]
    return found[1] == meant and not re.search(other, found[2])


def _formula(prediction: str, truth: str, choices: Sequence[str]) -> bool | None:
    return same_formula(prediction, truth)


_VQA: tuple[Judge, ...] = (_words,)
_TEXT: tuple[Judge, ...] = (_words, _yes_or_no)
_JUDGES: dict[Mode, tuple[Judge, ...]] = {
    "choice": (_choice, *_TEXT),
    "number": (_number, _words),
    "relaxed": (_relaxed, _relaxed_items, *_TEXT),
    "vqa": _VQA,
    "math": (_number, _items, _words, _formula),
    "date": (_date, _words),
    "list": (_items, _words),
    "geometry": (_choice, _relaxed, *_TEXT, _named_option, _formula),
    "mavis": (_choice, _number, *_TEXT, _named_option, _formula),
    "auto": (_choice, _date, _number, _items, *_TEXT, _named_option, _formula),
}
