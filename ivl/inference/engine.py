"""The inference engine: requests on the flat token axis. A step plans, runs the model once and hands out one token each.

    submit -> waiting -> running (cache blocks reserved, prompt then one token per step) -> finished

`stream` and `generate` are folds over `step`. Whoever consumes a stream drives the engine, and requests of other open
streams advance in the same forward calls. An engine belongs to one thread.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ivl.errors import InputError
from ivl.inference.sampling import Sampler, choose
from ivl.inference.text import Decoder, TextStream
from ivl.inference.vision import VisionEncoder
from ivl.model.cache import PagedCache, Sequence
from ivl.model.memory import keep_freed_memory
from ivl.model.vlm import VLM
from ivl.types import Conversation, FinishReason, Prompt, SamplingParams, TextDelta

GREEDY = SamplingParams()
DEFAULT_CACHE_TOKENS = 65536
CACHE_SHARE_OF_MEMORY = 4
"""The key/value store may grow to one part in this many of the device's memory, unless told otherwise."""


class Tokens(Protocol):
    def stream(self) -> Decoder: ...


class Prompts(Protocol):
    """What the engine needs of a Processor."""

    @property
    def tokenizer(self) -> Tokens: ...
    def prompt(self, conversation: Conversation) -> Prompt: ...


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of one request. Requests of one step share its time: each carries the whole."""

    prepare: float
    """Reading and tiling media, rendering, tokenising."""
    vision: float
    """Encoding tiles; near 0 when they were known."""
    prefill: float
    """The forward call over the prompt."""
    decode: float
    """From the first token to the last."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished reply. tokens are all sampled ones, the end token included; text excludes it and any stop string."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    tiles: int
    timings: Timings


@dataclass(eq=False)
class Request:
    """One reply in the making."""

    prompt: Prompt | None
    """Dropped once the model has read it: tiles are large."""
    num_prompt: int
    num_tiles: int
    limit: int
    """New tokens at most: what was asked, or what the context has left."""
    blocks: int
    """Cache blocks reserved for the longest possible reply."""
    sampler: Sampler
    text: TextStream
    prepare: float
    sequence: Sequence = field(default_factory=Sequence)
    tokens: list[int] = field(default_factory=list)
    deltas: deque[TextDelta] = field(default_factory=deque)
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    vision: float = 0.0
    prefill: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    def reply(self) -> Reply:
        """The finished reply; `deltas` must not have been consumed."""
        assert self.finish_reason is not None
        return Reply(
            text="".join(delta.text for delta in self.deltas),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason,
            prompt_tokens=self.num_prompt,
            tiles=self.num_tiles,
            timings=self.timings(),
        )

    def timings(self) -> Timings:
        decode = self.last_token_at - self.first_token_at
        return Timings(prepare=self.prepare, vision=self.vision, prefill=self.prefill, decode=decode)


