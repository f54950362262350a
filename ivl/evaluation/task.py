"""What an evaluation needs: a task that asks and scores, and something that answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ivl.types import Conversation, Generator, SamplingParams


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


class HasText(Protocol):
    @property
    def text(self) -> str: ...


@runtime_checkable
class BatchGenerator(Protocol):
    """A Generator that answers many conversations at once, faster than one after another."""

    def generate(self, conversations: Sequence[Conversation], params: SamplingParams) -> Sequence[HasText]: ...


def answers_of(generator: Generator, conversations: Sequence[Conversation], params: SamplingParams) -> list[str]:
    """The reply to each conversation, in batches if the generator can."""
    if isinstance(generator, BatchGenerator):
        return [reply.text for reply in generator.generate(conversations, params)]
    return ["".join(delta.text for delta in generator.stream(c, params)) for c in conversations]
