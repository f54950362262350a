"""Scores of short answers from 0 to 1, by official rules: VQAv2's, relaxed accuracy (arXiv:2203.10244), equality, containment.

`ivl.evaluation.scoring.verification` is more lenient: it reads units, words for numbers and formulas.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ivl.evaluation.scoring.metrics import agreement

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_COUNTED.split())}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've
"""
_SPELLED = {word[: at.start()] + word[at.end() :]: word for word in _CONTRACTIONS.split() for at in re.finditer("'", word)}
_SPELLED["somebody'd"] = "somebodyd"
"""Contractions by their spelling without one of the apostrophes, and the official table's one entry that is reversed."""


def without_punctuation(text: str) -> str:
    """Delete marks or put spaces for them, as VQAv2 does.

    A mark is deleted everywhere if it stands beside a space anywhere, or if the text has a comma between digits.
    """
    commas, cleaned = re.search(r"\d,\d", text), text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if commas or beside_space else " ")
    # The official code passes a flag where the count goes, so that only 32 full stops fall.
    return re.sub(r"\.(?!\d)", "", cleaned, count=32)


def vqa_form(text: str, *, reference: bool = False) -> str:
    """Normalize an answer as VQAv2 does: marks, lower case, digits for words up to ten, no articles, apostrophes.

    Args:
        reference: As InternVL's own code, which first drops commas and question marks and splits off 's.
    """
    if reference:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_SPELLED.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(reply: str, answers: Sequence[str], *, reference: bool = False) -> float:
    """Return VQAv2's agreement with ten people after normalization; a single answer is matched by none other, so it gives 0."""
    return agreement(vqa_form(reply, reference=reference), [vqa_form(answer, reference=reference) for answer in answers])


def relaxed(reply: str, truth: str, tolerance: float = 0.05) -> bool:
    """Return whether a number lies within the tolerance of a truth other than 0, or the lower-cased texts are equal.

    InternVL's own code takes the tolerance of the reply: swap the arguments for that.
    """
    reply = reply.strip()
    given, expected = _number(reply), _number(truth)
    if given is not None and expected:
        return abs(given - expected) / abs(expected) <= tolerance
    return reply.lower() == truth.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def equals_any(reply: str, answers: Sequence[str]) -> bool:
    """Return whether the lower-cased reply is one of the answers."""
    return reply.strip().lower() in [answer.strip().lower() for answer in answers]


def contains_any(reply: str, answers: Sequence[str], *, formula: bool = False, empty_as: str = "") -> bool:
    """Return whether a reply contains one of the answers, lower-cased.

    Args:
        formula: Compare without spaces, and with case.
        empty_as: What stands for an empty reply. VLMEvalKit reads "nan" back from its own file.
    """

    def form(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    return any(form(answer) in form(reply or empty_as) for answer in answers)