class Engine:
    """Runs many requests of one model together.

    max_cache_tokens: prompt and reply tokens held at once, by default 65,536 or what a quarter of memory holds.
    max_batch_tokens: tokens of one forward call; a longer prompt runs alone. max_sequences: requests running at once.
    max_context: prompt and reply together, by default what the model was trained for.
    vision_cache_bytes: vision tokens remembered for images that come again.
    """

    def __init__(
        self,
        model: VLM,
        processor: Prompts,
        *,
        max_cache_tokens: int | None = None,
        max_batch_tokens: int = 4096,
        max_sequences: int = 256,
        max_context: int | None = None,
        vision_cache_bytes: int = 256 << 20,
        block_size: int = 64,
    ) -> None:
        if model.training:
            raise ValueError("the model is in training mode, where drop path is active: call model.eval() first")
        decoder = model.config.decoder
        if model.device.type == "cpu":
            keep_freed_memory()
        self.model = model
        self.processor = processor
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_context = decoder.max_positions if max_context is None else max_context
        cache_tokens = default_cache_tokens(model) if max_cache_tokens is None else max_cache_tokens
        self.cache = PagedCache(decoder, num_tokens=cache_tokens, block_size=block_size, dtype=model.dtype, device=model.device)
        self.unreserved = self.cache.num_blocks
        self.vision = VisionEncoder(model, max_bytes=vision_cache_bytes)
        self.eos = frozenset(model.config.eos_token_ids)
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, None] = {}

    # Requests in and out

    def submit(self, conversation: Conversation, params: SamplingParams = GREEDY) -> Request:
        """Queue a request; `step` advances it.

        Raises:
            InputError: if the prompt leaves no room in the context, or the reply could never fit into the cache.
        """
        started = time.perf_counter()
        prompt = self.processor.prompt(conversation)
        num_prompt, num_tiles = len(prompt.tokens_T), len(prompt.tiles_GSSC)
        if num_prompt >= self.max_context:
            raise InputError(
                f"the prompt has {num_prompt} tokens, {len(prompt.tile_ids_R) * self.model.config.tokens_per_tile} of them "
                f"for {num_tiles} image tiles, but the context is {self.max_context} tokens: "
                "shorten the text, or allow fewer tiles, images or frames"
            )
        limit = min(params.max_new_tokens, self.max_context - num_prompt)
        blocks = -(-(num_prompt + limit) // self.cache.block_size)
        if blocks > self.cache.num_blocks:
            raise InputError(
                f"{num_prompt} prompt tokens and up to {limit} new ones need {blocks} cache blocks of "
                f"{self.cache.block_size} tokens, but there are {self.cache.num_blocks}: "
                "lower max_new_tokens or raise max_cache_tokens"
            )
        ids = prompt.tokens_T.tolist()
        request = Request(
            prompt=prompt,
            num_prompt=num_prompt,
            num_tiles=num_tiles,
            limit=limit,
            blocks=blocks,
            sampler=Sampler(params, ids, self.model.config.decoder.vocab_size),
            text=TextStream(self.processor.tokenizer.stream(), params.stop),
            prepare=time.perf_counter() - started,
        )
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Forget an unfinished request and free its blocks; a finished one is left as it is."""
        if request in self.running:
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return
        request.cancelled = True

    def stream(self, prompt: Conversation, params: SamplingParams = GREEDY) -> Generator[TextDelta, None, None]:
        """One delta per token, the last with its finish_reason. Closing the iterator cancels the request."""
        request = self.submit(prompt, params)
        yield from self.follow(request)

    def follow(self, request: Request) -> Generator[TextDelta, None, None]:
        """The deltas of a submitted request as they come; cancels it when closed early."""
        try:
            while request.deltas or request.finish_reason is None:
                if request.cancelled:
                    raise RuntimeError("the request was cancelled")
                if not request.deltas:
                    self.step()
                while request.deltas:
                    yield request.deltas.popleft()
        finally:
            self.cancel(request)

    def generate(self, conversations: Seq[Conversation], params: SamplingParams | Seq[SamplingParams] = GREEDY) -> list[Reply]:
        """Replies in the order of the conversations; each is what the conversation alone would give.

        params: one for all, or one per conversation.
        """
        every = [params] * len(conversations) if isinstance(params, SamplingParams) else list(params)
        if len(every) != len(conversations):
            raise ValueError(f"{len(conversations)} conversations but {len(every)} sampling parameters")
        todo = deque(zip(conversations, every, strict=True))
        requests: list[Request] = []
        try:
            # Prompts hold tiles, so they are prepared only as the engine can take them.
            while todo or any(request.finish_reason is None for request in requests):
                ready = sum(request.num_prompt for request in self.waiting)
                while todo and ready < self.max_batch_tokens:
                    requests.append(self._submit_numbered(len(requests), *todo.popleft()))
                    ready += requests[-1].num_prompt
                self.step()
        finally:
            for request in requests:
                self.cancel(request)
        return [request.reply() for request in requests]

    def _submit_numbered(self, number: int, conversation: Conversation, params: SamplingParams) -> Request:
        try:
            return self.submit(conversation, params)
        except InputError as error:
            raise InputError(f"conversation {number}: {error}") from error

    # One step

    @torch.inference_mode()
    def step(self) -> None:
        """Plan, run the model once, sample one token for every planned request."""
        plan, num_running = self._plan()
        if not plan:
            return
        try:
            tokens = self._run(plan, num_running)
        except BaseException:  # half-written sequences cannot go on, whatever stopped the run
            for request in plan:
                self.cancel(request)
            raise
        now = time.perf_counter()
        for request, token in zip(plan, tokens, strict=True):
            self._accept(request, token, now)

    def _plan(self) -> tuple[list[Request], int]:
        """Running requests, one token each, then waiting prompts in order while tokens, blocks and sequences suffice.

        The first prompt may exceed the token budget, so that a long one is not kept waiting for ever.
        """
        plan = list(self.running)
        num_running, num_tokens = len(plan), len(plan)
        while self.waiting and len(plan) < self.max_sequences:
            request = self.waiting[0]
            num_tokens += request.num_prompt
            if request.blocks > self.unreserved or (num_tokens > self.max_batch_tokens and len(plan) > num_running):
                break
            self.waiting.popleft()
            self.unreserved -= request.blocks
            self.running[request] = None
            plan.append(request)
        return plan, num_running

    def _run(self, plan: list[Request], num_running: int) -> list[int]:
        """One forward call; the next token of each planned request."""
        device, started = self.model.device, time.perf_counter()
        new = plan[num_running:]
        prompts = [request.prompt for request in new if request.prompt is not None]
        vision_RUD = self._encode(prompts)
        encoded = time.perf_counter()
        last_T = torch.tensor([request.tokens[-1] for request in plan[:num_running]], dtype=torch.long)
        tokens_T = torch.cat([last_T, *(prompt.tokens_T for prompt in prompts)])
        new_lens = (1,) * num_running + tuple(request.num_prompt for request in new)
        step = self.cache.step([request.sequence for request in plan], new_lens)
        hidden_TD = self.model(tokens_T.to(device), step.layout, vision_RUD, step)
        if new:
            ends = [start + length - 1 for start, length in zip(step.layout.starts, new_lens, strict=True)]
            hidden_TD = hidden_TD[torch.tensor(ends, device=device)]
        logits_SV = self.model.head(hidden_TD)
        logits_SV[:, self.model.config.image_token_id] = -torch.inf  # stands for pixels; there are none to put here
        tokens = choose(logits_SV, [request.sampler for request in plan])
        for request in new:
            request.prompt = None
            request.vision, request.prefill = encoded - started, time.perf_counter() - encoded
        return tokens

    def _encode(self, prompts: list[Prompt]) -> torch.Tensor | None:
        """Vision tokens of all placeholder runs of these prompts, in order."""
        prompts = [prompt for prompt in prompts if len(prompt.tiles_GSSC)]
        if not prompts:
            return None
        vision_GUD = self.vision.encode(torch.cat([prompt.tiles_GSSC for prompt in prompts]))
        parts = vision_GUD.split([len(prompt.tiles_GSSC) for prompt in prompts])
        return torch.cat([part[prompt.tile_ids_R] for part, prompt in zip(parts, prompts, strict=True)])

    def _accept(self, request: Request, token: int, now: float) -> None:
        """Record a sampled token, and finish the request at an end token, a stop string or its limit."""
        request.tokens.append(token)
        request.first_token_at = request.first_token_at or now
        request.last_token_at = now
        if token in self.eos:
            request.finish_reason, text = "stop", request.text.flush()
        else:
            text = request.text.push(token)
            if request.text.stopped:
                request.finish_reason = "stop"
            elif len(request.tokens) == request.limit:
                request.finish_reason = "length"
                text += request.text.flush()
        request.deltas.append(TextDelta(text, token, request.finish_reason))
        if request.finish_reason is not None:
            self._release(request)

    def _release(self, request: Request) -> None:
        del self.running[request]
        self.cache.release(request.sequence)
        self.unreserved += request.blocks


def default_cache_tokens(model: VLM) -> int:
    """Tokens a key/value store may hold by default."""
    decoder = model.config.decoder
    bytes_per_token = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * model.dtype.itemsize
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info(model.device)[0]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(DEFAULT_CACHE_TOKENS, memory // CACHE_SHARE_OF_MEMORY // bytes_per_token))
