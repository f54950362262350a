"""The protocol of a benchmark: a task gives examples, scores replies, and turns scores into figures.

examples -> replies -> score(reply, example) -> figures(scored)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ivl.errors import InputError, short
from ivl.evaluation.figures import Figures, mean
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
    row: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The whole row of the data without its pictures: options, category, precision, split."""
    cluster: str = ""
    """Examples that depend on one another, such as the rotations of one question, have the same: a limit keeps them together
    and an interval draws them together. Empty stands for the example alone."""

    @property
    def unit(self) -> str:
        """What a limit keeps together and an interval draws: the cluster, or the example alone."""
        return self.cluster or self.id

    @property
    def truth(self) -> str:
        """The first accepted answer; empty where it is hidden."""
        return self.answers[0] if self.answers else ""

    def __post_init__(self) -> None:
        turns = isinstance(self.conversation, tuple) and all(isinstance(turn, Message) for turn in self.conversation)
        names = (self.id, self.group, self.cluster)
        texts = isinstance(self.answers, tuple) and all(isinstance(text, str) for text in (*self.answers, *names))
        if not (turns and texts and self.id and self.conversation and isinstance(self.row, Mapping)):
            raise InputError(f"an example needs texts, a tuple of Message and a tuple of answers, got {short(self, 300)}")


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one reply is worth."""

    value: float = 0.0
    """1 is right; ratings have a scale of their own. Where a judge must decide, the value without its decision."""
    answer: str = ""
    """What the extractor read in the reply: a letter, Yes, a number, a box."""
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])
    """Further numbers by name."""
    undecided: JudgeQuestion | None = None
    """The rule cannot decide; a judge can."""


@dataclass(frozen=True, kw_only=True)
class JudgeQuestion:
    """What a judge is asked about a reply."""

    prompt: str
    read: Callable[[str], Score | None]
    """Turns the judge's words into a score, which may ask a further question; None for words that cannot be used, so that the
    judge is asked again."""
    best: Score
    """The score if the judge decides for the reply. Without a decision the result is a range that ends here."""
    tries: int = 5
    warmer: float = 0.5
    """Temperature that every try adds to the first, which is greedy."""
    max_new_tokens: int = 2048
    official: str = ""
    """What the official tool does after the last try, where that is not to count the reply as wrong."""


@dataclass(frozen=True)
class Scored:
    """An example and the score of its reply."""

    example: Example
    score: Score

    def __getitem__(self, column: str) -> Any:
        return self.example.row.get(column, "")

    @property
    def cluster(self) -> str:
        """The unit that an interval draws."""
        return self.example.unit


class Task:
    """A benchmark. Derive from it; `name`, `examples` and `score` are what a task must have."""

    name: str
    metric: str = "score"
    params: SamplingParams = SamplingParams()
    """The sampling parameters that it is usually run with."""
    about: str = ""
    """One line for `ivl eval --list`."""

    def examples(self) -> Iterable[Example]:
        """Yield the examples, in the same order on every run."""
        raise NotImplementedError

    def score(self, reply: str, example: Example) -> Score | float:
        """Score a reply; a plain number from 0 to 1 will do."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return what a report notes about the task, such as the prompt, the rules of extraction and the file of the data."""
        return {}

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Turn scores into figures by name, the headline first. By default the mean of all questions and of each group."""
        groups = sorted({s.example.group for s in scored})
        return {"all": mean(scored), **{group: mean([s for s in scored if s.example.group == group]) for group in groups}}


def score_of(task: Task, answer: str | None, example: Example) -> Score:
    """Score an answer by the task's rule; a reply without an answer is wrong.

    Raises:
        InputError: if the task gives something else than a score.
    """
    score = Score() if answer is None else task.score(answer, example)
    if isinstance(score, int | float) and 0 <= score <= 1:
        return Score(value=float(score))
    if not isinstance(score, Score) or not all(map(math.isfinite, (score.value, *score.numbers.values()))):
        raise InputError(f"the score of {example.id} must be a Score or a number from 0 to 1, got {short(score)}")
    return score


def limited(examples: Iterable[Example], limit: int | None) -> list[Example]:
    """Return the first examples, as many whole clusters as the limit holds, and at least one."""
    examples = iter(examples)
    first = list(islice(examples, limit))
    if limit is None or not any(example.cluster for example in first):
        return first
    every, total = [*first, *examples], 0
    kept: set[str] = set()
    for unit, size in Counter(example.unit for example in every).items():
        if (total := total + size) > limit and kept:
            break
        kept.add(unit)
    return [example for example in every if example.unit in kept]
