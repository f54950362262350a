"""The inference engine: requests on the flat token axis. A step plans, runs the model once and hands out tokens.

    prepare -> add -> waiting -> running (prompt by pieces, then one token per step) -> finished

`stream` and `generate` are folds over `step`. Whoever consumes a stream drives the engine, and requests of other open
streams advance in the same forward calls. An engine belongs to one thread; only `prepare` may be called from others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from ivl.cpu.memory import keep_freed_memory
from ivl.errors import InputError
from ivl.inference.guide import Guides, Words
from ivl.inference.prompt import NamedPrompt
from ivl.inference.request import Reply, Request, Timings
from ivl.inference.runner import Runner
from ivl.inference.sampling import Chosen, Sampler
from ivl.inference.scheduler import Scheduler
from ivl.inference.text import Decoder, TextStream
from ivl.inference.vision import VisionEncoder, tile_cost, tile_key
from ivl.model.cache import PagedCache
from ivl.model.vlm import VLM
from ivl.types import Conversation, Prompt, SamplingParams, TextDelta

__all__ = ["Engine", "EngineStats", "Reply", "Request", "Timings"]

GREEDY = SamplingParams()
DEFAULT_CACHE_TOKENS = 65536
CACHE_SHARE_OF_MEMORY = 4
"""The key/value store may grow to one part in this many of the device's memory, unless told otherwise."""
TILES_AHEAD = 64
"""`generate` prepares conversations until so many tiles wait, or as many requests as may run."""


class Tokens(Words, Protocol):
    def stream(self) -> Decoder: ...


