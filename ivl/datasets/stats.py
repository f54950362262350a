"""Counts of a data set, and histograms whose memory does not grow with the data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ivl.types import ImageRef, Record, VideoRef

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass
class Histogram:
    """Counts of numbers >= 0: exact below 256, by their first eight bits above, so that a value is off by less than 1%."""

    counts: Counter[int] = field(default_factory=Counter)
    """Smallest value of each bin -> how many."""
    number: int = 0
    total: int = 0
    most: int = 0

    def add(self, value: int) -> None:
        drop = max(0, value.bit_length() - 8)
        self.counts[value >> drop << drop] += 1
        self.number += 1
        self.total += value
        self.most = max(self.most, value)

    def merge(self, other: Histogram) -> None:
        self.counts.update(other.counts)
        self.number += other.number
        self.total += other.total
        self.most = max(self.most, other.most)

    @property
    def mean(self) -> float:
        return self.total / self.number if self.number else 0.0

    def percentile(self, percent: float) -> int:
        """The smallest value that at least this share of the numbers does not exceed; 100 is the exact largest."""
        if percent >= 100 or not self.number:
            return self.most
        need, seen = percent / 100 * self.number, 0
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= need:
                return value
        return self.most

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": round(self.mean, 2),
            "percentiles": {f"p{percent}": self.percentile(percent) for percent in PERCENTILES},
            "max": self.most,
            "bins": {str(value): self.counts[value] for value in sorted(self.counts)},
        }


@dataclass
class DatasetStats:
    """Totals of one data set; bad rows count in `rows`, `bad` and `kinds` alone. Without a processor no tokens and tiles."""

    name: str
    format: str = ""
    rows: int = 0
    bad: int = 0
    conversations: int = 0
    turns: int = 0
    """Answers of the assistant."""
    images: int = 0
    videos: int = 0
    tokens: int = 0
    tiles: int = 0
    characters: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Bad rows by kind."""
    letters: int = 0
    """Rows whose questions say <image> or <video> and that have no such medium: there it is letters."""
    repeated_ids: int = 0
    """Rows with the id of an earlier row of the data set."""
    notes: list[str] = field(default_factory=list[str])
    """What is no problem, and may be a mistake."""
    tokens_per_sample: Histogram = field(default_factory=Histogram)
    tiles_per_sample: Histogram = field(default_factory=Histogram)
    characters_per_sample: Histogram = field(default_factory=Histogram)
    characters_per_answer: Histogram = field(default_factory=Histogram)
    turns_per_conversation: Histogram = field(default_factory=Histogram)

    def add(self, record: Record, *, size: tuple[int, int] | None = None) -> None:
        """Count one good row; size: tokens and tiles of its sample, if it was encoded."""
        refs, characters = set(), 0
        for conversation in record.conversations:
            answers = [message.text for message in conversation if message.role == "assistant"]
            self.turns += len(answers)
            self.turns_per_conversation.add(len(answers))
            for answer in answers:
                self.characters_per_answer.add(len(answer))
            for message in conversation:
                characters += len(message.text)
                refs.update(part for part in message.content if isinstance(part, ImageRef | VideoRef))
        kinds = {"video" if isinstance(ref, VideoRef) else "image" for ref in refs}
        asked = (message.text for each in record.conversations for message in each if message.role == "user")
        self.letters += not {kind for text in asked for kind in re.findall("<(image|video)>", text)} <= kinds
        self.conversations += len(record.conversations)
        self.images += sum(isinstance(ref, ImageRef) for ref in refs)
        self.videos += sum(isinstance(ref, VideoRef) for ref in refs)
        self.characters += characters
        self.characters_per_sample.add(characters)
        if size is not None:
            tokens, tiles = size
            self.tokens += tokens
            self.tiles += tiles
            self.tokens_per_sample.add(tokens)
            self.tiles_per_sample.add(tiles)

    def merge(self, other: DatasetStats) -> None:
        """Add the counts of another part of the data; the name and the format stay."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, int):
                setattr(self, name, mine + value)
            elif isinstance(value, Histogram):
                mine.merge(value)
            elif isinstance(value, Counter):
                mine.update(value)

    @property
    def encoded(self) -> bool:
        return bool(self.tokens)

    def to_json(self) -> dict[str, Any]:
        """Plain values; tokens and tiles only where rows were encoded."""
        return {
            name: _plain(value)
            for name, value in vars(self).items()
            if self.encoded or not name.startswith(("tokens", "tiles"))
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Histogram):
        return value.to_json()
    return dict(value.most_common()) if isinstance(value, Counter) else value


def total(datasets: Sequence[DatasetStats]) -> DatasetStats:
    """The counts of all data sets together."""
    whole = DatasetStats("total")
    for stats in datasets:
        whole.merge(stats)
    return whole
