"""Decides what the next step computes, and which request may use what an earlier one has computed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice

import torch

from ivl.inference.request import Request
from ivl.inference.vision import VisionEncoder
from ivl.model.cache import PagedCache


@dataclass(frozen=True)
class Piece:
    """The next tokens of a request: the last token of its reply so far, or some of its prompt."""

    request: Request
    start: int
    count: int

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether a new token follows: the prompt is read to its end."""
        return self.stop >= self.request.num_prompt

    @property
    def in_prompt(self) -> bool:
        """Whether these are tokens of the prompt."""
        return self.start < self.request.num_prompt


@dataclass
class EngineStep:
    """What one step computes. budget: tokens that may still be added; variant: the model that computes."""

    budget: int
    variant: str = ""
    pieces: list[Piece] = field(default_factory=list[Piece])
    tiles: dict[bytes, torch.Tensor] = field(default_factory=dict[bytes, torch.Tensor])
    """Tiles to encode first, by hash."""
    tile_users: list[tuple[Request, bytes]] = field(default_factory=list[tuple[Request, bytes]])
    """The requests that wait for each of these tiles."""

    def add(self, request: Request, count: int) -> None:
        """Add the next tokens of a request."""
        self.pieces.append(Piece(request, request.cache.sequence.length, count))
        self.budget -= count

    @property
    def requests(self) -> list[Request]:
        """Every request that takes part."""
        users = (request for request, _ in self.tile_users)
        return list(dict.fromkeys([*(piece.request for piece in self.pieces), *users]))


