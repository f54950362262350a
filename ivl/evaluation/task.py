"""The protocol of a benchmark: a task gives examples and scores replies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ivl.types import Conversation, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its accepted answers."""

    id: str
    """Unique within the task, and the same on every run."""
    conversation: Conversation
    answers: tuple[str, ...]
    group: str = ""
    """Reported separately, such as a kind of question."""


class Task(Protocol):
    """A benchmark. `params` are the sampling parameters that it is usually run with."""

    name: str
    metric: str
    params: SamplingParams

    def examples(self) -> Iterable[Example]:
        """Yield the examples, in the same order on every run."""
        ...

    def score(self, prediction: str, answers: tuple[str, ...]) -> float:
        """Score a reply from 0 to 1; the metric is the mean over examples."""
        ...
