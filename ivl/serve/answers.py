"""Streams of deltas into answers: one JSON object, or server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ivl.errors import InputError
from ivl.processing.tokenizer import Tokenizer
from ivl.serve import replies
from ivl.serve.guard import ClientGone, Note, log
from ivl.serve.problems import Problem, internal
from ivl.serve.protocol import ChatRequest, Sampling
from ivl.serve.service import Stream, follow
from ivl.types import FinishReason, TextDelta

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


async def attended(receive: Receive, work: Awaitable[T]) -> T:
    """The result of work, which ends when the client leaves. The request must have been read.

    Raises:
        ClientGone: if it did.
    """
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGone
        return job.result()
    finally:
        for task in (job, gone):
            task.cancel()
        await asyncio.wait({job, gone})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, ended when the client leaves. How long it may stop reading is the connection's business."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def talk() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self.events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await attended(receive, talk())


@dataclass
class Answer:
    """The replies to one request, on their way to its client.

    streams: n for each prompt, in order. body: what was asked.
    """

    note: Note
    body: Sampling
    model: str
    streams: Sequence[Stream]
    tokenizer: Tokenizer
    deadline: float
    ping: float

    def __post_init__(self) -> None:
        self.chat = isinstance(self.body, ChatRequest)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.note.id}"
        self.created = replies.now()

    async def whole(self) -> BaseModel:
        """The complete answer.

        Raises:
            Problem: if a reply cannot be finished.
        """
        said: list[list[TextDelta]] = [[] for _ in self.streams]
        try:
            async with aclosing(follow(self.streams, deadline=self.deadline)) as batches:
                async for news in batches:
                    for number, delta in news:
                        said[number].append(delta)
        finally:
            self.note.facts |= facts(self.streams, self.body.n, self.note.arrived)
        named = {"id": self.id, "created": self.created, "model": self.model, "usage": usage(self.streams, self.body.n)}
        texts = ["".join(delta.text for delta in deltas) for deltas in said]
        reasons: list[FinishReason] = [deltas[-1].finish_reason or "stop" for deltas in said]
        if self.chat:
            return replies.ChatReply(
                choices=[
                    replies.ChatChoice(
                        index=number,
                        message=replies.ReplyMessage(content=text),
                        logprobs=replies.scores(said[number], self.tokenizer),
                        finish_reason=reasons[number],
                    )
                    for number, text in enumerate(texts)
                ],
                **named,
            )
        return replies.TextReply(
            choices=[
                replies.TextChoice(
                    index=number, text=text, logprobs=self._text_scores(said[number], 0), finish_reason=reasons[number]
                )
                for number, text in enumerate(texts)
            ],
            **named,
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer in chunks; what goes wrong on the way is an error event. The last event is always [DONE]."""
        try:
            if self.chat:
                for number in range(len(self.streams)):
                    yield self._event([TextDelta("")], number, 0, opening=True)
            sent = [0] * len(self.streams)
            async with aclosing(follow(self.streams, ping=self.ping, deadline=self.deadline)) as batches:
                async for news in batches:
                    out = PING if not news else b""
                    for number in sorted({number for number, _ in news}):
                        deltas = [delta for n, delta in news if n == number]
                        out += self._event(deltas, number, sent[number])
                        sent[number] += sum(len(delta.text) for delta in deltas)
                    if out:
                        yield out
            if self.body.wants_usage:
                yield self._data([], usage(self.streams, self.body.n))
        except Exception as error:
            problem = known(error)
            if problem.status_code == 500 and not isinstance(error, Problem):
                log.error("stream failed", exc_info=error, extra={"fields": {"id": self.note.id}})
            self.note.facts["problem"] = problem.code
            yield b"data: " + problem.body + b"\n\n"
        finally:
            self.note.facts |= facts(self.streams, self.body.n, self.note.arrived)
        yield DONE

    def _event(self, deltas: Sequence[TextDelta], number: int, offset: int, *, opening: bool = False) -> bytes:
        """One chunk for all deltas of a reply that came together; nothing if they say nothing."""
        text, reason = "".join(delta.text for delta in deltas), deltas[-1].finish_reason
        if self.chat:
            scores = replies.scores(deltas, self.tokenizer)
            if not (text or reason or scores or opening):
                return b""
            delta = replies.Delta(role="assistant" if opening else None, content=text)
            return self._data([replies.ChunkChoice(index=number, delta=delta, logprobs=scores, finish_reason=reason)])
        scores = self._text_scores(deltas, offset)
        if not (text or reason or scores):
            return b""
        return self._data([replies.TextChoice(index=number, text=text, logprobs=scores, finish_reason=reason)])

    def _data(self, choices: Sequence[BaseModel], usage: replies.Usage | None = None) -> bytes:
        kind = replies.ChatChunk if self.chat else replies.TextReply
        chunk = kind(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)  # type: ignore[arg-type]
        written = chunk.model_dump(mode="json")
        if not self.body.wants_usage:
            del written["usage"]
        for choice in written["choices"]:
            if "delta" in choice:
                choice["delta"] = {key: value for key, value in choice["delta"].items() if value is not None}
        return b"data: " + json.dumps(written, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    def _text_scores(self, deltas: Sequence[TextDelta], offset: int) -> replies.TextScores | None:
        return replies.text_scores(deltas, self.tokenizer, offset, top=bool(getattr(self.body, "logprobs", None)))


def facts(streams: Sequence[Stream], n: int, arrived: float) -> dict[str, Any]:
    """Counts and times of n replies to each prompt, for the log and for metrics. arrived: time.perf_counter()."""
    requests, counts = [stream.request for stream in streams], usage(streams, n)
    started = [stream.started_at for stream in streams if stream.started_at is not None]
    found = {
        "prompt_tokens": counts.prompt_tokens,
        "cached_tokens": counts.prompt_tokens_details.cached_tokens,
        "new_tokens": counts.completion_tokens,
        "tiles": sum(request.num_tiles for request in requests[::n]),
        "replies": len(requests),
        "finish": [request.finish_reason or "none" for request in requests],
        "prepare_s": round(requests[0].timings.prepare, 4),
        "queue_s": round(max(request.timings.queue for request in requests), 4),
        "seconds": round(time.perf_counter() - arrived, 4),
    }
    return found | ({"first_token_s": round(min(started) - arrived, 4)} if started else {})


def usage(streams: Sequence[Stream], n: int) -> replies.Usage:
    """A prompt counts once, however many replies it has."""
    firsts = [stream.request for stream in streams[::n]]
    new = sum(len(stream.request.tokens) for stream in streams)
    return replies.usage(sum(r.num_prompt for r in firsts), new, sum(r.num_cached for r in firsts))


def known(error: Exception) -> Problem:
    """Any error as one that may be shown."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, InputError):
        return Problem(getattr(error, "status", 400), str(error), code="invalid_value")
    return internal()
