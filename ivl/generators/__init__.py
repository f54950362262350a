"""What filters, evaluation and preference see of any engine, local or remote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ivl.errors import InputError
from ivl.types import Conversation, FinishReason, SamplingParams, TextDelta


class Refused(InputError):
    """The engine will not answer this one conversation; others may fare better. What to do is a policy of the caller."""


class Generator(Protocol):
    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]: ...


class ReplyLike(Protocol):
    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> FinishReason: ...


@runtime_checkable
class BatchGenerator(Protocol):
    """A Generator that answers many conversations at once, faster than one after another."""

    def generate(
        self, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams]
    ) -> Sequence[ReplyLike]: ...


@dataclass(frozen=True)
class PlainReply:
    text: str
    finish_reason: FinishReason


def replies_of(
    generator: Generator, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams]
) -> Sequence[ReplyLike]:
    """The reply to each conversation, in order; at once if the generator can. params: one for all, or one per conversation."""
    if isinstance(generator, BatchGenerator):
        return generator.generate(conversations, params)
    each = [params] * len(conversations) if isinstance(params, SamplingParams) else params
    return [_joined(generator.stream(c, p)) for c, p in zip(conversations, each, strict=True)]


def answers_of(
    generator: Generator, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams]
) -> list[str]:
    """The texts of replies_of."""
    return [reply.text for reply in replies_of(generator, conversations, params)]


def _joined(deltas: Iterator[TextDelta]) -> PlainReply:
    texts: list[str] = []
    reason: FinishReason = "stop"
    for delta in deltas:
        texts.append(delta.text)
        reason = delta.finish_reason or reason
    return PlainReply("".join(texts), reason)
