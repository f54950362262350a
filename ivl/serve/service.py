"""Runs the engine in a thread of its own and gives asyncio code its replies as streams.

    submit: thread pool prepares -> command queue -> engine thread: add, step, step, ... -> event loop: deltas by the batch

The event loop gets one call per step, however many replies advanced in it.
"""

from __future__ import annotations

import asyncio
import collections
import copy
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from ivl.inference.engine import Engine
from ivl.inference.request import Request
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer
from ivl.serve.config import ServeConfig
from ivl.serve.errors import APIError, internal_error, stopping_error
from ivl.serve.turns import Turns, after
from ivl.types import Conversation, Prompt, SamplingParams, Text, TextDelta

T = TypeVar("T")
TILES_AHEAD = 128
"""Preparation waits while this many tiles wait for the engine: each is 0.6 MB."""
MAX_BATCH = 64
"""Deltas that are handed on at a time."""
MAX_FAILURES = 3
"""Failed steps in a row after which the service is not ready."""
log = logging.getLogger("ivl.serve")


News = tuple["ReplyStream", Sequence[TextDelta], APIError | None]
"""What a step has brought to a stream: its deltas, and an error that ends it."""


class ReplyStream:
    """One reply on its way to a client: an async iterator of its deltas. `request` has its counts and timings.

    Raises:
        APIError: from the iterator, if the reply cannot be finished.
    """

    def __init__(self, service: Service, request: Request, ready: asyncio.Event) -> None:
        self.service = service
        self.request = request
        self.ready = ready
        """Set when there are deltas to take; replies that are merged share it."""
        self.ended = False
        self.error: APIError | None = None
        self.started_at: float | None = None
        self._deltas: collections.deque[TextDelta] = collections.deque()

    def take(self) -> list[TextDelta]:
        """Take all deltas that are there.

        Raises:
            APIError: if there are none and the reply has failed.
        """
        taken = list(self._deltas)
        self._deltas.clear()
        if not taken and self.error is not None:
            raise self.error
        return taken

    def cancel(self) -> None:
        """Give up the reply; the engine drops it before its next step. Does nothing to a finished one."""
        if not self.ended:
            self.end(None)
            self.service.drop(self)

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        try:
            async for batch in merge([self]):
                for _, delta in batch:
                    yield delta
        finally:
            self.cancel()

    def receive(self, deltas: Sequence[TextDelta], error: APIError | None) -> None:
        """Add deltas; the last one, or an error, ends the stream."""
        if self.ended:
            return
        if deltas and self.started_at is None:
            self.started_at = time.perf_counter()
            self.service.on_started(self)
        self._deltas.extend(deltas)
        if error is not None or (deltas and deltas[-1].finish_reason is not None):
            self.end(error)
        self.ready.set()

    def end(self, error: APIError | None) -> None:
        """Mark the stream as ended."""
        self.ended, self.error = True, error
        self.service.on_ended(self)
        self.ready.set()


