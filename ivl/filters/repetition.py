"""Repetition without a model: repeated n-grams, loops of any period, and compression.

The reference code has a check of 10-grams alone, with a limit of 0.4, which it leaves switched off.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ivl.filters.rules import FilterVerdict
from ivl.filters.text import reply_texts
from ivl.types import Record

_EAST = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_EAST}]|(?:(?![{_EAST}])[^\W_]){{1,40}}|[^\w\s]|_")
"""A word, a character of a script without spaces, or a punctuation mark."""
_NO_WORDS = re.compile(r"https?://\S+|<box>[^<]*</box>")
_TABLE_ROW = re.compile(r"^[ \t]*\|[^\n]*\|[ \t]*$", re.MULTILINE)
_LONG = re.compile(rf"[^\s{_EAST}\u2500-\u259f]{{40,}}")
"""A long stretch without a space."""
_PERIODS = 6
"""Number of the commonest distances between equal n-grams that are tried as the period of a loop."""
_MISMATCH = 1.6
"""How much a token that breaks a loop takes away from its length; about every fourth word of a loop may differ."""


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Replies that repeat themselves. The score is the worst measure in units of its limit; a row above 1 is dropped.

    Lists, tables, code and verses with a refrain stay below the limits: numbers and punctuation weigh little, and a loop must
    come round several times.
    """

    limit: ClassVar[float] = 1.0
    ngram: int = 10
    max_ngrams: float = 0.4
    """Share of n-grams that came before in the same reply."""
    min_loop_words: float = 14.0
    """Repeated words (or Chinese characters) that make a loop; a number counts 0.2, a punctuation mark 0.05."""
    min_rounds: float = 3.0
    """How often the loop must come round in all."""
    min_area: float = 100.0
    """Least product of the two, so that a loop of few rounds must be long."""
    max_compression: float = 8.0
    """Characters per byte of zlib, for replies of 400 bytes and more."""

    def __post_init__(self) -> None:
        if self.ngram < 2:
            raise ValueError(f"ngram must be >= 2, got {self.ngram}")
        if not 0 < self.max_ngrams < 1:
            raise ValueError(f"max_ngrams must be between 0 and 1, got {self.max_ngrams}")

    def __call__(self, record: Record) -> FilterVerdict:
        measures = [measure for reply in reply_texts(record) for measure in self.measures(reply)]
        score, reason = max(measures, default=(0.0, ""))
        return FilterVerdict(score <= 1, reason if score > 1 else "", score)

    def measures(self, text: str) -> list[tuple[float, str]]:
        """Return each measure of one reply in units of its limit, with the reason that it gives when it exceeds 1."""
        found = []
        plain = _NO_WORDS.sub(" ", text)
        ids, weights = _numbered(_TOKEN.findall(plain.casefold()))
        if len(ids) >= 2 * self.ngram:
            found.append((_share_seen(ids, weights, self.ngram) / self.max_ngrams, f"repeated {self.ngram}-grams"))
        # The rows of a table may differ in little. Equal rows are found by their n-grams.
        untabled = _TABLE_ROW.sub("", plain)
        if len(untabled) < len(plain):
            ids, weights = _numbered(_TOKEN.findall(untabled.casefold()))
        found.append((self._loop(ids, weights), "loop of words"))
        if long := _LONG.findall(plain):
            found.append((self._loop(*_characters(long)), "loop of characters"))
        data = text.encode("utf-8", "replace")
        if len(data) >= 400:
            found.append((len(data) / len(zlib.compress(data, 6)) / self.max_compression, "compresses too well"))
        return found

    def _loop(self, ids: np.ndarray, weights: np.ndarray) -> float:
        """Return the size of the best loop in units of the limits: its repeated words, its rounds, and their product.

        For one period, tokens that equal the token one period before gain their weight, the others lose; the loop is the
        stretch of the greatest sum (Kadane's algorithm).
        """
        best = 0.0
        for period in _periods(ids):
            same = ids[period:] == ids[:-period]
            gain = np.where(same, weights[period:], -_MISMATCH * np.maximum(weights[period:], 0.5))
            total = np.concatenate(([0.0], np.cumsum(gain)))
            low = np.minimum.accumulate(total)
            end = int(np.argmax(total - low))
            start = int(np.flatnonzero(total[: end + 1] == low[end])[-1])
            words = float(total[end] - low[end])
            rounds = 1 + (end - start) / period
            best = max(best, min(words / self.min_loop_words, rounds / self.min_rounds, words * rounds / self.min_area))
        return best


def _characters(long: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Number the characters of stretches. A unique number ends each."""
    ids, weights = _numbered([char for stretch in long for char in stretch])
    ends = np.cumsum([len(stretch) for stretch in long], dtype=np.int64)
    return np.insert(ids, ends, -1 - np.arange(len(long))), np.insert(weights * 0.4, ends, 10.0)


def _numbered(tokens: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Give equal tokens equal numbers, and each token its weight."""
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(token, len(numbers)) for token in tokens], dtype=np.int64)
    each = np.array([1.0 if any(map(str.isalpha, token)) else 0.2 if token.isdigit() else 0.05 for token in numbers])
    return ids, each[ids] if tokens else np.zeros(0)


def _ngrams(ids: np.ndarray, n: int) -> np.ndarray:
    """Hash each n-gram to 64 bits by a fixed polynomial."""
    size = max(0, len(ids) - n + 1)
    hashed = np.zeros(size, dtype=np.uint64)
    for k in range(n):
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + (ids[k : k + size].astype(np.uint64) + np.uint64(1))
        hashed ^= hashed >> np.uint64(29)
    return hashed


def _share_seen(ids: np.ndarray, weights: np.ndarray, n: int) -> float:
    """Return the share of n-grams that came before, among those that are words by half or more."""
    total = np.concatenate(([0.0], np.cumsum(weights)))
    ngrams = _ngrams(ids, n)[total[n:] - total[:-n] >= n / 2]
    return 1 - len(np.unique(ngrams)) / len(ngrams) if len(ngrams) > n else 0.0


def _periods(ids: np.ndarray) -> list[int]:
    """Return the commonest distances between an n-gram and its last occurrence, for n of 2, 4 and 8."""
    found: list[int] = []
    for n in (2, 4, 8):
        grams = _ngrams(ids, n)
        order = np.argsort(grams, kind="stable")
        again = grams[order[1:]] == grams[order[:-1]]
        if not again.any():  # so that no longer one comes again
            break
        distances, counts = np.unique((order[1:] - order[:-1])[again], return_counts=True)
        ranked = np.lexsort((distances, -counts))[:_PERIODS]
        found += [int(d) for d in distances[ranked] if d not in found]
    return found
