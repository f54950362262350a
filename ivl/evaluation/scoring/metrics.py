"""The metrics of benchmarks for predicted texts and boxes, and the interval of a mean score.

Every text score takes a prediction and the accepted answers and returns a value from 0 to 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ivl.errors import InputError
from ivl.evaluation.scoring.spelling import ARTICLES, CONTRACTIONS, NUMBER_WORDS

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2."""


def normalise(text: str) -> str:
    """Lower case, single spaces, none around it, and without one trailing period."""
    text = " ".join(text.lower().split())
    return text.removesuffix(".").rstrip()


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised prediction is one of the normalised answers."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """Numbers may be off by a share of the answer, other answers must match exactly (ChartQA). `12%` is read as 0.12."""
    return float(any(_relaxed(prediction, answer, tolerance) for answer in answers))


def _relaxed(prediction: str, answer: str, tolerance: float) -> bool:
    number, expected = _number(prediction), _number(answer)
    if number is None or expected is None:
        return normalise(prediction) == normalise(answer)
    return abs(number - expected) <= tolerance * abs(expected)


def _number(text: str) -> float | None:
    text = normalise(text)
    digits, scale = (text[:-1], 0.01) if text.endswith("%") else (text, 1.0)
    try:
        value = float(digits) * scale
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer; 0 from a relative distance of threshold on (DocVQA)."""
    return max(_similarity(prediction, answer, threshold) for answer in answers)


def _similarity(prediction: str, answer: str, threshold: float) -> float:
    prediction, answer = (" ".join(text.lower().split()) for text in (prediction, answer))
    longest = max(len(prediction), len(answer))
    distance = edit_distance(prediction, answer) / longest if longest else 0.0
    return 1 - distance if distance < threshold else 0.0


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that turn a into b.

    Raises:
        InputError: if rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise InputError('edit distances need rapidfuzz; install it with `pip install "ivl[eval]"`') from None
    return Levenshtein.distance(a, b)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with people: min(1, matches / 3), averaged over leaving out each of the answers in turn (VQAv2).

    A single answer has nobody to leave out and must match.
    """
    return agreement(_vqa_form(prediction), [_vqa_form(answer) for answer in answers])


def agreement(said: str, answers: Sequence[str]) -> float:
    """VQA accuracy of texts that are in their final form."""
    matches = [answer == said for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def _vqa_form(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes restored, punctuation removed except within numbers."""
    text = " ".join(text.lower().split())
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", " ", text)
    words = ["zero" if word == "none" else word for word in text.split() if word not in ARTICLES]
    words = [str(NUMBER_WORDS.get(word, word)) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def choice_letter(prediction: str, choices: Sequence[str]) -> str | None:
    """The letter (A, B, ...) that a reply chooses among the given option texts, None if it cannot be told.

    Read in this order: a boxed letter or one after "answer", the last of them; a letter that begins the reply; a letter
    in brackets; an option's own text. Several different letters in brackets tell nothing.
    """
    letters = "".join(chr(ord("A") + n) for n in range(len(choices)))
    text = prediction.strip()
    named = re.findall(rf"(?:boxed\{{|\banswer(?:\s+is)?\s*:?\s*)[*\s]*\(?([{letters}])\b", text, flags=re.IGNORECASE)
    if named:
        return named[-1].upper()
    bracketed = set(re.findall(rf"\(([{letters}])\)", text))
    if len(bracketed) > 1:
        return None
    if begins := re.match(rf"\(?([{letters}])(?:[).:,]|$|\s*\n)", text):
        return begins.group(1)
    if bracketed:
        return bracketed.pop()
    same = [letter for letter, choice in zip(letters, choices, strict=True) if normalise(choice) == normalise(text)]
    return same[0] if len(same) == 1 else None


def iou(a: Box, b: Box) -> float:
    """Area of the overlap of two boxes over the area of their union; 0 for boxes without area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0.0, width) * max(0.0, height)
    union = _area(a) + _area(b) - overlap
    return overlap / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def wilson(total: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval (95% by default) of a proportion: total successes in n trials.

    For partial scores from 0 to 1 it is wider than needed, never narrower: no variance exceeds that of yes and no.

    Raises:
        ValueError: if n is 0 or total lies outside 0..n.
    """
    if n < 1 or not -1e-9 <= total <= n + 1e-9:
        raise ValueError(f"need 0 <= total <= n and n >= 1, got total {total} and n {n}")
    p, spread = total / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(max(0.0, p * (1 - p)) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)