class Scheduler:
    """Serves requests in the order of their arrival, in steps of max_batch_tokens.

    Every running reply gets its token in every step. The rest of the budget goes to prompts in the order of their arrival,
    piece by piece. Encoding a tile is paid from the same budget, tile_cost tokens each, so that no step takes much longer
    than reading max_batch_tokens. A request starts when blocks for its longest possible reply are free, so none is ever
    preempted. A step is of one variant of the model; variants that have running requests take turns.

    A request whose prompt begins like one that is being computed waits, may be overtaken, and then finds the prefix cached.
    """

    def __init__(
        self, cache: PagedCache, encoder: VisionEncoder, *, max_batch_tokens: int, max_sequences: int, tile_cost: int
    ) -> None:
        self.cache = cache
        self.encoder = encoder
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = min(max_sequences, max_batch_tokens)
        self.tile_cost = tile_cost
        self.waiting: dict[Request, None] = {}
        self.running: dict[Request, None] = {}
        self.variant = ""
        self.prompt_tokens = self.hit_tokens = self.vision_hits = self.vision_misses = 0

    def add(self, request: Request) -> None:
        """Queue a request."""
        request.timings.added_at = time.perf_counter()
        self.waiting[request] = None

    def remove(self, request: Request) -> bool:
        """Forget a request, finished or not, and release its blocks. Returns whether it was here."""
        if request in self.running:
            del self.running[request]
            self.cache.release(request.cache.sequence)
        elif request in self.waiting:
            del self.waiting[request]
        else:
            return False
        request.cache.tiles, request.cache.vision = {}, {}
        return True

    # Before a step

    def schedule(self) -> EngineStep:
        """Return the next step: one token of each running reply, then prompts, then new requests."""
        self.variant = self._next_variant()
        step = EngineStep(self.max_batch_tokens, self.variant)
        in_prefill = [request for request in self.running if request.in_prefill]
        for request in self.running:
            if not request.in_prefill and request.variant == step.variant:
                step.add(request, 1)
        for request in in_prefill:
            self._add_prefill(request, step)
        if self.waiting:
            self._admit(step)
        step.pieces.sort(key=lambda piece: piece.count > 1)  # single tokens share one fast path when they come first
        return step

    def _next_variant(self) -> str:
        """Return whose turn it is among the variants of running requests; if none run, that of the first to wait."""
        turns = sorted({request.variant for request in self.running or islice(self.waiting, 1)})
        return next((variant for variant in turns if variant > self.variant), turns[0] if turns else "")

    def _admit(self, step: EngineStep) -> None:
        """Start waiting requests while tokens, sequences and blocks last; those of another variant are computed in its turn."""
        pool = self.cache.pool
        # Hashes of the blocks that running requests are about to compute.
        coming = {prefix_hash for request in self.running for prefix_hash in self._hashes_ahead(request)}
        # Blocks that running requests have not taken yet, but may: what is left of them belongs to newcomers.
        reserved = sum(request.cache.max_blocks - len(request.cache.sequence.blocks) for request in self.running)
        for request in list(self.waiting):
            if step.budget <= 0 or len(self.running) == self.max_sequences:
                return
            # The last token of the prompt is always computed, since the reply follows from its hidden state. So at most
            # num_full blocks can be shared, and of the block behind them num_rest tokens.
            num_full, num_rest = divmod(request.num_prompt - 1, self.cache.block_size)
            hashes = request.prompt.hashes
            shared = pool.find(hashes[:num_full])
            # Another request is about to compute the next block of this prompt. Waiting for it saves computing it twice,
            # unless nothing but the last token is left. `continue`: those behind may overtake meanwhile.
            next_hash = hashes[len(shared) : len(shared) + 1]
            if coming.intersection(next_hash) and (len(shared) < num_full or num_rest):
                continue
            # A shared block that others use costs nothing. An evictable one counts as available until it is held, so it
            # is paid for like a new one. Nobody overtakes a request that lacks room, or large ones would wait forever.
            num_used = sum(pool.users[block] > 0 for block in shared)
            spare = pool.num_available - reserved - (request.cache.max_blocks - num_used)
            if spare < 0:
                return
            self._start(request, shared)
            # A block that is only partly common is copied: each request goes on writing into its own. The copy holds its
            # source for a moment, which may need one block more than the request itself.
            if len(shared) == num_full and num_rest and spare and hashes and hashes[num_full] in pool.cached:
                self.cache.append_copy(request.cache.sequence, pool.cached[hashes[num_full]], num_rest)
            request.cache.num_found = request.cache.sequence.length
            self.hit_tokens += request.cache.num_found
            reserved += request.cache.max_blocks - len(request.cache.sequence.blocks)
            coming.update(self._hashes_ahead(request))
            self._add_prefill(request, step)

    def _start(self, request: Request, shared: list[int]) -> None:
        """Move a request from waiting to running, with the blocks that it shares."""
        del self.waiting[request]
        self.running[request] = None
        self.cache.resume(request.cache.sequence, shared)
        request.cache.num_registered = len(shared)
        request.cache.last_hash = request.prompt.hashes[len(shared) - 1] if shared else b""
        request.timings.queue = time.perf_counter() - request.timings.added_at
        self.prompt_tokens += request.num_prompt

    def _hashes_ahead(self, request: Request) -> list[bytes]:
        """Return the hashes of the prompt's blocks that a running request has yet to compute."""
        return request.prompt.hashes[request.cache.num_registered :] if request.in_prefill else []

    def _add_prefill(self, request: Request, step: EngineStep) -> None:
        """Add the next piece of a prompt, or the tiles that must be encoded before it."""
        if step.budget <= 0 or request.variant != step.variant:
            return
        start = request.cache.sequence.length
        stop = request.num_prompt if request.unsplittable else min(request.num_prompt, start + self.max_batch_tokens)
        ready = self._add_tiles(request, start, stop, step)
        if request.unsplittable:
            # Longer than the budget allows: it runs beside single tokens only.
            if ready and all(piece.samples and piece.count == 1 for piece in step.pieces):
                step.add(request, stop - start)
        elif ready and step.budget > 0:
            step.add(request, min(stop - start, step.budget))

    def _add_tiles(self, request: Request, start: int, stop: int, step: EngineStep) -> bool:
        """Add the tiles shown between two positions, one at least to a step. Returns False if some wait for a later step."""
        for tile in request.prompt.tiles_between(start, stop):
            if tile in request.cache.vision:
                continue
            if (vision_UD := self.encoder.find(tile)) is not None:
                request.cache.vision[tile] = vision_UD
                self.vision_hits += 1
                continue
            if tile in step.tiles:
                self.vision_hits += 1
            elif step.tiles and step.budget < self.tile_cost:
                return False
            else:
                step.tiles[tile] = request.cache.tiles[tile]
                step.budget -= self.tile_cost
                self.vision_misses += 1
            step.tile_users.append((request, tile))
        return True

    # After a step

    def finish(self, step: EngineStep) -> None:
        """Register the blocks that were computed, so that others find them, and drop the tiles that were read."""
        for piece in step.pieces:
            request, state = piece.request, piece.request.cache
            self._register_blocks(piece)
            if piece.in_prompt:
                ahead = set(request.prompt.tiles_between(piece.stop, request.num_prompt))
                state.vision = {tile: vision_UD for tile, vision_UD in state.vision.items() if tile in ahead}
                if not request.in_prefill:
                    state.tiles = {}

    def _register_blocks(self, piece: Piece) -> None:
        request, state, size, pool = piece.request, piece.request.cache, self.cache.block_size, self.cache.pool
        prompt, blocks = request.prompt, state.sequence.blocks
        if request.unsplittable:
            return
        while (stop := (state.num_registered + 1) * size) <= piece.stop:
            number = state.num_registered
            if stop <= request.num_prompt:
                state.last_hash = prompt.hashes[number]
            else:  # the reply has filled a block, which a conversation that goes on will look for
                tokens = request.tokens_between(stop - size, stop)
                state.last_hash = prompt.hash_block(state.last_hash, stop - size, tokens)
            pool.register(blocks[number], state.last_hash)
            state.num_registered += 1
        # The block in which the prompt ends is found by the prompt's own tokens, too, while the reply goes on in it.
        if piece.in_prompt and request.num_prompt <= piece.stop and request.num_prompt % size:
            pool.register(blocks[request.num_prompt // size], prompt.hashes[-1])
