"""Scores of short texts from 0 to 1 by official rules, and the interval of a mean score.

The rules are VQAv2's accuracy, ANLS, relaxed accuracy (arXiv:2203.10244), equality and containment. `verification` is more
lenient: it reads units, words for numbers and formulas.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from ivl.errors import InputError
from ivl.evaluation.scoring.spelling import ARTICLES, CARDINALS
from ivl.utils.unicode import normal_form

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(CARDINALS[:11])}
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


def normalize(text: str) -> str:
    """Compose letters with their accents, lower the case, join words with single spaces, and drop a full stop at the end."""
    text = " ".join(normal_form("NFC", text).lower().split())
    return text.removesuffix(".").removesuffix("。").rstrip()


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the normalized prediction is one of the normalized answers."""
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Return DocVQA's normalized Levenshtein similarity to the nearest answer; 0 if it lies below the threshold.

    As on its server, white space is collapsed before texts are compared, and their lengths are those before.
    """
    said, *texts = (" ".join(text.lower().split()) for text in (prediction, *answers))
    lengths = [max(len(prediction.upper()), len(answer.upper())) or 1 for answer in answers]
    best = 1 - min(edit_distance(said, text) / length for text, length in zip(texts, lengths, strict=True))
    return best if best >= threshold else 0.0


def edit_distance(a: str, b: str) -> int:
    """Count the insertions, deletions and substitutions of characters that turn a into b.

    Raises:
        InputError: if rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise InputError('edit distances need rapidfuzz; install it with `pip install "ivl[eval]"`') from None
    return Levenshtein.distance(a, b)


def without_punctuation(text: str, *, older: bool = False) -> str:
    """Delete marks or put spaces for them, as VQAv2 does.

    A mark is deleted everywhere if it stands beside a space anywhere, or if the text has a comma between digits.

    Args:
        older: Delete full stops behind digits, too, as VLMEvalKit did in 2024-12 and InternVL's own code does.
    """
    commas, cleaned = re.search(r"\d,\d", text), text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if commas or beside_space else " ")
    # The official code passes a flag where the count goes, so that only 32 full stops fall.
    return re.sub(r"\.(?!\d)" if older else r"(?<!\d)\.(?!\d)", "", cleaned, count=32)


def vqa_form(text: str, *, older: bool = False, reference: bool = False) -> str:
    """Normalize an answer as VQAv2 does: marks, lower case, digits for words up to ten, no articles, apostrophes.

    Args:
        older: As VLMEvalKit did in 2024-12: `5.` is 5.
        reference: As InternVL's own code, which does the same, but first drops commas and question marks and splits off 's.
    """
    if reference:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip(), older=older or reference)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_SPELLED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(reply: str, answers: Sequence[str], *, older: bool = False, reference: bool = False) -> float:
    """Return VQAv2's agreement with ten people after normalization; a single answer is matched by none other, so it gives 0."""
    said, *meant = (vqa_form(text, older=older, reference=reference) for text in (reply, *answers))
    return agreement(said, meant)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Return VQAv2's agreement with people: min(1, matches / 3), averaged over leaving out each of the answers in turn.

    Texts are compared as they are. A single answer is left out, so it gives 0.
    """
    matches = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def relaxed(reply: str, truth: str, tolerance: float = 0.05, *, of_reply: bool = False) -> bool:
    """Return whether a number lies within the tolerance of a truth other than 0, or the lower-cased texts are equal.

    Args:
        of_reply: Measure by the reply, as InternVL's own code does and VLMEvalKit did in 2024-12.
    """
    reply = reply.strip()
    given, expected = (_number(text) for text in ((truth, reply) if of_reply else (reply, truth)))
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


def wilson(total: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's interval (95% by default) of a proportion: total successes in n trials.

    For partial scores from 0 to 1 it is wider than needed, never narrower: no variance exceeds that of yes and no.

    Raises:
        ValueError: if n is 0 or total lies outside 0..n.
    """
    if n < 1 or not -1e-9 <= total <= n + 1e-9:
        raise ValueError(f"need 0 <= total <= n and n >= 1, got total {total} and n {n}")
    p, spread = total / n, z * z / n
    center = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(max(0.0, p * (1 - p)) / n + spread / (4 * n))
    return max(0.0, center - half), min(1.0, center + half)


def summary(scores: Sequence[float]) -> dict[str, Any]:
    """Return the mean score with its 95% interval."""
    total, n = float(sum(scores)), len(scores)
    return {"value": total / n, "ci95": list(wilson(total, n)), "n": n}
