"""Several replies to a question, the choice among them by vote, likelihood or a judge, and the curve over their number.

    sample -> candidates of each question -> vote or best_of -> the index of the chosen one

Works with any generator: n replies are n requests with seeds of their own.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from ivl.errors import InputError, short
from ivl.evaluation.scoring import AnswerStyle, extract, normalize, summary
from ivl.evaluation.scoring.spelling import wording
from ivl.generators import Generator, ReplyLike, answers_of, replies_of
from ivl.types import Conversation, Grammar, Message, SamplingParams, Text

Select = Literal["vote", "likelihood", "judge"]
RATING = SamplingParams(max_new_tokens=8)
GUIDED_RATING = replace(RATING, guide=Grammar("choice", json.dumps([str(n) for n in range(11)])))
"""For judges whose replies can be constrained: each reply is a rating."""
MOST_SUBSETS, FEWEST_SUBSETS, CHOICES = 200, 10, 100_000
"""Random subsets of the replies to a question; over all questions about so many choices."""
_RATING = re.compile(r"(?<![\d.,])(?:10|\d)(?:\.\d+)?(?![\d%]|[.,]\d)")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of several replies to a question."""

    text: str
    answer: str | None
    """None where the reply gives no answer."""
    likelihood: float | None = None
    """Mean log-probability of a token, if it was asked for."""
    rating: float | None = None
    """The judge's rating, if there is a judge."""


@dataclass(frozen=True)
class RatingJudge:
    """Another model that rates replies from 0 to 10, seeing the conversation with its images."""

    generator: Generator
    params: SamplingParams = RATING
    name: str = ""

    def rate(self, pairs: Sequence[tuple[Conversation, str]]) -> list[float | None]:
        """Return the ratings of replies; None where the judge's own reply has no number from 0 to 10."""
        asked = [judged(conversation, text) for conversation, text in pairs]
        return [rating_of(text) for text in answers_of(self.generator, asked, self.params)]


@dataclass(frozen=True)
class RewardModel:
    """Another model that runs here, such as one trained on preferences.

    It rates a reply by the mean log-probability per token under the model.
    """

    generator: Generator
    name: str = ""

    def rate(self, pairs: Sequence[tuple[Conversation, str]]) -> list[float | None]:
        """Return the likelihood of replies; None for an empty one.

        A grammar that allows one reply only makes the engine write it with its scores.
        """
        nonempty = [(conversation, text) for conversation, text in pairs if text]
        guides = [Grammar("choice", json.dumps([text], ensure_ascii=False)) for _, text in nonempty]
        params = [
            SamplingParams(max_new_tokens=len(text.encode()) + 1, guide=guide, logprobs=0)
            for (_, text), guide in zip(nonempty, guides, strict=True)
        ]
        replies = iter(replies_of(self.generator, [conversation for conversation, _ in nonempty], params))
        return [mean_logprob(next(replies)) if text else None for _, text in pairs]


Rater = RatingJudge | RewardModel | Callable[[Conversation, str], float | None]
"""A model, or a function of a conversation and a reply."""


def sample(
    generator: Generator,
    conversations: Sequence[Conversation],
    params: SamplingParams | Sequence[SamplingParams],
    count: int,
    *,
    style: AnswerStyle = "direct",
    likelihood: bool = False,
) -> list[list[Candidate]]:
    """Ask for `count` replies to each conversation. The engine computes a prompt once for all its replies.

    Args:
        params: One for all, or one per conversation. Reply k has the seed k above that of params, so a larger count begins
            with the same replies.
        style: How a reply shows its answer. A reply in a reasoning style that was cut off at the limit has none.
        likelihood: Note the log-probabilities of replies.

    Raises:
        InputError: if the generator gives no log-probabilities that are asked for, or if several replies are asked for at
            temperature 0, where all are the same.
    """
    params = [params] * len(conversations) if isinstance(params, SamplingParams) else params
    if count < 1:
        raise InputError(f"need at least 1 reply to each question, got {count}")
    if count > 1 and any(p.temperature == 0 for p in params):
        raise InputError(f"at temperature 0 all {count} replies are the same: raise the temperature")
    seeded = [
        replace(p, seed=None if p.seed is None else p.seed + k, logprobs=(p.logprobs or 0) if likelihood else p.logprobs)
        for p in params
        for k in range(count)
    ]
    replies = replies_of(generator, [c for c in conversations for _ in range(count)], seeded)
    candidates = [
        Candidate(
            text=reply.text,
            answer=None if style != "direct" and reply.finish_reason == "length" else extract(reply.text, style).answer,
            likelihood=mean_logprob(reply) if likelihood else None,
        )
        for reply in replies
    ]
    return [candidates[at : at + count] for at in range(0, len(candidates), count)]


def mean_logprob(reply: ReplyLike) -> float:
    """Return the mean log-probability of a reply's tokens, its end included, by the model's own scores.

    Raises:
        InputError: if the reply does not carry log-probabilities.
    """
    logprobs = [token.logprob for token in getattr(reply, "logprobs", ())]
    if not logprobs or not math.isfinite(mean := sum(logprobs) / len(logprobs)):
        problem = "log-probabilities that are no numbers" if logprobs else "no log-probabilities"
        raise InputError(f"the replies carry {problem}; choose by vote or judge, or use a model that runs here")
    return mean