class Prompts(Protocol):
    """What the engine needs of a Processor."""

    @property
    def tokenizer(self) -> Tokens: ...
    def prompt(self, conversation: Conversation) -> Prompt: ...


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine does now, and has done since it was made."""

    waiting: int
    running: int
    cache_blocks_used: int
    """Blocks of running requests; kept ones are not counted."""
    cache_blocks: int
    steps: int
    prompt_tokens: int
    """Tokens of all prompts that were begun."""
    prefix_hit_tokens: int
    """Those of them that were found in the cache."""
    new_tokens: int
    vision_hits: int
    """Tiles wanted that were known, or were wanted by two requests at once."""
    vision_misses: int
    """Tiles encoded."""


class Engine:
    """Runs many requests of one model together.

    max_cache_tokens: prompt and reply tokens held at once, by default 65,536 or what a quarter of memory holds. What
    requests leave there is kept until the room is needed, and prompts that begin alike are computed once.
    max_batch_tokens: tokens of one step; a longer prompt is read in pieces. max_sequences: requests running at once.
    max_context: prompt and reply together, by default what the model was trained for.
    vision_cache_bytes: vision tokens remembered for images that come again.
    """

    def __init__(
        self,
        model: VLM,
        processor: Prompts,
        *,
        max_cache_tokens: int | None = None,
        max_batch_tokens: int = 2048,
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
        self.max_context = decoder.max_positions if max_context is None else max_context
        cache_tokens = default_cache_tokens(model) if max_cache_tokens is None else max_cache_tokens
        self.cache = PagedCache(decoder, num_tokens=cache_tokens, block_size=block_size, dtype=model.dtype, device=model.device)
        self.vision = VisionEncoder(model, max_bytes=vision_cache_bytes)
        self.scheduler = Scheduler(
            self.cache,
            self.vision,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            tile_cost=tile_cost(model.config),
        )
        self.runner = Runner(model, self.cache, self.vision)
        self.eos = frozenset(model.config.eos_token_ids)
        self.guides = Guides(processor.tokenizer, vocab_size=decoder.vocab_size, eos=self.eos)
        self.num_steps = self.num_new_tokens = 0

    # Requests in and out

    def prepare(self, conversation: Conversation, params: SamplingParams = GREEDY) -> Request:
        """A request that `add` may queue: media read, conversation rendered and tokenised. Safe in any thread.

        Raises:
            InputError: if the prompt leaves no room in the context, or the reply could never fit into the cache.
        """
        return self.prepare_all(conversation, [params])[0]

    def prepare_all(self, conversation: Conversation | Prompt, params: Seq[SamplingParams]) -> list[Request]:
        """Requests for several replies to one conversation, whose media are read once, or to a prompt that is already
        rendered. Safe in any thread.

        Raises:
            InputError: as `prepare`.
        """
        started = time.perf_counter()
        prompt = conversation if isinstance(conversation, Prompt) else self.processor.prompt(conversation)
        num_prompt, num_tiles = len(prompt.tokens_T), len(prompt.tiles_GSSC)
        if num_prompt >= self.max_context:
            raise InputError(
                f"the prompt has {num_prompt} tokens, {len(prompt.tile_ids_R) * self.model.config.tokens_per_tile} of them "
                f"for {num_tiles} image tiles, but the context is {self.max_context} tokens: "
                "shorten the text, or allow fewer tiles, images or frames"
            )
        limits = [min(each.max_new_tokens, self.max_context - num_prompt) for each in params]
        blocks = [-(-(num_prompt + limit) // self.cache.block_size) for limit in limits]
        if max(blocks) > self.cache.num_blocks:
            raise InputError(
                f"{num_prompt} prompt tokens and up to {max(limits)} new ones need {max(blocks)} cache blocks of "
                f"{self.cache.block_size} tokens, but there are {self.cache.num_blocks}: "
                "lower max_new_tokens or raise max_cache_tokens"
            )
        # Where the rotary base depends on the whole length, a part of the prompt cannot be computed without the rest.
        decoder = self.model.config.decoder
        whole = decoder.rope_dynamic_factor is not None and num_prompt + max(limits) > decoder.max_positions
        keys = [tile_key(tile) for tile in prompt.tiles_GSSC]
        named = NamedPrompt(prompt, keys, self.model.config, None if whole else self.cache.block_size)
        ids = prompt.tokens_T.tolist()
        return [
            Request(
                prompt=named,
                tiles=dict(zip(keys, prompt.tiles_GSSC, strict=True)),
                limit=limit,
                blocks=count,
                whole=whole,
                sampler=Sampler(each, ids, each.guide and self.guides.matcher(each.guide)),
                text=TextStream(self.processor.tokenizer.stream(), each.stop),
                prepare=time.perf_counter() - started,
            )
            for each, limit, count in zip(params, limits, blocks, strict=True)
        ]

    def add(self, request: Request) -> None:
        """Queue a prepared request; `step` advances it."""
        self.scheduler.add(request)

    def submit(self, conversation: Conversation, params: SamplingParams = GREEDY) -> Request:
        """`prepare` and `add`."""
        request = self.prepare(conversation, params)
        self.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Forget an unfinished request and free its blocks; a finished one is left as it is."""
        if self.scheduler.remove(request):
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
                    raise request.failure or RuntimeError("the request was cancelled")
                if not request.deltas:
                    self.step()
                while request.deltas:
                    yield request.deltas.popleft()
        finally:
            self.cancel(request)

    def generate(self, conversations: Seq[Conversation], params: SamplingParams | Seq[SamplingParams] = GREEDY) -> list[Reply]:
        """Replies in the order of the conversations; each is what the conversation alone would give.

        params: one for all, or one per conversation. A conversation that follows itself is prepared once.
        """
        every = [params] * len(conversations) if isinstance(params, SamplingParams) else list(params)
        if len(every) != len(conversations):
            raise ValueError(f"{len(conversations)} conversations but {len(every)} sampling parameters")
        replies: dict[int, Reply] = {}
        active: dict[int, Request] = {}
        todo = self._prepared(conversations, every)
        more = True
        try:
            while more or active:
                while more and self._wants_more():
                    if more := (request := next(todo, None)) is not None:
                        active[len(active) + len(replies)] = request
                        self.add(request)
                self.step()
                for number, request in active.items():
                    if request.failure is not None:
                        raise InputError(f"conversation {number}: {request.failure}")
                for number in [n for n, request in active.items() if request.finish_reason is not None]:
                    replies[number] = active.pop(number).reply()
        finally:
            for request in active.values():
                self.cancel(request)
        return [replies[number] for number in range(len(replies))]

    def _prepared(self, conversations: Seq[Conversation], params: list[SamplingParams]) -> Generator[Request, None, None]:
        number = 0
        while number < len(conversations):
            same = number + 1
            while same < len(conversations) and conversations[same] is conversations[number]:
                same += 1
            try:
                yield from self.prepare_all(conversations[number], params[number:same])
            except InputError as error:
                raise InputError(f"conversation {number}: {error}") from error
            number = same

    def _wants_more(self) -> bool:
        """Prompts hold tiles, so they are prepared only as the engine can take them."""
        waiting = self.scheduler.waiting
        return len(waiting) < self.scheduler.max_sequences and sum(len(r.tiles) for r in waiting) < TILES_AHEAD

    # One step

    @torch.inference_mode()
    def step(self) -> None:
        """Plan, run the model once, and sample a token for every reply and every prompt that was read to its end."""
        plan = self.scheduler.plan()
        if not plan.requests:
            return
        try:
            chosen = self.runner.run(plan)
        except BaseException:  # half-written sequences cannot go on, whatever stopped the run
            for request in plan.requests:
                self.cancel(request)
            raise
        self.scheduler.finish(plan)
        self.num_steps += 1
        now = time.perf_counter()
        sampling = [piece.request for piece in plan.pieces if piece.samples]
        for request, each in zip(sampling, chosen, strict=True):
            if each is not None:
                self._accept(request, each, now)
                continue
            self.cancel(request)  # alone: the others' scores are their own
            dtype = self.model.dtype
            request.failure = InputError(f"the model's scores are not finite in {dtype}: check the checkpoint, or use float32")

    def _accept(self, request: Request, chosen: Chosen, now: float) -> None:
        """Record a sampled token, and finish the request at an end token, a stop string, the end of its guide or its limit."""
        token = chosen.token
        self.num_new_tokens += 1
        request.tokens.append(token)
        request.first_token_at = request.first_token_at or now
        request.last_token_at = now
        if token in self.eos and not request.sampler.params.ignore_eos:
            request.finish_reason, text = chosen.end or "stop", request.text.flush()
        else:
            text = request.text.push(token)
            if request.text.stopped:
                request.finish_reason = "stop"
            elif chosen.end is not None:
                request.finish_reason = chosen.end
                text += request.text.flush()
            elif len(request.tokens) == request.limit:
                request.finish_reason = "length"
                text += request.text.flush()
        request.deltas.append(TextDelta(text, token, request.finish_reason, chosen.logprob))
        if request.finish_reason is not None:
            self.scheduler.remove(request)

    def stats(self) -> EngineStats:
        """Figures of the engine; may be read from any thread."""
        scheduler, pool = self.scheduler, self.cache.pool
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            cache_blocks_used=pool.num_blocks - pool.num_available,
            cache_blocks=pool.num_blocks,
            steps=self.num_steps,
            prompt_tokens=scheduler.prompt_tokens,
            prefix_hit_tokens=scheduler.hit_tokens,
            new_tokens=self.num_new_tokens,
            vision_hits=scheduler.vision_hits,
            vision_misses=scheduler.vision_misses,
        )


def default_cache_tokens(model: VLM) -> int:
    """Tokens a key/value store may hold by default."""
    decoder = model.config.decoder
    bytes_per_token = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * model.dtype.itemsize
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info(model.device)[0]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(DEFAULT_CACHE_TOKENS, memory // CACHE_SHARE_OF_MEMORY // bytes_per_token))
