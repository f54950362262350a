"""What an evaluation needs: a task that asks and scores, and something that answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ivl.errors import InputError
from ivl.evaluation.scoring import Style
from ivl.evaluation.voting import Select
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


@dataclass(frozen=True, kw_only=True)
class Method:
    """How often a question is asked, and which of the replies counts. The default is one reply, scored as it is."""

    style: Style = "direct"
    """How a reply shows its answer; only the answer is scored."""
    instruct: bool = False
    """Ask for that style; a model that was trained to reason so needs no asking."""
    samples: int = 1
    select: Select = "vote"
    likelihood: bool = False
    """Note the log-probability of replies also where it does not choose."""
    judge: str = ""
    """Who rates replies, so that predictions of another judge are told apart."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"need at least 1 reply to each question, got {self.samples}")
