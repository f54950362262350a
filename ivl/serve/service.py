"""The engine as a service: it lives in one thread of its own, and asyncio code gets its replies as streams.

    submit: thread pool prepares -> command queue -> engine thread: add, step, step, ... -> event loop: deltas by the batch

What reaches the event loop after a step is one call, however many replies advanced in it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ivl.inference.engine import Engine, EngineStats
from ivl.inference.request import Request
from ivl.processing.processor import Processor
from ivl.serve.config import ServeConfig
from ivl.serve.problems import Problem, internal
from ivl.types import Conversation, Prompt, SamplingParams, TextDelta

T = TypeVar("T")
TILES_AHEAD = 128
"""Preparation waits while so many tiles wait for the engine: each is 0.6 MB."""
MAX_FAILURES = 3
"""Failed steps in a row after which the service says that it is not ready."""
log = logging.getLogger("ivl.serve")


class Stream:
    """One reply on its way to a client: an async iterator of its deltas. request has its counts and timings.

    Raises:
        Problem: from the iterator, if the reply cannot be finished.
    """

    def __init__(self, service: Service, request: Request, ready: asyncio.Event) -> None:
        self.request = request
        self.ready = ready
        """Set when there is something to take; replies to one prompt share it."""
        self.ended = False
        self.problem: Problem | None = None
        self.started_at: float | None = None
        self._service = service
        self._deltas: deque[TextDelta] = deque()

    def take(self) -> list[TextDelta]:
        """All deltas that are there."""
        taken = list(self._deltas)
        self._deltas.clear()
        if not taken and self.problem is not None:
            raise self.problem
        return taken

    def cancel(self) -> None:
        """The reply is not wanted any more; the engine drops it before its next step. A finished one stays as it is."""
        if not self.ended:
            self._end(None)
            self._service._do(lambda: self._service._drop(self))

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        try:
            async for news in follow([self]):
                for _, delta in news:
                    yield delta
        finally:
            self.cancel()

    def _receive(self, deltas: Seq[TextDelta], problem: Problem | None) -> None:
        if self.ended:
            return
        if deltas and self.started_at is None:
            self.started_at = time.perf_counter()
            self._service._started(self)
        self._deltas.extend(deltas)
        if problem is not None or (deltas and deltas[-1].finish_reason is not None):
            self._end(problem)
        self.ready.set()

    def _end(self, problem: Problem | None) -> None:
        self.ended, self.problem = True, problem
        self._service._ended(self)
        self.ready.set()


async def follow(
    streams: Seq[Stream], *, ping: float | None = None, deadline: float | None = None
) -> AsyncGenerator[list[tuple[int, TextDelta]], None]:
    """What comes in several streams of one submission, with their numbers; an empty list after `ping` seconds of silence.

    Cancels what is left when closed early. deadline: time.perf_counter() by which all must have ended.

    Raises:
        Problem: as the streams, and 503 after the deadline.
    """
    ready = streams[0].ready
    try:
        while True:
            ready.clear()
            over = all(stream.ended for stream in streams)
            news = [(number, delta) for number, stream in enumerate(streams) for delta in stream.take()]
            if news:
                yield news
            elif over:
                return
            elif not ready.is_set():
                left = None if deadline is None else deadline - time.perf_counter()
                if left is not None and left <= 0:
                    raise Problem(503, "the reply took longer than a request may", code="timeout", retry_after=10)
                waits = [wait for wait in (ping, left) if wait is not None]
                try:
                    await asyncio.wait_for(ready.wait(), min(waits) if waits else None)
                except TimeoutError:
                    if ping is not None:
                        yield []
    finally:
        for stream in streams:
            stream.cancel()


class Service:
    """Replies to many clients at once. Use as `async with service:`; everything but `stats` belongs to that event loop."""

    def __init__(self, engine: Engine, config: ServeConfig | None = None) -> None:
        assert isinstance(engine.processor, Processor)
        self.engine = engine
        self.processor: Processor = engine.processor
        self.config = config or ServeConfig()
        self.capacity = engine.scheduler.max_sequences + self.config.max_queue
        self.draining = False
        self.num_cancelled = self.num_failed_steps = 0
        self._live: dict[Stream, None] = {}  # the engine thread's
        self._streams: set[Stream] = set()
        self._coming = 0
        self._tiles_ahead = 0
        self._seconds_per_reply = 1.0
        self._failures = 0
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False

    # Life

    async def __aenter__(self) -> Service:
        self._loop = asyncio.get_running_loop()
        self._stopped = self._loop.create_future()
        self._preparing = asyncio.Semaphore(self.config.prepare_threads)
        self._room = asyncio.Event()
        self._pool = ThreadPoolExecutor(self.config.prepare_threads, thread_name_prefix="prepare")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stop()
        self._do(self._halt)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def drain(self, seconds: float) -> None:
        """Take nothing new; what still runs after so many seconds ends with an error."""
        if not self.draining and self._loop is not None:
            self.draining = True
            self._loop.call_later(seconds, self.stop)

    def stop(self) -> None:
        """End everything now, with an error to those who wait."""
        self.draining = True
        if not self._stopped.done():
            self._stopped.set_result(None)
        for stream in list(self._streams):
            stream._end(stopping())
            self._do(lambda stream=stream: self._drop(stream))

    @property
    def ready(self) -> bool:
        """Whether new requests would be tried."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and not self.draining and self._failures < MAX_FAILURES

    @property
    def num_open(self) -> int:
        """Replies promised and not finished."""
        return len(self._streams) + self._coming

    def stats(self) -> EngineStats:
        return self.engine.stats()

    # In

    def check(self, count: int = 1) -> None:
        """Raises Problem 503 if nothing can be taken at all, 429 if not so many more replies at this time."""
        if not self.ready:
            raise stopping() if self.draining else Problem(503, "the engine has failed", code="not_ready", retry_after=30)
        if count > self.capacity:
            raise Problem(400, f"{count} replies at once, but there is room for {self.capacity}", param="n")
        if self.num_open + count > self.capacity:
            wait = self._seconds_per_reply * self.config.max_queue / self.engine.scheduler.max_sequences
            raise Problem(
                429, "too many requests at this time: try again later", code="queue_full", retry_after=min(60, max(1, wait))
            )

    async def submit(self, conversation: Conversation | Prompt, params: SamplingParams) -> Stream:
        """The stream of one reply.

        Raises:
            Problem: if there is no room, or the service ends.
            InputError: for what cannot be prepared.
        """
        return (await self.submit_all(conversation, [params]))[0]

    async def submit_all(
        self, conversation: Conversation | Prompt, params: Seq[SamplingParams], ready: asyncio.Event | None = None
    ) -> list[Stream]:
        """Streams of several replies to one conversation, which is prepared once. Raises as `submit`.

        ready: an event shared with other streams that are followed together with these.
        """
        self.check(len(params))
        self._coming += len(params)
        try:
            requests = await self.away(lambda: self.engine.prepare_all(conversation, params))
        finally:
            self._coming -= len(params)
        self.check_size(requests[0])
        if self._stopped.done():
            raise stopping()
        ready = ready or asyncio.Event()
        streams = [Stream(self, request, ready) for request in requests]
        self._streams.update(streams)
        self._tiles_ahead += sum(stream.request.num_tiles for stream in streams)
        self._do(lambda: self._add(streams))
        return streams

    async def away(self, work: Callable[[], T]) -> T:
        """The result of work in the pool, when the engine has caught up with what was prepared before."""
        task = asyncio.ensure_future(self._away(work))
        try:
            await asyncio.wait({task, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise stopping()
            return task.result()
        finally:
            task.cancel()

    async def _away(self, work: Callable[[], T]) -> T:
        assert self._loop is not None
        async with self._preparing:
            while self._tiles_ahead >= TILES_AHEAD:
                self._room.clear()
                await self._room.wait()
            return await self._loop.run_in_executor(self._pool, work)

    def check_size(self, request: Request) -> None:
        """Raises Problem 400 for more prompt tokens or tiles than are allowed."""
        limit, tiles = self.config.max_prompt_tokens, self.config.max_request_tiles
        if limit is not None and request.num_prompt > limit:
            message = f"the prompt has {request.num_prompt} tokens, the limit is {limit}"
            raise Problem(400, message, param="messages", code="context_length_exceeded")
        if request.num_tiles > tiles:
            raise Problem(400, f"the images and frames are {request.num_tiles} tiles, the limit is {tiles}", param="messages")

    def _started(self, stream: Stream) -> None:
        self._tiles_ahead -= stream.request.num_tiles
        self._room.set()

    def _ended(self, stream: Stream) -> None:
        if stream not in self._streams:
            return
        self._streams.discard(stream)
        if stream.started_at is None:
            self._started(stream)
        if stream.request.finish_reason is not None:
            seconds = time.perf_counter() - stream.request.timings.added_at
            self._seconds_per_reply += 0.1 * (seconds - self._seconds_per_reply)

    # The engine thread

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                if self._live:
                    self._step()
        finally:
            self._tell([(stream, (), internal()) for stream in self._live])

    def _obey(self) -> None:
        """Carry out all commands; wait for one if there is nothing to compute."""
        if not self._live:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get_nowait()()

    def _halt(self) -> None:
        self._stopping = True

    def _add(self, streams: list[Stream]) -> None:
        for stream in streams:
            if not stream.ended:
                self.engine.add(stream.request)
                self._live[stream] = None

    def _drop(self, stream: Stream) -> None:
        if stream in self._live:
            del self._live[stream]
            self.engine.cancel(stream.request)
            self.num_cancelled += 1

    def _step(self) -> None:
        try:
            self.engine.step()
            self._failures = 0
        except Exception as error:  # whatever it is, only those whose step it was are lost
            self._failures += 1
            self.num_failed_steps += 1
            log.error("step failed", exc_info=error, extra={"fields": {"failures": self._failures}})
            if not any(stream.request.cancelled for stream in self._live) or self._failures >= MAX_FAILURES:
                for stream in self._live:
                    self.engine.cancel(stream.request)
        news: list[tuple[Stream, Seq[TextDelta], Problem | None]] = []
        for stream in list(self._live):
            request = stream.request
            deltas = tuple(request.deltas)
            request.deltas.clear()
            if request.finish_reason is not None or request.cancelled:
                del self._live[stream]
            lost = request.cancelled and request.finish_reason is None
            if request.failure is not None:
                log.error("reply failed", exc_info=request.failure)
            if deltas or lost:
                news.append((stream, deltas, internal() if lost else None))
        if news:
            self._tell(news)

    def _tell(self, news: Seq[tuple[Stream, Seq[TextDelta], Problem | None]]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, news)


def _deliver(news: Seq[tuple[Stream, Seq[TextDelta], Problem | None]]) -> None:
    for stream, deltas, problem in news:
        stream._receive(deltas, problem)


def stopping() -> Problem:
    return Problem(503, "the server is shutting down", code="shutting_down", retry_after=5)