async def merge(
    streams: Sequence[ReplyStream], *, ping: float | None = None, deadline: float | None = None
) -> AsyncGenerator[list[tuple[int, TextDelta]], None]:
    """Yield the deltas of streams that share `ready`, as they come, each with the number of its stream.

    Closing the generator early cancels the streams.

    Args:
        ping: Seconds of silence after which an empty list comes.
        deadline: time.perf_counter() by which all streams must have ended.

    Raises:
        APIError: as the streams do, and 503 after the deadline.
    """
    ready = streams[0].ready
    try:
        while True:
            ready.clear()
            ended = all(stream.ended for stream in streams)  # before taking, or the last deltas might be missed
            batch = [(number, delta) for number, stream in enumerate(streams) for delta in stream.take()]
            for at in range(0, len(batch), MAX_BATCH):
                if at:
                    await asyncio.sleep(0)  # other streams go on while the last deltas become JSON
                yield batch[at : at + MAX_BATCH]
            if batch:
                continue
            if ended:
                return
            if not ready.is_set():
                left = None if deadline is None else deadline - time.perf_counter()
                if left is not None and left <= 0:
                    raise APIError(503, "the reply took longer than a request may", code="timeout", retry_after=10)
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
    """Replies to many clients at once, as `async with service:`. Of it, only `end` may be called outside that loop."""

    def __init__(self, engine: Engine, config: ServeConfig | None = None) -> None:
        assert isinstance(engine.processor, Processor)
        self.engine = engine
        self._stop = threading.local()
        self.processor: Processor = copy.copy(engine.processor)
        self.processor.load = self._while_wanted(self.processor.load)
        self.processor.resize = self._while_wanted(self.processor.resize)
        self.config = config or ServeConfig()
        self.capacity = engine.scheduler.max_sequences + self.config.max_queue
        self._token_bytes = max_token_bytes(self.processor.tokenizer)
        self.draining = False
        self.num_cancelled = self.num_failed_steps = 0
        self._live: dict[ReplyStream, None] = {}  # the engine thread's
        self._streams: set[ReplyStream] = set()
        self._coming = 0
        self._tiles_ahead = 0
        self._seconds_per_reply = 1.0
        self._failures = 0
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False

    # Start and end

    async def __aenter__(self) -> Service:
        self._loop = asyncio.get_running_loop()
        self._stopped = self._loop.create_future()
        self._preparing = Turns(self.config.prepare_threads)
        self._heavy = asyncio.Semaphore(max(1, self.config.prepare_threads - 1))
        self._heavy_turns = collections.defaultdict[str, asyncio.Lock](asyncio.Lock)
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
        """Refuse new requests; replies that still run after so many seconds end with an error."""
        if not self.draining and self._loop is not None:
            self.draining = True
            self._loop.call_later(seconds, self.stop)

    def end(self) -> None:
        """Have the event loop call `stop`; may be called in any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """End every reply now, with an error."""
        self.draining = True
        if not self._stopped.done():
            self._stopped.set_result(None)
        for stream in list(self._streams):
            stream.end(stopping_error())
            self.drop(stream)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and not self.draining and self._failures < MAX_FAILURES

    @property
    def num_open(self) -> int:
        """Number of replies that are promised and not finished."""
        return len(self._streams) + self._coming

    # Requests

    def check(self, count: int = 1) -> None:
        """Check whether so many more replies can be taken.

        Raises:
            APIError: 503 if none can be taken at all, 429 if not so many at this time, 400 if never.
        """
        if self.draining:
            raise stopping_error()
        if not self.ready:
            raise APIError(503, "the engine has failed", code="not_ready", retry_after=30)
        if count > self.capacity:
            raise APIError(400, f"{count} replies at once, but there is room for {self.capacity}", param="n")
        if self.num_open + count > self.capacity:
            wait = self._seconds_per_reply * self.config.max_queue / self.engine.scheduler.max_sequences
            message = "too many requests at this time: try again later"
            raise APIError(429, message, code="queue_full", retry_after=min(60, max(1, wait)))

    async def submit(self, conversation: Conversation | Prompt, params: SamplingParams) -> ReplyStream:
        """Return the stream of one reply. Raises as `submit_all`."""
        return (await self.submit_all(conversation, [params]))[0]

    async def submit_all(
        self,
        conversation: Conversation | Prompt,
        params: Sequence[SamplingParams],
        ready: asyncio.Event | None = None,
        *,
        group: str = "",
        heavy: bool = False,
        variant: str = "",
    ) -> list[ReplyStream]:
        """Return streams of replies to one conversation, which is prepared once.

        Args:
            params: Those of each reply.
            ready: The event of other streams that are merged with these.
            group: Only requests of one group share cached prompts.
            heavy: Whether preparing takes long, see `in_pool`.
            variant: Which of the engine's models replies.

        Raises:
            APIError: if there is no room, or the service ends.
            InputError: if the conversation cannot be prepared.
        """

        def prepare() -> list[Request]:
            started = time.perf_counter()
            prompt = conversation if isinstance(conversation, Prompt) else self.processor.prompt(conversation)
            requests = self.engine.prepare_all(prompt, params, group, variant)
            for request in requests:
                request.timings.prepare = time.perf_counter() - started
            return requests

        if not isinstance(conversation, Prompt):
            self.check_fits([part.text for message in conversation for part in message.content if isinstance(part, Text)])
        requests = await self.in_pool(prepare, group=group, heavy=heavy, count=len(params))
        self.check_size(requests[0])
        if self._stopped.done():
            raise stopping_error()
        ready = ready or asyncio.Event()
        streams = [ReplyStream(self, request, ready) for request in requests]
        self._streams.update(streams)
        self._tiles_ahead += sum(stream.request.num_tiles for stream in streams)
        self._do(lambda: self._add(streams))
        return streams

    def check_fits(self, texts: Sequence[str], param: str = "messages") -> None:
        """Check texts before they cost a tokenizer's time. Raises APIError 400 if they surely have too many tokens."""
        limit = min(self.config.max_prompt_tokens or self.engine.max_context, self.engine.max_context)
        least = sum(len(text.encode(errors="replace")) for text in texts) // self._token_bytes
        if least > limit:
            message = f"the text has {least} tokens or more, the limit is {limit}"
            raise APIError(400, message, param=param, code="context_length_exceeded")

    async def in_pool(self, work: Callable[[], T], *, group: str = "", heavy: bool = False, count: int = 1) -> T:
        """Return the result of work in the thread pool, which waits while the engine has enough prepared tiles ahead.

        When the caller is cancelled, work stops before its next image or frame.

        Args:
            group: Whose work it is. Groups take the threads by turns; heavy work of one group is done one by one.
            heavy: Whether it takes long; one thread is left to work that does not, if there are two.
            count: The number of replies that it prepares, which count as waiting meanwhile.

        Raises:
            APIError: if there is no room for so many, or the service ends.
        """
        self.check(count)
        self._coming += count
        task = asyncio.ensure_future(self._in_pool(work, group, heavy))
        try:
            await asyncio.wait({task, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise stopping_error()
            return task.result()
        finally:
            self._coming -= count
            task.cancel()

    async def _in_pool(self, work: Callable[[], T], group: str, heavy: bool) -> T:
        stop = threading.Event()

        def run() -> T:
            self._stop.event = stop
            try:
                return work()
            except Exception:
                raise
            except BaseException as error:  # the panic of a library in Rust
                raise RuntimeError("a library failed") from error

        with ExitStack() as turns:
            for turn in (self._heavy_turns[group], self._heavy) if heavy else ():
                await turn.acquire()
                turns.callback(turn.release)
            await self._preparing.acquire(group)
            turns.callback(self._preparing.release, group)
            while self._tiles_ahead >= TILES_AHEAD:
                self._room.clear()
                await self._room.wait()
            job = self._pool.submit(run)
            after(job, turns.pop_all().close)
        try:
            return await asyncio.wrap_future(job)
        finally:
            stop.set()

    def _while_wanted(self, function: Callable[..., T]) -> Callable[..., T]:
        """Return a function that does nothing any more once the work is given up in which it is called."""

        def wanted(*args: Any, **options: Any) -> T:
            if (stop := getattr(self._stop, "event", None)) is not None and stop.is_set():
                raise stopping_error()
            return function(*args, **options)

        return wanted

    def check_size(self, request: Request) -> None:
        """Check the size of a prompt. Raises APIError 400 for more tokens or tiles than are allowed."""
        limit, tiles = self.config.max_prompt_tokens, self.config.max_request_tiles
        if limit is not None and request.num_prompt > limit:
            message = f"the prompt has {request.num_prompt} tokens, the limit is {limit}"
            raise APIError(400, message, param="messages", code="context_length_exceeded")
        if request.num_tiles > tiles:
            raise APIError(400, f"the images and frames are {request.num_tiles} tiles, the limit is {tiles}", param="messages")

    def on_started(self, stream: ReplyStream) -> None:
        """Count the tiles of a reply as read: its first token has come."""
        self._tiles_ahead -= stream.request.num_tiles
        self._room.set()

    def on_ended(self, stream: ReplyStream) -> None:
        """Forget a stream that has ended."""
        if stream not in self._streams:
            return
        self._streams.discard(stream)
        if stream.started_at is None:
            self.on_started(stream)
        if stream.request.finish_reason is not None:
            seconds = time.perf_counter() - stream.request.timings.added_at
            self._seconds_per_reply += 0.1 * (seconds - self._seconds_per_reply)

    def drop(self, stream: ReplyStream) -> None:
        """Have the engine cancel a reply."""
        self._do(lambda: self._drop(stream))

    # The engine thread

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._run_commands()
                if self._live:
                    self._step()
        finally:
            self._report([(stream, (), internal_error()) for stream in self._live])

    def _run_commands(self) -> None:
        """Run all commands; wait for one if there is nothing to compute."""
        if not self._live:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get_nowait()()

    def _halt(self) -> None:
        self._stopping = True

    def _add(self, streams: list[ReplyStream]) -> None:
        for stream in streams:
            if not stream.ended:
                self.engine.add(stream.request)
                self._live[stream] = None

    def _drop(self, stream: ReplyStream) -> None:
        if stream in self._live:
            del self._live[stream]
            self.engine.cancel(stream.request)
            self.num_cancelled += 1

    def _step(self) -> None:
        try:
            self.engine.step()
            self._failures = 0
        except BaseException as error:  # whatever it is; the engine has cancelled the requests that cannot go on
            self._failures += 1
            self.num_failed_steps += 1
            log.error("step failed", exc_info=error, extra={"fields": {"failures": self._failures}})
            if self._failures >= MAX_FAILURES:
                for stream in self._live:
                    self.engine.cancel(stream.request)
        self._report([news for stream in list(self._live) if (news := self._collect(stream)) is not None])

    def _collect(self, stream: ReplyStream) -> News | None:
        """Take what a step has brought to a stream."""
        request = stream.request
        deltas = tuple(request.deltas)
        request.deltas.clear()
        if request.finish_reason is not None or request.cancelled:
            del self._live[stream]
        if request.failure is not None:
            log.error("reply failed", exc_info=request.failure)
        lost = request.cancelled and request.finish_reason is None
        return (stream, deltas, internal_error() if lost else None) if deltas or lost else None

    def _report(self, news: Sequence[News]) -> None:
        assert self._loop is not None
        if news and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, news)


def max_token_bytes(tokenizer: Tokenizer) -> int:
    """Return the most bytes of text that one token can stand for."""
    longest = max(map(len, map(str.encode, tokenizer.backend.get_vocab())), default=1)
    return longest if tokenizer.backend.normalizer is None else 3 * longest  # NFC composes up to nine bytes to three


def _deliver(news: Sequence[News]) -> None:
    for stream, deltas, error in news:
        stream.receive(deltas, error)
