"""One reply in the making, and what is left of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from ivl.errors import InputError
from ivl.inference.prompt import NamedPrompt
from ivl.inference.sampling import Sampler
from ivl.inference.text import TextStream
from ivl.model.cache import CachedSequence
from ivl.types import FinishReason, TextDelta, TokenLogprob


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of one request. Requests of one step share its time: each carries the whole."""

    prepare: float
    """Reading and tiling media, rendering, tokenising."""
    queue: float
    """Waiting for room, or for another request that computes the same prompt."""
    vision: float
    """Encoding tiles; 0 when they were known."""
    prefill: float
    """The forward calls over the prompt."""
    decode: float
    """From the first token to the last."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished reply. tokens are all sampled ones, the end token included; text excludes it and any stop string."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    num_cached: int
    """Prompt tokens found in the cache."""
    tiles: int
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each token, if asked for."""


@dataclass(eq=False)
class Request:
    """One reply in the making. Its owner drains `deltas`; the engine appends to them."""

    prompt: NamedPrompt
    tiles: dict[bytes, torch.Tensor]
    """Tiles by key; dropped once the prompt is read, as they are large."""
    limit: int
    """New tokens at most: what was asked, or what the context has left."""
    blocks: int
    """Cache blocks that the longest possible reply needs."""
    whole: bool
    """The prompt cannot be read in pieces, nor shared."""
    sampler: Sampler
    text: TextStream
    prepare: float
    sequence: CachedSequence = field(default_factory=CachedSequence)
    tokens: list[int] = field(default_factory=list)
    deltas: deque[TextDelta] = field(default_factory=deque)
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    failure: InputError | None = None
    """Why the engine cancelled it, if that was the model's fault."""
    num_cached: int = 0
    encoded: dict[bytes, torch.Tensor] = field(default_factory=dict)
    """Vision tokens of tiles that are about to be read, whatever the encoder forgets."""
    num_named: int = 0
    """Blocks that are known by name, and the name of the last of them."""
    name: bytes = b""
    added_at: float = 0.0
    queue: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def num_prompt(self) -> int:
        return len(self.prompt.tokens_T)

    @property
    def num_tiles(self) -> int:
        return self.prompt.num_tiles

    @property
    def reading(self) -> bool:
        """Whether some of the prompt is yet to be computed."""
        return self.sequence.length < self.num_prompt

    def tokens_at(self, start: int, stop: int) -> list[int]:
        """Tokens of prompt and reply between two positions."""
        n = self.num_prompt
        return self.prompt.tokens_T[start:stop].tolist() + self.tokens[max(0, start - n) : max(0, stop - n)]

    def reply(self) -> Reply:
        """The finished reply; `deltas` must not have been consumed."""
        assert self.finish_reason is not None
        return Reply(
            text="".join(delta.text for delta in self.deltas),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason,
            prompt_tokens=self.num_prompt,
            num_cached=self.num_cached,
            tiles=self.num_tiles,
            timings=self.timings(),
            logprobs=tuple(delta.logprob for delta in self.deltas if delta.logprob is not None),
        )

    def timings(self) -> Timings:
        decode = self.last_token_at - self.first_token_at
        return Timings(prepare=self.prepare, queue=self.queue, vision=self.vision, prefill=self.prefill, decode=decode)
