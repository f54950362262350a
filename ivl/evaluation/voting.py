"""More than one reply to a question, and which of them to take: majority voting, or the best by likelihood or by a judge.

    sample -> candidates of each question -> vote or best_of -> the index of the one to take

Folds over `generate` of any BatchGenerator: n replies are n requests with seeds of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from ivl.errors import InputError
from ivl.evaluation.scoring import Style, extract, normalize
from ivl.evaluation.scoring.spelling import wording
from ivl.generators import Generator, ReplyLike, answers_of, replies_of
from ivl.types import Conversation, Grammar, Message, SamplingParams, Text

Select = Literal["vote", "likelihood", "judge"]
RATING = SamplingParams(max_new_tokens=8)
GUIDED_RATING = replace(RATING, guide=Grammar("choice", json.dumps([str(n) for n in range(11)])))
"""For judges whose replies can be constrained: a rating is always found."""
_RATING = re.compile(r"(?<![\d.,])(?:10|\d)(?:\.\d+)?(?![\d%]|[.,]\d)")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of several replies. answer is None where the reply gives none; likelihood is its mean log-probability per token and
    rating that of a judge, both only if asked for."""

    text: str
    answer: str | None
    likelihood: float | None = None
    rating: float | None = None


@dataclass(frozen=True, kw_only=True)
class Vote:
    index: int
    """The first reply that gives the winning answer; 0 if none gives any."""
    votes: int
    """Replies that give it."""
    abstained: int
    """Replies without an answer."""


@dataclass(frozen=True)
class Judge:
    """Another model that rates replies from 0 to 10, seeing the conversation with its images."""

    generator: Generator
    params: SamplingParams = RATING


@dataclass(frozen=True)
class Reader:
    """Another model that runs here and rates a reply by the mean log-probability per token that it gives it itself, such as one
    trained on preferences."""

    generator: Generator


Rater = Judge | Reader | Callable[[Conversation, str], float]
"""A model, or a function of a conversation and a reply."""


def sample(
    generator: Generator,
    conversations: Sequence[Conversation],
    params: SamplingParams | Sequence[SamplingParams],
    count: int,
    *,
    style: Style = "direct",
    likelihood: bool = False,
) -> list[list[Candidate]]:
    """`count` replies to each conversation; reply k has the seed k above that of params, so more replies begin with the same.

    params: one for all, or one per conversation. The engine computes a prompt once for all its replies.
    style: how a reply shows its answer. A reply in a reasoning style that was cut off at the limit has none.

    Raises:
        InputError: if log-probabilities are wanted of a generator that does not tell them; if several replies are wanted
            at temperature 0, where all are the same.
    """
    each = [params] * len(conversations) if isinstance(params, SamplingParams) else list(params)
    if count < 1:
        raise InputError(f"need at least 1 reply to each question, got {count}")
    if count > 1 and any(p.temperature == 0 for p in each):
        raise InputError(f"at temperature 0 all {count} replies are the same: raise the temperature")
    every = [
        replace(p, seed=None if p.seed is None else p.seed + k, logprobs=(p.logprobs or 0) if likelihood else p.logprobs)
        for p in each
        for k in range(count)
    ]
    replies = replies_of(generator, [c for c in conversations for _ in range(count)], every)
    found = [_candidate(reply, style, likelihood) for reply in replies]
    return [found[at : at + count] for at in range(0, len(found), count)]


def _candidate(reply: ReplyLike, style: Style, likelihood: bool) -> Candidate:
    cut = style != "direct" and reply.finish_reason == "length"
    answer = None if cut else extract(reply.text, style).answer
    return Candidate(text=reply.text, answer=answer, likelihood=mean_logprob(reply) if likelihood else None)


def mean_logprob(reply: ReplyLike) -> float:
    """Mean log-probability of a reply's tokens, its end included, by the model's own scores.

    Raises:
        InputError: if the reply does not carry them.
    """
    found = [token.logprob for token in getattr(reply, "logprobs", ())]
    if not found:
        raise InputError("the replies carry no log-probabilities; choose by vote or judge, or use a model that runs here")
    return sum(found) / len(found)


