"""A request: what was asked, how much of it the cache holds, its clocks, and its reply so far."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from ivl.config import ModelConfig
from ivl.inference.sampling import SampledToken, Sampler
from ivl.inference.text import TextStream
from ivl.model.cache import CachedSequence
from ivl.types import FinishReason, Prompt, TextDelta, TokenLogprob


class HashedPrompt:
    """A prompt with a prefix hash per block, for prefix caching. Never changed, so several requests may share one.

    A block's hash covers everything up to its end: token ids, and for placeholders the content of their tile and their
    position in its run. The last block may be short.
    """

    def __init__(
        self, prompt: Prompt, tile_hashes: list[bytes], config: ModelConfig, block_size: int | None, salt: bytes = b""
    ) -> None:
        """Hash a prompt.

        Args:
            tile_hashes: The hash of each tile.
            block_size: Tokens per block; None hashes nothing, so that the prompt is never shared.
            salt: Begins every hash, so that prompts of different salts share nothing.

        Raises:
            ValueError: unless there is exactly one placeholder per vision token.
        """
        self.tokens_T, self.salt = prompt.tokens_T, salt
        self.num_tiles = len(tile_hashes)
        self.run_tiles: list[bytes] = [tile_hashes[tile] for tile in prompt.tile_ids_R.tolist()]
        """The hash of the tile that each placeholder run shows."""
        self.run_length = config.tokens_per_tile
        self.placeholders = array("q", (prompt.tokens_T == config.image_token_id).nonzero().flatten().tolist())
        """Positions of the placeholders."""
        num_vision = len(self.run_tiles) * self.run_length
        if len(self.placeholders) != num_vision:
            raise ValueError(f"{len(self.placeholders)} image placeholder tokens but {num_vision} vision tokens")
        self.hashes: list[bytes] = []
        if block_size is not None:
            tokens: list[int] = prompt.tokens_T.tolist()
            before = b""
            for start in range(0, len(tokens), block_size):
                before = self.hash_block(before, start, tokens[start : start + block_size])
                self.hashes.append(before)

    def hash_block(self, before: bytes, start: int, tokens: Sequence[int]) -> bytes:
        """Return the prefix hash of a block.

        Args:
            before: The hash of the block before it; empty for the first.
            start: Position of its first token.
            tokens: Its tokens, which may go on into the reply.
        """
        digest = hashlib.blake2b(before or self.salt, digest_size=16)
        digest.update(array("q", tokens).tobytes())
        first, stop = self.placeholders_between(start, start + len(tokens))
        if first < stop:
            digest.update(array("q", (first % self.run_length,)).tobytes())
            digest.update(b"".join(self._runs(first, stop)))
        return digest.digest()

    def tiles_between(self, start: int, stop: int) -> list[bytes]:
        """Return the hashes of the distinct tiles shown between two positions, in order."""
        return list(dict.fromkeys(self._runs(*self.placeholders_between(start, stop))))

    def vision_between(self, start: int, stop: int, encoded: dict[bytes, torch.Tensor]) -> torch.Tensor | None:
        """Return the vision tokens [X, D] of the placeholders between two positions, which may cut their runs."""
        first, last = self.placeholders_between(start, stop)
        if first == last:
            return None
        runs_XD = torch.cat([encoded[tile] for tile in self._runs(first, last)])
        skipped = first % self.run_length
        return runs_XD[skipped : skipped + last - first]

    def placeholders_between(self, start: int, stop: int) -> tuple[int, int]:
        """Return the numbers of the first placeholder between two positions and of the one behind the last."""
        return bisect_left(self.placeholders, start), bisect_left(self.placeholders, stop)

    def _runs(self, first: int, stop: int) -> list[bytes]:
        """Return the tiles of the runs that hold the placeholders number first up to stop, counted from the prompt's first."""
        return self.run_tiles[first // self.run_length : -(-stop // self.run_length)] if first < stop else []


@dataclass
class CacheState:
    """How much of a request is computed, and what the next piece of its prompt needs. The scheduler changes it."""

    max_blocks: int
    """Blocks of the prompt and the longest possible reply."""
    tiles: dict[bytes, torch.Tensor]
    """Tiles by hash; dropped once the prompt is computed, as they are large."""
    vision: dict[bytes, torch.Tensor] = field(default_factory=dict[bytes, torch.Tensor])
    """Vision tokens of the tiles that are about to be read, kept here whatever the encoder forgets."""
    sequence: CachedSequence = field(default_factory=CachedSequence)
    num_found: int = 0
    """Prompt tokens that were found in the cache."""
    num_registered: int = 0
    """Leading blocks that can be found by a prefix hash."""
    last_hash: bytes = b""
    """The prefix hash of the last of them."""


@dataclass
class RequestTimes:
    """The clocks of a request, in seconds. Requests of one step share its time: each carries the whole."""

    prepare: float = 0.0
    """Reading and tiling media, rendering, tokenizing."""
    queue: float = 0.0
    """Waiting for room, or for another request that computes the same prompt."""
    vision: float = 0.0
    """Encoding tiles; 0 when their vision tokens were in memory."""
    prefill: float = 0.0
    """The forward calls over the prompt."""
    added_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def decode(self) -> float:
        """Time from the first token to the last."""
        return self.last_token_at - self.first_token_at


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished reply. `tokens` are all sampled ones, the end token included; `text` has neither it nor a stop string."""

    text: str
    tokens: tuple[int, ...] = field(repr=False)
    finish_reason: FinishReason
    prompt_tokens: int
    num_cached: int
    """Prompt tokens found in the cache."""
    tiles: int
    timings: RequestTimes
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    """Log-probability of each token, if asked for."""


@dataclass(eq=False)
class Request:
    """One reply in the making. The engine appends to `deltas`; the owner of the request takes them from there."""

    # What was asked.
    prompt: HashedPrompt
    max_new_tokens: int
    """What was asked, or what the context has left."""
    unsplittable: bool
    """Whether the prompt must be computed in one step, and shared with no other request."""
    variant: str
    """Which of the engine's models replies; prefix hashes of different variants differ."""
    # What follows from it.
    sampler: Sampler
    stream: TextStream
    cache: CacheState
    timings: RequestTimes
    tokens: list[int] = field(default_factory=list[int])
    deltas: deque[TextDelta] = field(default_factory=deque[TextDelta])
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    failure: Exception | None = None
    """Why the engine cancelled the request, if its owner did not."""

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.tokens_T)

    @property
    def num_tiles(self) -> int:
        """Tiles of the prompt."""
        return self.prompt.num_tiles

    @property
    def num_cached(self) -> int:
        """Prompt tokens that were found in the cache."""
        return self.cache.num_found

    @property
    def in_prefill(self) -> bool:
        """Whether part of the prompt is still to be computed."""
        return self.cache.sequence.length < self.num_prompt

    def tokens_between(self, start: int, stop: int) -> list[int]:
        """Return the tokens of prompt and reply between two positions."""
        n = self.num_prompt
        return self.prompt.tokens_T[start:stop].tolist() + self.tokens[max(0, start - n) : max(0, stop - n)]

    def append(self, sampled: SampledToken, eos: Collection[int], now: float) -> None:
        """Add a token to the reply. An end token, a stop string, the end of the grammar, or the limit finishes it."""
        self.tokens.append(sampled.token)
        self.timings.first_token_at = self.timings.first_token_at or now
        self.timings.last_token_at = now
        reason: FinishReason | None = None
        if sampled.token in eos and not self.sampler.params.ignore_eos:
            reason, text = sampled.end or "stop", self.stream.flush()
        else:
            text = self.stream.push(sampled.token)
            if self.stream.stopped:
                reason = "stop"
            elif sampled.end is not None or len(self.tokens) == self.max_new_tokens:
                reason = sampled.end or "length"
                text += self.stream.flush()
        self.deltas.append(TextDelta(text, sampled.token, reason, sampled.logprob))
        self.finish_reason = reason  # after the delta: another thread may wait for the end

    def reply(self) -> Reply:
        """Return the finished reply; `deltas` must not have been consumed."""
        assert self.finish_reason is not None
        return Reply(
            text="".join(delta.text for delta in self.deltas),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason,
            prompt_tokens=self.num_prompt,
            num_cached=self.num_cached,
            tiles=self.num_tiles,
            timings=self.timings,
            logprobs=tuple(delta.logprob for delta in self.deltas if delta.logprob is not None),
        )
