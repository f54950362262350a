"""What the next step computes, and which request may use what an earlier one has computed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from ivl.inference.request import Request
from ivl.inference.vision import VisionEncoder
from ivl.model.cache import PagedCache


@dataclass(frozen=True)
class Piece:
    """The next tokens of a request: the last one of its reply so far, or some of its prompt."""

    request: Request
    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether a new token follows: the prompt is read to its end."""
        return self.stop >= self.request.num_prompt


@dataclass
class Plan:
    """One step. budget: tokens that may still be added."""

    budget: int
    pieces: list[Piece] = field(default_factory=list)
    tiles: dict[bytes, torch.Tensor] = field(default_factory=dict)
    """Tiles to encode first, by key."""
    wanted: list[tuple[Request, bytes]] = field(default_factory=list)
    """Who waits for which of them."""

    def add(self, request: Request, count: int) -> None:
        self.pieces.append(Piece(request, request.sequence.length, count))
        self.budget -= count

    @property
    def requests(self) -> list[Request]:
        return list(dict.fromkeys([*(piece.request for piece in self.pieces), *(request for request, _ in self.wanted)]))


class Scheduler:
    """First come, first served, in steps of max_batch_tokens.

    Every running reply gets its token in every step; what is left of the budget goes to prompts in the order of their
    arrival, piece by piece. Encoding a tile is paid from the same budget, tile_cost tokens each, so that no step takes
    much longer than reading max_batch_tokens. A request starts when blocks for its longest possible reply are free, so
    none is ever thrown out again.

    A request whose prompt begins like one that is just being read waits for it, and is overtaken meanwhile: then it
    finds the common beginning in the cache.
    """

    def __init__(
        self, cache: PagedCache, encoder: VisionEncoder, *, max_batch_tokens: int, max_sequences: int, tile_cost: int
    ) -> None:
        if max_batch_tokens < 1 or max_sequences < 1:
            raise ValueError(f"need max_batch_tokens >= 1 and max_sequences >= 1, got {max_batch_tokens}, {max_sequences}")
        self.cache = cache
        self.encoder = encoder
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = min(max_sequences, max_batch_tokens)
        self.tile_cost = tile_cost
        self.waiting: dict[Request, None] = {}
        self.running: dict[Request, None] = {}
        self.prompt_tokens = self.hit_tokens = self.vision_hits = self.vision_misses = 0

    def add(self, request: Request) -> None:
        request.added_at = time.perf_counter()
        self.waiting[request] = None

    def remove(self, request: Request) -> bool:
        """Forget a request, finished or not; its blocks are free or kept. Whether it was here."""
        if request in self.running:
            del self.running[request]
            self.cache.release(request.sequence)
        elif request in self.waiting:
            del self.waiting[request]
        else:
            return False
        request.tiles, request.encoded = {}, {}
        return True

    # Before a step

    def plan(self) -> Plan:
        plan = Plan(self.max_batch_tokens)
        reading = [request for request in self.running if request.reading]
        for request in self.running:
            if not request.reading:
                plan.add(request, 1)
        for request in reading:
            self._read_on(request, plan)
        if self.waiting:
            self._admit(plan)
        plan.pieces.sort(key=lambda piece: piece.count > 1)  # single tokens share one fast path when they come first
        return plan

    def _admit(self, plan: Plan) -> None:
        pool = self.cache.pool
        coming = {name for request in self.running for name in self._unread(request)}
        promised = sum(request.blocks - len(request.sequence.blocks) for request in self.running)
        for request in list(self.waiting):
            if plan.budget <= 0 or len(self.running) == self.max_sequences:
                return
            # One token at least is left to compute: the last one, which the reply follows.
            last, rest = divmod(request.num_prompt - 1, self.cache.block_size)
            names = request.prompt.names
            found = pool.find(names[:last])
            if any(name in coming for name in names[len(found) : len(found) + 1]) and (len(found) < last or rest):
                continue
            used = sum(pool.users[block] > 0 for block in found)
            spare = pool.num_available - promised - (request.blocks - used)
            if spare < 0:
                return
            del self.waiting[request]
            self.running[request] = None
            self.cache.resume(request.sequence, found)
            if len(found) == last and rest and spare and names and names[last] in pool.cached:
                self.cache.append_copy(request.sequence, pool.cached[names[last]], rest)
            request.num_named, request.name = len(found), names[len(found) - 1] if found else b""
            request.num_cached = request.sequence.length
            request.queue = time.perf_counter() - request.added_at
            self.prompt_tokens += request.num_prompt
            self.hit_tokens += request.num_cached
            promised += request.blocks - len(request.sequence.blocks)
            coming.update(self._unread(request))
            self._read_on(request, plan)

    def _unread(self, request: Request) -> list[bytes]:
        """Names of the blocks of its prompt that a request is going to compute."""
        return request.prompt.names[request.num_named :] if request.reading else []

    def _read_on(self, request: Request, plan: Plan) -> None:
        """Plan the next piece of a prompt, or tiles that must be encoded before it."""
        if plan.budget <= 0:
            return
        start = request.sequence.length
        stop = request.num_prompt if request.whole else min(request.num_prompt, start + self.max_batch_tokens)
        ready = True
        for key in request.prompt.tile_keys(start, stop):
            if key in request.encoded:
                continue
            if (known := self.encoder.find(key)) is not None:
                request.encoded[key] = known
                self.vision_hits += 1
                continue
            if key not in plan.tiles:
                if plan.tiles and plan.budget < self.tile_cost:
                    ready = False
                    break
                plan.tiles[key] = request.tiles[key]
                plan.budget -= self.tile_cost
                self.vision_misses += 1
            else:
                self.vision_hits += 1
            plan.wanted.append((request, key))
        if request.whole:
            if ready and all(piece.samples and piece.count == 1 for piece in plan.pieces):
                plan.add(request, stop - start)
        elif ready and plan.budget > 0:
            plan.add(request, min(stop - start, plan.budget))

    # After a step

    def finish(self, plan: Plan) -> None:
        """What was computed can be found by others from now on; what was read is dropped."""
        for piece in plan.pieces:
            request = piece.request
            self._name_blocks(piece)
            if piece.start < request.num_prompt:
                left = set(request.prompt.tile_keys(piece.stop, request.num_prompt))
                request.encoded = {key: vision for key, vision in request.encoded.items() if key in left}
                if not request.reading:
                    request.tiles = {}

    def _name_blocks(self, piece: Piece) -> None:
        request, size, pool = piece.request, self.cache.block_size, self.cache.pool
        prompt, blocks = request.prompt, request.sequence.blocks
        if request.whole:
            return
        while (stop := (request.num_named + 1) * size) <= piece.stop:
            number = request.num_named
            if stop <= request.num_prompt:
                request.name = prompt.names[number]
            else:
                request.name = prompt.name(request.name, stop - size, request.tokens_at(stop - size, stop))
            pool.register(blocks[number], request.name)
            request.num_named += 1
        if piece.start < request.num_prompt <= piece.stop and request.num_prompt % size:
            pool.register(blocks[request.num_prompt // size], prompt.names[-1])
