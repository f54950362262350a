"""One model over several ranks answers: people ask the engine of rank 0, and the others repeat its steps on their heads.

    rank 0     add, cancel, step: before it computes a step, it tells what its scheduler has done since the last one
    others     do the same with a scheduler of their own, and compute the step

A scheduler decides by what it was told alone, so all ranks put the same tokens into the same blocks of their caches. Tokens are
sampled on rank 0, for grammars and unseeded samplers are not repeated; their texts and clocks are nobody else's matter.

A step may fail on one rank, which then closes its connections to the ranks that wait for it inside the model. Rank 0 asks the
others what has failed, gives up the requests that ran, and all start over with empty caches and new connections.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from ivl.errors import InputError
from ivl.inference.engine import Engine, ProcessorLike
from ivl.inference.request import CacheState, HashedPrompt, Request, RequestTimes
from ivl.inference.sampling import SampledToken, Sampler
from ivl.inference.scheduler import EngineStep, Scheduler
from ivl.inference.text import TextStream
from ivl.model.cache import BlockPool
from ivl.model.vlm import VLM
from ivl.parallel.launch import START_TIMEOUT, set_timeout
from ivl.parallel.tensor import TensorVLM
from ivl.train.world import GRACE, RankLostError, World, is_of_group
from ivl.types import SamplingParams

PATIENCE = timedelta(seconds=15)
"""How long ranks that answer wait for one another."""
BEAT = 5.0
"""Seconds between two questions of an idle rank 0 whether the others are alive."""
SchedulerEvent = tuple[Any, ...]
"""What the scheduler of rank 0 did: ("add", number, NewRequest), ("remove", number), ("finish", tokens by number)."""


@dataclass(frozen=True)
class NewRequest:
    """What other ranks need to know of a request."""

    prompt: HashedPrompt
    max_new_tokens: int
    unsplittable: bool
    max_blocks: int
    tile_hashes: list[bytes]
    tiles_GSSC: torch.Tensor

    @classmethod
    def of(cls, request: Request) -> NewRequest:
        tiles = request.cache.tiles
        pixels_GSSC = torch.stack(list(tiles.values())) if tiles else torch.empty(0, dtype=torch.uint8)
        return cls(
            request.prompt, request.max_new_tokens, request.unsplittable, request.cache.max_blocks, list(tiles), pixels_GSSC
        )

    def request(self) -> Request:
        """Return a request whose reply is written elsewhere."""
        tiles = dict(zip(self.tile_hashes, self.tiles_GSSC, strict=True))
        return Request(
            prompt=self.prompt, max_new_tokens=self.max_new_tokens, unsplittable=self.unsplittable, variant="",
            sampler=Sampler(SamplingParams(), []), stream=TextStream(_Silent(), ()),
            cache=CacheState(self.max_blocks, tiles), timings=RequestTimes(),
        )  # fmt: skip


class _Silent:
    """Makes no text of tokens."""

    def push(self, _token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Channel:
    """Messages from rank 0 to the other ranks, over the CPU: a step, a question whether they are alive, or the end.

    It also holds the connections over which the ranks add up what their heads make of a step.
    """

    def __init__(self, world: World, model: TensorVLM) -> None:
        """Open the channel; all ranks do this together."""
        assert world.store is not None
        self.world, self.store, self.ranks = world, world.store, model.ranks
        self.group: Any = dist.new_group(backend="gloo", timeout=START_TIMEOUT)
        self.ranks.group = cast(dist.ProcessGroup, dist.new_group(timeout=START_TIMEOUT))
        self.failures = 0
        """How often the ranks have started over."""

    def start(self) -> None:
        """Expect the others to keep pace, from now on."""
        set_timeout(PATIENCE, self.group, self.ranks.group)

    def send(self, kind: str, events: Sequence[SchedulerEvent] = ()) -> None:
        """Tell all other ranks; for "alive" they must answer."""
        dist.broadcast_object_list([kind, events], src=0, group=self.group)
        if kind == "alive":
            dist.barrier(self.group)

    def receive(self) -> tuple[str, list[SchedulerEvent]] | None:
        """Return "step" or "over", what to do after these events; None at the end."""
        while True:
            message: list[Any] = [None, None]
            dist.broadcast_object_list(message, src=0, group=self.group)
            if message[0] == "alive":
                dist.barrier(self.group)
            else:
                return None if message[0] == "end" else (message[0], message[1])

    def hang_up(self, error: BaseException | None) -> None:
        """Close this rank's connections inside the model, so that nobody waits for it there; an error is noted for rank 0."""
        if error is not None:
            self.store.set(f"failure {self.failures} of {self.world.rank}", "" if is_of_group(error) else repr(error))
        if self.ranks.group is not None:
            group, self.ranks.group = self.ranks.group, None
            dist.destroy_process_group(group)

    def reasons(self, ended: Callable[[bool], str | None]) -> list[str]:
        """Return what has failed on other ranks, which tell so when they hang up; nothing where it was the network.

        Args:
            ended: as of LeadingEngine.

        Raises:
            RankLostError: if a rank has ended, or does not tell within GRACE seconds.
        """
        keys = {f"failure {self.failures} of {rank}": rank for rank in range(1, self.world.size)}
        until = time.monotonic() + GRACE
        while silent := [self._name(rank) for key, rank in keys.items() if not self.store.check([key])]:
            if (name := ended(True)) is not None:
                raise RankLostError(name)
            if time.monotonic() > until:
                raise RankLostError(f"{', '.join(silent)} ended, or stopped responding")
            time.sleep(0.02)
        told = {rank: self.store.get(key).decode() for key, rank in keys.items()}
        return [f"{self._name(rank)}: {reason}" for rank, reason in told.items() if reason]

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.store.get(f'host of {rank}').decode()}"

    def start_over(self, engine: Engine) -> None:
        """Connect the ranks anew, and empty the caches, in which they may differ; all ranks do this together."""
        self.failures += 1
        self.ranks.group = cast(dist.ProcessGroup, dist.new_group(timeout=PATIENCE))
        engine.cache.pool = BlockPool(engine.cache.num_blocks)
        engine.vision.cached.clear()
        engine.vision.num_bytes = 0


