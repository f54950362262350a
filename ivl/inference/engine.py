"""The inference engine: requests on the flat token axis. A step schedules, runs the model once and delivers tokens.

    prepare -> add -> waiting -> running (prompt by pieces, then one token per step) -> finished

`stream` and `generate` repeat `step` until their replies end. Whoever consumes a stream drives the engine: the requests of all
other streams, even of other threads, advance in the same forward calls. All methods are safe in any thread.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch

from ivl.errors import InputError, nearest, short
from ivl.inference.grammar import GrammarCompiler
from ivl.inference.request import CacheState, HashedPrompt, Reply, Request, RequestTimes
from ivl.inference.runner import Runner
from ivl.inference.sampling import SampledToken, Sampler
from ivl.inference.scheduler import EngineStep, Scheduler
from ivl.inference.text import TextStream, TokenizerLike
from ivl.inference.vision import VisionEncoder, tile_cost, tile_hash
from ivl.model.cache import PAGE_ON_CARDS, PagedCache
from ivl.model.vlm import VLM
from ivl.types import Conversation, Prompt, SamplingParams, TextDelta

__all__ = ["Engine", "EngineStats", "Reply", "Request", "RequestTimes"]

GREEDY = SamplingParams()
DEFAULT_CACHE_TOKENS = 65536
CACHE_SHARE_OF_MEMORY = 4
"""By default the key/value cache grows to at most one part in this many of the device's memory."""
TURN_SECONDS = 0.02
"""How often a thread looks for new text of its reply while another one runs the steps."""
TILES_AHEAD = 64
"""`generate` prepares conversations until this many tiles wait, or as many requests as may run."""


