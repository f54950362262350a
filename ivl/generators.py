"""What filters, evaluation and preference see of any engine, local or remote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from ivl.types import Conversation, SamplingParams, TextDelta


class Generator(Protocol):
    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]: ...


class HasText(Protocol):
    @property
    def text(self) -> str: ...


@runtime_checkable
class BatchGenerator(Protocol):
    """A Generator that answers many conversations at once, faster than one after another."""

    def generate(
        self, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams]
    ) -> Sequence[HasText]: ...


def answers_of(
    generator: Generator, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams]
) -> list[str]:
    """The reply to each conversation, in order; at once if the generator can. params: one for all, or one per conversation."""
    if isinstance(generator, BatchGenerator):
        return [reply.text for reply in generator.generate(conversations, params)]
    each = [params] * len(conversations) if isinstance(params, SamplingParams) else params
    return ["".join(d.text for d in generator.stream(c, p)) for c, p in zip(conversations, each, strict=True)]