def vote(candidates: Sequence[Candidate]) -> int:
    """Return the index of the answer that most replies give; of several, the first (self-consistency, arXiv:2203.11171).

    Answers of the same wording (`two dogs.` and `2 dogs`) count as one. Without any answer the first reply counts.
    """
    keys = [None if candidate.answer is None else _key(candidate.answer) for candidate in candidates]
    votes = Counter(key for key in keys if key is not None)
    return keys.index(votes.most_common(1)[0][0]) if votes else 0


@lru_cache(1 << 16)
def _key(answer: str) -> str:
    return wording(answer) or normalize(answer)  # the choice A is an article, too


def best_of(candidates: Sequence[Candidate], by: Literal["likelihood", "judge"]) -> int:
    """Return the index of the reply that scores highest; of several, the first.

    Replies without an answer, or without a rating, are taken only if there are no others.
    """

    scores = [candidate.likelihood if by == "likelihood" else candidate.rating for candidate in candidates]
    ranks = [
        (candidate.answer is not None, -math.inf if score is None else score)
        for candidate, score in zip(candidates, scores, strict=True)
    ]
    return ranks.index(max(ranks))


def choose(candidates: Sequence[Candidate], select: Select | None) -> int:
    """Return the index of the reply that counts; the first without a way to select."""
    if select is None:
        return 0
    return vote(candidates) if select == "vote" else best_of(candidates, select)


def rate(
    rater: Rater, conversations: Sequence[Conversation], candidates: Sequence[Sequence[Candidate]]
) -> list[list[Candidate]]:
    """Return the candidates with their ratings. Equal replies to a question are rated once.

    Raises:
        InputError: if a judge returns something else than a number or None.
    """
    pairs = {
        (number, candidate.text): conversation
        for number, (conversation, replies) in enumerate(zip(conversations, candidates, strict=True))
        for candidate in replies
    }
    rated = [(conversation, text) for (_, text), conversation in pairs.items()]
    model = isinstance(rater, RatingJudge | RewardModel)
    scores = rater.rate(rated) if model else [rater(*pair) for pair in rated]  # type: ignore[operator]
    for score, (_, text) in zip(scores, rated, strict=True):
        if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
            raise InputError(f"a judge must return a number or None, got {short(score)} for the reply {short(text)}")
    ratings = dict(zip(pairs, scores, strict=True))
    return [[replace(c, rating=ratings[number, c.text]) for c in replies] for number, replies in enumerate(candidates)]


def judged(conversation: Conversation, reply: str) -> Conversation:
    """Write the request to a judge: the last question with its images, the reply, and the wish for a number."""
    question = conversation[-1]
    request = (
        "\n\nA reply to the above:\n"
        f"{reply.strip()}\n\n"
        "How likely is it that the reply's final answer is right? Rate it from 0 (surely wrong) to 10 (surely right). "
        "Say the number alone."
    )
    return (*conversation[:-1], Message("user", (*question.content, Text(request))))


def rating_of(text: str) -> float | None:
    """Return the first number from 0 to 10 of a judge's reply."""
    return next((float(match[0]) for match in _RATING.finditer(text) if float(match[0]) <= 10), None)


Candidates = Sequence[Sequence[Candidate]]
"""The replies to each question."""


def curve(samples: Candidates, scores: Sequence[Sequence[float]], select: Select | None) -> list[dict[str, Any]]:
    """Return the summary of the reply that is selected from 1, 2, 4, ... and all replies."""
    return [{"samples": size, **summary(means.tolist())} for size, means in by_size(samples, scores, select).items()]


def by_size(samples: Candidates, scores: Sequence[Sequence[float]], select: Select | None) -> dict[int, np.ndarray]:
    """Return, for 1, 2, 4, ... and all replies, each question's expected score [Q] over random subsets of its replies."""
    most, subsets = min(map(len, samples)), min(MOST_SUBSETS, max(FEWEST_SUBSETS, CHOICES // len(samples)))
    sizes = sorted({2**k for k in range(most.bit_length())} | {most})
    questions = list(zip(samples, scores, strict=True))
    return {size: np.array([_expected(*question, size, select, subsets) for question in questions]) for size in sizes}


def _expected(
    candidates: Sequence[Candidate], scores: Sequence[float], size: int, select: Select | None, subsets: int
) -> float:
    if size == 1:
        return float(np.mean(scores))
    if size == len(candidates) or min(scores) == max(scores):
        return scores[choose(candidates, select)]
    rng, total = np.random.default_rng(size), 0.0
    for _ in range(subsets):
        subset = rng.permutation(len(candidates))[:size]
        total += scores[subset[choose([candidates[at] for at in subset], select)]]
    return total / subsets


def draw(axes: Any, points: Sequence[dict[str, Any]], label: str, color: str | None = None) -> None:
    """Draw a line with its interval as a band on matplotlib axes."""
    sizes, values = [p["samples"] for p in points], [100 * p["value"] for p in points]
    (line,) = axes.plot(sizes, values, "o-", label=label, color=color)
    low, high = ([100 * p["ci95"][side] for p in points] for side in (0, 1))
    axes.fill_between(sizes, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="replies to a question", ylabel="right, %")