def vote(candidates: Sequence[Candidate], same: Callable[[str, str], bool] | None = None) -> Vote:
    """The answer that most replies give; of several, the one that came first (self-consistency, arXiv 2203.11171).

    Answers count as one if they have the same wording (`two dogs.` and `2 dogs`), or by `same`, such as
    `ivl.evaluation.scoring.correct`.
    """
    first: dict[str, int] = {}
    votes: dict[str, int] = {}
    for index, candidate in enumerate(candidates):
        if candidate.answer is None:
            continue
        key = _key(candidate.answer)
        if key not in first and same is not None:
            key = next((known for known, at in first.items() if same(candidate.answer, candidates[at].answer or "")), key)
        first.setdefault(key, index)
        votes[key] = votes.get(key, 0) + 1
    abstained = sum(candidate.answer is None for candidate in candidates)
    if not votes:
        return Vote(index=0, votes=0, abstained=abstained)
    winner = max(votes, key=lambda key: (votes[key], -first[key]))
    return Vote(index=first[winner], votes=votes[winner], abstained=abstained)


@lru_cache(1 << 16)
def _key(answer: str) -> str:
    return wording(answer) or normalize(answer)  # the choice A is an article, too


def best_of(candidates: Sequence[Candidate], by: Literal["likelihood", "judge"]) -> int:
    """The index of the reply that scores highest; of several, the first. Replies without an answer, or that the judge gave no
    rating, are taken only if there are no others."""

    def rank(index: int) -> tuple[bool, float, int]:
        candidate = candidates[index]
        score = candidate.likelihood if by == "likelihood" else candidate.rating
        return candidate.answer is not None, float("-inf") if score is None else score, -index

    return max(range(len(candidates)), key=rank)


def choose(candidates: Sequence[Candidate], select: Select) -> int:
    """The index of the reply to take."""
    return vote(candidates).index if select == "vote" else best_of(candidates, select)


def rate(
    judge: Rater, conversations: Sequence[Conversation], candidates: Sequence[Sequence[Candidate]]
) -> list[list[Candidate]]:
    """The candidates with their ratings; None where a judge's reply has no number from 0 to 10, or a reader has nothing to
    read. Equal replies to a question are rated once."""
    pairs = {
        (number, candidate.text): conversation
        for number, (conversation, some) in enumerate(zip(conversations, candidates, strict=True))
        for candidate in some
    }
    ratings = dict(zip(pairs, _ratings(judge, [(c, text) for (_, text), c in pairs.items()]), strict=True))
    return [[replace(c, rating=ratings[number, c.text]) for c in some] for number, some in enumerate(candidates)]


def _ratings(judge: Rater, pairs: list[tuple[Conversation, str]]) -> list[float | None]:
    if isinstance(judge, Reader):
        return _read(judge.generator, pairs)
    if not isinstance(judge, Judge):
        return [float(judge(conversation, text)) for conversation, text in pairs]
    said = answers_of(judge.generator, [judged(conversation, text) for conversation, text in pairs], judge.params)
    return [rating_of(text) for text in said]


def _read(generator: Generator, pairs: list[tuple[Conversation, str]]) -> list[float | None]:
    """A guide that allows one reply only makes the engine say it, and tell how likely it was. An empty reply has no rating."""
    said = [(conversation, text) for conversation, text in pairs if text]
    params = [
        SamplingParams(
            max_new_tokens=len(text.encode()) + 1, guide=Grammar("choice", json.dumps([text], ensure_ascii=False)), logprobs=0
        )
        for _, text in said
    ]
    replies = iter(replies_of(generator, [conversation for conversation, _ in said], params))
    return [mean_logprob(next(replies)) if text else None for _, text in pairs]


def judged(conversation: Conversation, reply: str) -> Conversation:
    """What a judge is asked: the last question with its images, the reply, and for a number."""
    question = conversation[-1]
    request = (
        "\n\nA reply to the above:\n"
        f"{reply.strip()}\n\n"
        "How likely is it that the reply's final answer is right? Rate it from 0 (surely wrong) to 10 (surely right). "
        "Say the number alone."
    )
    return (*conversation[:-1], Message("user", (*question.content, Text(request))))


def rating_of(text: str) -> float | None:
    """The first number from 0 to 10 of a judge's reply."""
    return next((float(match[0]) for match in _RATING.finditer(text) if float(match[0]) <= 10), None)
