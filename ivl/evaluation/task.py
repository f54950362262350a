"""The protocol of a benchmark: a task gives examples and scores replies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ivl.errors import InputError, short
from ivl.types import Conversation, Message, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its accepted answers."""

    id: str
    """Unique within the task, and the same on every run."""
    conversation: Conversation
    answers: tuple[str, ...]
    group: str = ""
    """Reported separately, such as a kind of question."""

    def __post_init__(self) -> None:
        turns = isinstance(self.conversation, tuple) and all(isinstance(turn, Message) for turn in self.conversation)
        texts = isinstance(self.answers, tuple) and all(isinstance(text, str) for text in (*self.answers, self.id, self.group))
        if not (turns and texts and self.id and self.conversation):
            raise InputError(f"an example needs texts, a tuple of Message and a tuple of answers, got {short(self, 300)}")


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