class ProcessorLike(Protocol):
    """What the engine needs of a processor."""

    @property
    def tokenizer(self) -> TokenizerLike: ...
    def prompt(self, conversation: Conversation) -> Prompt: ...


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine does now, and has done since it was built."""

    waiting: int
    running: int
    cache_blocks_used: int
    """Blocks of running requests; evictable ones are not counted."""
    cache_blocks: int
    steps: int
    prompt_tokens: int
    """Tokens of all prompts that were begun."""
    prefix_hit_tokens: int
    """Those of them that were found in the cache."""
    new_tokens: int
    vision_hits: int
    """Tiles whose vision tokens were in memory, or were needed by two requests at once."""
    vision_misses: int
    """Tiles encoded."""


class Engine:
    """Runs many requests of one model together.

    Finished requests leave their tokens in the cache until the room is needed, and a common prefix of prompts is computed
    once.
    """

    def __init__(
        self, model: VLM, processor: ProcessorLike, *, max_cache_tokens: int | None = None, max_batch_tokens: int = 2048,
        max_sequences: int = 256, max_context: int | None = None, vision_cache_bytes: int = 256 << 20,
        block_size: int | None = None, variants: Mapping[str, VLM] | None = None,
    ) -> None:  # fmt: skip
        """Set up the cache and the scheduler.

        Args:
            max_cache_tokens: Prompt and reply tokens held at once; by default 65,536 or a quarter of memory, the lesser.
            max_batch_tokens: Tokens of one step; a longer prompt is computed in pieces.
            max_sequences: Requests running at once.
            max_context: Tokens of prompt and reply together; by default what the model was trained for.
            vision_cache_bytes: Size of the vision tokens that are kept for images that come again.
            block_size: Tokens of a cache block: 64 by default, and on a card 256 or a multiple of it.
            variants: Further models by name, of the same configuration, which share the cache but nothing in it.
        """
        self.models = {"": model, **(variants or {})}
        if any(each.training for each in self.models.values()):
            raise ValueError("the model is in training mode, where drop path is active: call model.eval() first")
        decoder = model.config.decoder
        self.model = model
        self.processor = processor
        on_card = model.device.type == "cuda"
        block_size = (PAGE_ON_CARDS if on_card else 64) if block_size is None else block_size
        self.max_context = decoder.max_positions if max_context is None else max_context
        most_tokens = tokens_in_memory(model)
        default_tokens = max(1, min(DEFAULT_CACHE_TOKENS, most_tokens // CACHE_SHARE_OF_MEMORY))
        cache_tokens = default_tokens if max_cache_tokens is None else max_cache_tokens
        options = {
            "max_cache_tokens": cache_tokens, "max_batch_tokens": max_batch_tokens, "max_sequences": max_sequences,
            "max_context": self.max_context, "block_size": block_size, "vision_cache_bytes": vision_cache_bytes,
        }  # fmt: skip
        for name, value in options.items():
            low, high = (0, 2**47) if name == "vision_cache_bytes" else (1, 2**31 - 1)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number in [{low}, {high}], got {short(value)}")
        if on_card and block_size % PAGE_ON_CARDS:
            raise InputError(f"block_size must be a multiple of {PAGE_ON_CARDS} on a card, got {block_size}")
        if cache_tokens + block_size > most_tokens:
            raise InputError(f"max_cache_tokens is {cache_tokens}, the memory has room for {most_tokens} at most: lower it")
        self.cache = PagedCache(
            model.decoder.config, num_tokens=cache_tokens, block_size=block_size, dtype=model.dtype, device=model.device
        )
        self.vision = VisionEncoder(model.config, max_bytes=vision_cache_bytes)
        limits = {"max_batch_tokens": max_batch_tokens, "max_sequences": max_sequences}
        self.scheduler = Scheduler(self.cache, self.vision, tile_cost=tile_cost(model.config), **limits)
        self.runner = Runner(self.models, self.cache, self.vision, processor.tokenizer.unused(decoder.vocab_size))
        self.eos = frozenset(model.config.eos_token_ids)
        self.grammars = GrammarCompiler(processor.tokenizer, vocab_size=decoder.vocab_size, eos=self.eos)
        self.num_steps = self.num_new_tokens = 0
        self._lock = threading.RLock()

    # One step

    @torch.inference_mode()
    def step(self) -> None:
        """Schedule, run the model once, and deliver a token to every reply and every prompt that was read to its end."""
        with self._lock:
            step = self.scheduler.schedule()
            if not step.requests:
                return
            try:
                tokens = self.runner.run(step)
            except BaseException:  # half-written sequences cannot go on, whatever stopped the run
                for request in step.requests:
                    self.cancel(request)
                raise
            self.scheduler.finish(step)
            self._deliver(step, tokens)

    def _deliver(self, step: EngineStep, tokens: list[SampledToken | Exception]) -> None:
        self.num_steps += 1
        now = time.perf_counter()
        for piece, sampled in zip((piece for piece in step.pieces if piece.samples), tokens, strict=True):
            request = piece.request
            try:
                if isinstance(sampled, Exception):
                    raise sampled
                request.append(sampled, self.eos, now)
            except Exception as error:  # whatever is wrong with one reply, the others go on
                request.failure = error
                self.cancel(request)
            else:
                self.num_new_tokens += 1
                if request.finish_reason is not None:
                    self.scheduler.remove(request)

    # Requests in and out

    def prepare(self, conversation: Conversation, params: SamplingParams = GREEDY, cache_salt: str = "") -> Request:
        """Return a request for `add`: read media, render the conversation and tokenize it. Arguments as `prepare_all`."""
        return self.prepare_all(conversation, [params], cache_salt)[0]

    def prepare_all(
        self, conversation: Conversation | Prompt, params: Sequence[SamplingParams], cache_salt: str = "", variant: str = ""
    ) -> list[Request]:
        """Return requests for several replies to one conversation, whose media are read once. Safe in any thread.

        Args:
            conversation: The conversation, or a prompt that is already rendered.
            params: One per reply.
            cache_salt: Only requests of the same salt share blocks and vision tokens, such as those of one user.
            variant: Which of the engine's models replies; only requests of one variant share blocks and vision tokens.

        Raises:
            InputError: if there is no such variant, the prompt leaves no room in the context, or the reply could never fit into
                the cache.
        """
        started = time.perf_counter()
        if variant not in self.models:
            raise InputError(f"no variant {short(variant)}: {nearest(variant, self.models, 'variants')}")
        prompt = conversation if isinstance(conversation, Prompt) else self.processor.prompt(conversation)
        num_prompt, decoder = len(prompt.tokens_T), self.model.config.decoder
        limits = self._limits(prompt, params)
        # Where the rotary base depends on the whole length, a part of the prompt cannot be computed without the rest.
        stretched = decoder.rope_dynamic_factor is not None and num_prompt + max(limits) > decoder.max_positions
        salt = hashlib.sha256(repr((variant, cache_salt)).encode()).digest() if variant or cache_salt else b""
        hashes = [tile_hash(tile_SSC, salt) for tile_SSC in prompt.tiles_GSSC]
        hashed = HashedPrompt(prompt, hashes, self.model.config, None if stretched else self.cache.block_size, salt)
        ids: list[int] = prompt.tokens_T.tolist()
        return [
            Request(
                prompt=hashed,
                max_new_tokens=limit,
                unsplittable=stretched,
                variant=variant,
                sampler=Sampler(sampling, ids, sampling.guide and self.grammars.compile(sampling.guide)),
                stream=TextStream(self.processor.tokenizer.stream(), sampling.stop),
                cache=CacheState(
                    -(-(num_prompt + limit) // self.cache.block_size), dict(zip(hashes, prompt.tiles_GSSC, strict=True))
                ),
                timings=RequestTimes(prepare=time.perf_counter() - started),
            )
            for sampling, limit in zip(params, limits, strict=True)
        ]

    def _limits(self, prompt: Prompt, params: Sequence[SamplingParams]) -> list[int]:
        """Return the new tokens that each reply may have. Raises InputError as `prepare`."""
        num_prompt, num_tiles = len(prompt.tokens_T), len(prompt.tiles_GSSC)
        if num_prompt >= self.max_context:
            raise InputError(
                f"the prompt has {num_prompt} tokens, {len(prompt.tile_ids_R) * self.model.config.tokens_per_tile} of them "
                f"for {num_tiles} image tiles, but the context is {self.max_context} tokens: "
                "shorten the text, or allow fewer tiles, images or frames"
            )
        limits = [min(sampling.max_new_tokens, self.max_context - num_prompt) for sampling in params]
        num_blocks = -(-(num_prompt + max(limits)) // self.cache.block_size)
        if num_blocks > self.cache.num_blocks:
            raise InputError(
                f"{num_prompt} prompt tokens and up to {max(limits)} new ones need {num_blocks} cache blocks of "
                f"{self.cache.block_size} tokens, but there are {self.cache.num_blocks}: "
                "lower max_new_tokens or raise max_cache_tokens"
            )
        return limits

    def add(self, request: Request) -> None:
        """Queue a prepared request; `step` advances it."""
        with self._lock:
            self.scheduler.add(request)

    def submit(self, conversation: Conversation, params: SamplingParams = GREEDY, cache_salt: str = "") -> Request:
        """Prepare a request and queue it. Arguments as `prepare_all`."""
        request = self.prepare(conversation, params, cache_salt)
        self.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Forget an unfinished request and release its blocks. Does nothing to a finished one."""
        with self._lock:
            request.cancelled = self.scheduler.remove(request) or request.cancelled

    # Whole replies

    def stream(self, prompt: Conversation, params: SamplingParams = GREEDY) -> Generator[TextDelta, None, None]:
        """Yield one delta per token, the last with its finish_reason. Closing the iterator cancels the request."""
        yield from self.deltas(self.submit(prompt, params))

    def deltas(self, request: Request) -> Generator[TextDelta, None, None]:
        """Yield the deltas of a queued request, and step the engine while there are none. Closing cancels the request."""
        try:
            while True:
                ended = request.finish_reason is not None  # before the deltas, or the last one might be missed
                while request.deltas:
                    yield request.deltas.popleft()
                if ended:
                    return
                if request.cancelled:
                    raise request.failure or RuntimeError("the request was cancelled")
                if self._lock.acquire(timeout=TURN_SECONDS):  # the step of another thread brings this request on, too
                    try:
                        if not (request.deltas or request.finish_reason or request.cancelled):
                            self.step()
                    finally:
                        self._lock.release()
        finally:
            self.cancel(request)

    def generate(
        self, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        show: Callable[[int, int], object] = lambda _done, _total: None,
    ) -> list[Reply]:  # fmt: skip
        """Return the replies in the order of the conversations; each is what the conversation alone would give.

        Args:
            conversations: The same conversation several times in a row is prepared once.
            params: One for all, or one per conversation.
            show: Called with the numbers of finished replies and of all, whenever one is finished.
        """
        params = [params] * len(conversations) if isinstance(params, SamplingParams) else list(params)
        if len(params) != len(conversations):
            raise InputError(f"{len(conversations)} conversations but {len(params)} sampling parameters")
        replies: dict[int, Reply] = {}
        active: dict[int, Request] = {}
        prepared = self._prepared(conversations, params)
        more = True
        try:
            while more or active:
                while more and self._has_room():
                    request = next(prepared, None)
                    more = request is not None
                    if request is not None:
                        active[len(active) + len(replies)] = request
                        self.add(request)
                self.step()
                for number, request in active.items():
                    if request.failure is not None:
                        raise InputError(f"conversation {number}: {request.failure}") from request.failure
                for number in [n for n, request in active.items() if request.finish_reason is not None]:
                    replies[number] = active.pop(number).reply()
                    show(len(replies), len(conversations))
        finally:
            for request in active.values():
                self.cancel(request)
        return [replies[number] for number in range(len(replies))]

    def _prepared(self, conversations: Sequence[Conversation], params: list[SamplingParams]) -> Generator[Request, None, None]:
        number = 0
        for _, same in groupby(conversations, key=id):
            stop = number + len(list(same))
            try:
                yield from self.prepare_all(conversations[number], params[number:stop])
            except InputError as error:
                raise InputError(f"conversation {number}: {error}") from error
            number = stop

    def _has_room(self) -> bool:
        """Whether to prepare another request: prompts hold tiles, so only a few wait."""
        with self._lock:
            waiting = self.scheduler.waiting
            num_tiles = sum(len(request.cache.tiles) for request in waiting)
            return len(waiting) < self.scheduler.max_sequences and num_tiles < TILES_AHEAD

    def stats(self) -> EngineStats:
        """Return the engine's counts. Safe in any thread."""
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


def tokens_in_memory(model: VLM) -> int:
    """Return the tokens whose keys and values are as large as the device's memory."""
    decoder = model.decoder.config  # of the heads that are here
    bytes_per_token = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * model.dtype.itemsize
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info(model.device)[0]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // bytes_per_token
