"""Scores of predicted texts, and the interval of a mean score.

Each score takes a prediction and the accepted answers and returns a value from 0 to 1.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from ivl.errors import InputError


def normalize(text: str) -> str:
    """Compose letters with their accents, lower the case, join words with single spaces, and drop a full stop at the end."""
    text = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return text.removesuffix(".").removesuffix("。").rstrip()


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the normalized prediction is one of the normalized answers."""
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Return DocVQA's normalized Levenshtein similarity to the nearest answer; 0 if it lies below the threshold.

    As on its server, white space is collapsed before texts are compared, and their lengths are those before.
    """
    distances = [
        edit_distance(_collapsed(prediction), _collapsed(answer)) / (max(len(prediction.upper()), len(answer.upper())) or 1)
        for answer in answers
    ]
    best = 1 - min(distances)
    return best if best >= threshold else 0.0


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())


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


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Return VQAv2's agreement with people: min(1, matches / 3), averaged over leaving out each of the answers in turn.

    Texts are compared as they are. A single answer is left out, so it gives 0.
    """
    matches = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


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