class TellingScheduler(Scheduler):
    """Notes what it does for other ranks."""

    events: list[SchedulerEvent]
    numbers: dict[Request, int]
    count: itertools.count[int]

    def add(self, request: Request) -> None:
        super().add(request)
        self.numbers[request] = next(self.count)
        self.events.append(("add", self.numbers[request], NewRequest.of(request)))

    def remove(self, request: Request) -> bool:
        found = super().remove(request)
        if found:
            self.events.append(("remove", self.numbers.pop(request)))
        return found


class LeadingEngine(Engine):
    """The engine of rank 0, which speaks for all ranks.

    Raises:
        RankLostError: from `step`, with the name of the rank, once another rank has ended or does not answer.
    """

    def __init__(
        self, model: VLM, processor: ProcessorLike, channel: Channel, *, ended: Callable[[bool], str | None] = lambda _: None,
        at_end: Callable[[bool], object] = lambda _: None, **options: Any,
    ) -> None:  # fmt: skip
        """Set up the engine; `start` begins to lead.

        Args:
            channel: to the other ranks.
            ended: names a process of another rank that has ended, or with True one that a signal has stopped, where that can
                be seen from here.
            at_end: called by `close`, with whether the others were told to end.
            options: of Engine.
        """
        super().__init__(model, processor, **options)
        self.channel, self.ended, self.at_end = channel, ended, at_end
        scheduler = self.scheduler
        scheduler.__class__ = TellingScheduler
        assert isinstance(scheduler, TellingScheduler)
        scheduler.events, scheduler.numbers, scheduler.count = [], {}, itertools.count()
        self.telling = scheduler
        self.lost: RankLostError | None = None
        self.on_lost: Callable[[RankLostError], object] = lambda _: None
        """Called once, in any thread, when another rank is lost."""
        self._spoke = time.monotonic()
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to lead: every rank has loaded its share."""
        self.channel.start()
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def step(self) -> None:
        with self._lock:
            if not (self.scheduler.waiting or self.scheduler.running):
                return
            if self._closed.is_set():
                raise InputError("the engine is closed: load the model again")
            if self.lost is not None:
                for request in [*self.scheduler.running, *self.scheduler.waiting]:
                    self.cancel(request)
                raise self.lost
            try:
                self._tell("step")
                super().step()
            except BaseException as error:
                self._start_over(error)
                raise
            finally:
                self._spoke = time.monotonic()

    def _tell(self, kind: str) -> None:
        events, self.telling.events = self.telling.events, []
        self.channel.send(kind, events)

    def _start_over(self, error: BaseException) -> None:
        """Bring all ranks to the same state again, without the requests that ran.

        Raises:
            RuntimeError: naming the rank on which the step failed, if that was another one.
            RankLostError: if a rank has ended or does not take part.
        """
        for request in list(self.scheduler.running):
            self.cancel(request)
        try:
            self.channel.hang_up(error)
            reasons = self.channel.reasons(self.ended) if is_of_group(error) else []
            self._tell("over")
            self.channel.start_over(self)
        except RankLostError as lost:
            raise self._lose(lost) from error
        except RuntimeError as again:
            raise self._lose(self._lost_by(again)) from error
        if reasons:
            raise RuntimeError("; ".join(reasons)) from error

    def _deliver(self, step: EngineStep, tokens: list[SampledToken | Exception]) -> None:
        sampling = [piece.request for piece in step.pieces if piece.samples]
        sampled = {
            self.telling.numbers[request]: token.token for request, token in zip(sampling, tokens, strict=True)
            if isinstance(token, SampledToken)
        }  # fmt: skip
        self.telling.events.append(("finish", sampled))
        super()._deliver(step, tokens)

    def close(self) -> None:
        """Let the other ranks end; nothing can be asked any more."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            if self.lost is None:
                with suppress(RuntimeError):  # it has just ended by itself
                    self.channel.send("end")
            self.at_end(self.lost is None)

    def _watch(self) -> None:
        """Ask the other ranks whether they are alive, as long as nothing else is told them."""
        while not self._closed.wait(min(BEAT, 1.0)) and self.lost is None:
            if (name := self.ended(False)) is not None:
                self._lose(RankLostError(name))
            elif time.monotonic() - self._spoke > BEAT and self._lock.acquire(blocking=False):
                try:
                    if not self._closed.is_set():
                        self.channel.send("alive")
                        self._spoke = time.monotonic()
                except RuntimeError as error:
                    self._lose(self._lost_by(error))
                finally:
                    self._lock.release()

    def _lose(self, error: RankLostError) -> RankLostError:
        """Note that a rank is lost, and return the first such error. Where a step waits for it without one, end the process."""
        if self.lost is None:
            self.lost = error
            self.on_lost(error)
        if not self._lock.acquire(timeout=GRACE):
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        self._lock.release()
        return self.lost

    def _lost_by(self, error: RuntimeError) -> RankLostError:
        """Name a process that has just died or is stopped, where it can be seen from here, or the ranks that do not answer."""
        until = time.monotonic() + 1
        while (name := self.ended(True)) is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.channel.world.lost(error) if name is None else RankLostError(name)


def _sample_nothing(logits_SV: torch.Tensor, samplers: list[Sampler]) -> list[SampledToken | Exception]:  # noqa: ARG001
    return []


@torch.inference_mode()
def follow(engine: Engine, channel: Channel) -> None:
    """Repeat the steps of rank 0's engine on this rank's heads until it ends.

    Raises:
        RuntimeError: of the process group, if it has ended otherwise.
    """
    channel.start()
    engine.runner.sample = _sample_nothing
    scheduler, requests, step, failed = engine.scheduler, dict[int, Request](), EngineStep(0), False
    while (message := channel.receive()) is not None:
        kind, events = message
        for event, *about in events:
            if event == "add":
                requests[about[0]] = about[1].request()
                scheduler.add(requests[about[0]])
            elif event == "remove":
                scheduler.remove(requests.pop(about[0]))
            elif not failed:
                scheduler.finish(step)
                for number, token in about[0].items():
                    requests[number].tokens.append(token)
        if kind == "over":
            channel.hang_up(None)
            channel.start_over(engine)
            failed = False
        elif not failed:
            try:
                step = scheduler.schedule()
                if step.requests:
                    engine.runner.run(step)
            except Exception as error:
                failed = True
                channel.hang_up(error)
