"""What an evaluation needs: a task that asks and scores, and something that answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ivl.types import Conversation, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Example:
    id: str
    """Unique within the task, and the same on every run."""
    conversation: Conversation
    answers: tuple[str, ...]
    group: str = ""
    """Reported separately, such as a question type."""


class Task(Protocol):
    name: str
    metric: str
    params: SamplingParams

    def examples(self) -> Iterable[Example]: ...

    def score(self, prediction: str, answers: tuple[str, ...]) -> float:
        """From 0 to 1; the metric is the mean over examples."""
        ...
