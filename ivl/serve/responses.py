"""Builds responses from streams of deltas: one JSON object, or server-sent events."""

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

from ivl.processing.tokenizer import Tokenizer
from ivl.serve import schemas
from ivl.serve.errors import APIError, to_api_error
from ivl.serve.guard import ClientGone, RequestContext, log
from ivl.serve.service import ReplyStream, merge
from ivl.types import TextDelta

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of work, which is cancelled when the client leaves. The request must have been read.

    Raises:
        ClientGone: if the client left.
    """
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGone
        return job.result()
    finally:
        for task in (job, gone):
            task.cancel()
        await asyncio.wait({job, gone})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends server-sent events until the client leaves. The connection limits how long a client may stop reading."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002, ASGI's signature
        async def send_events() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self.events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await while_connected(receive, send_events())


@dataclass
class ResponseBuilder:
    """Turns the replies to one request into its response.

    streams: body.n for each prompt, in order. deadline: time.perf_counter() at which the request ends. ping: seconds of
    silence after which a stream carries a comment.
    """

    context: RequestContext
    body: schemas.SamplingBody
    model: str
    streams: Sequence[ReplyStream]
    tokenizer: Tokenizer
    deadline: float
    ping: float

    def __post_init__(self) -> None:
        self.is_chat = isinstance(self.body, schemas.ChatRequest)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.context.id}"
        self.created = int(time.time())

    async def whole(self) -> BaseModel:
        """Return the complete response.

        Raises:
            APIError: if a reply cannot be finished.
        """
        replies: list[list[TextDelta]] = [[] for _ in self.streams]
        try:
            async with aclosing(merge(self.streams, deadline=self.deadline)) as batches:
                async for batch in batches:
                    for number, delta in batch:
                        replies[number].append(delta)
        finally:
            self._record()
        common = {"id": self.id, "created": self.created, "model": self.model, "usage": usage(self.streams, self.body.n)}
        if self.is_chat:
            choices = [
                schemas.ChatChoice(
                    index=number,
                    message=schemas.ResponseMessage(content=_text(deltas)),
                    logprobs=chat_logprobs(deltas, self.tokenizer),
                    finish_reason=deltas[-1].finish_reason or "stop",
                )
                for number, deltas in enumerate(replies)
            ]
            return schemas.ChatResponse(choices=choices, **common)
        return schemas.CompletionResponse(
            choices=[self._completion_choice(deltas, number, 0) for number, deltas in enumerate(replies)], **common
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the response in chunks. An error on the way is an event, too. The last event is always [DONE]."""
        try:
            if self.is_chat:
                for number in range(len(self.streams)):
                    yield self._chunk(
                        [schemas.ChunkChoice(index=number, delta=schemas.ChatDelta(role="assistant", content=""))]
                    )
            lengths = [0] * len(self.streams)
            async with aclosing(merge(self.streams, ping=self.ping, deadline=self.deadline)) as batches:
                async for batch in batches:
                    events = PING if not batch else b""
                    for number in sorted({number for number, _ in batch}):
                        deltas = [delta for n, delta in batch if n == number]
                        events += self._event(deltas, number, lengths[number])
                        lengths[number] += len(_text(deltas))
                    if events:
                        yield events
            if self.body.wants_usage:
                yield self._chunk([], usage(self.streams, self.body.n))
        except Exception as error:
            api_error = to_api_error(error)
            if api_error.status_code == 500 and not isinstance(error, APIError):
                log.error("stream failed", exc_info=error, extra={"fields": {"id": self.context.id}})
            self.context.facts["problem"] = api_error.code
            yield b"data: " + api_error.body + b"\n\n"
        finally:
            self._record()
        yield DONE

    def _event(self, deltas: Sequence[TextDelta], number: int, offset: int) -> bytes:
        """Return one chunk for all deltas of a reply that came together; empty if they have no content."""
        choice: schemas.ChunkChoice | schemas.CompletionChoice = self._completion_choice(deltas, number, offset)
        text, reason = choice.text, choice.finish_reason
        if self.is_chat:
            logprobs = chat_logprobs(deltas, self.tokenizer)
            choice = schemas.ChunkChoice(
                index=number, delta=schemas.ChatDelta(content=text), logprobs=logprobs, finish_reason=reason
            )
        return self._chunk([choice]) if text or reason or choice.logprobs else b""

    def _completion_choice(self, deltas: Sequence[TextDelta], number: int, offset: int) -> schemas.CompletionChoice:
        logprobs = completion_logprobs(deltas, self.tokenizer, offset, top=bool(getattr(self.body, "logprobs", None)))
        return schemas.CompletionChoice(
            index=number, text=_text(deltas), logprobs=logprobs, finish_reason=deltas[-1].finish_reason
        )

    def _chunk(self, choices: Sequence[BaseModel], usage: schemas.TokenUsage | None = None) -> bytes:
        kind = schemas.ChatChunk if self.is_chat else schemas.CompletionResponse
        chunk = kind(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)  # type: ignore[arg-type]
        content = chunk.model_dump(mode="json")
        if not self.body.wants_usage:
            del content["usage"]
        for choice in content["choices"]:
            if "delta" in choice:
                choice["delta"] = {key: value for key, value in choice["delta"].items() if value is not None}
        return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    def _record(self) -> None:
        self.context.facts |= facts(self.streams, self.body.n, self.context.arrived)


def _text(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def facts(streams: Sequence[ReplyStream], n: int, arrived: float) -> dict[str, Any]:
    """Return counts and times of a request, for the log and for metrics.

    Args:
        streams: n for each prompt, in order.
        n: Replies to each prompt.
        arrived: Time of arrival, by time.perf_counter().
    """
    requests, counts = [stream.request for stream in streams], usage(streams, n)
    first_tokens = [stream.started_at for stream in streams if stream.started_at is not None]
    figures = {
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
    return figures | ({"first_token_s": round(min(first_tokens) - arrived, 4)} if first_tokens else {})


def usage(streams: Sequence[ReplyStream], n: int) -> schemas.TokenUsage:
    """Return the tokens of a request. A prompt counts once, however many replies it has."""
    firsts = [stream.request for stream in streams[::n]]
    num_prompt, num_new = sum(r.num_prompt for r in firsts), sum(len(stream.request.tokens) for stream in streams)
    return schemas.TokenUsage(
        prompt_tokens=num_prompt,
        completion_tokens=num_new,
        total_tokens=num_prompt + num_new,
        prompt_tokens_details=schemas.PromptDetails(cached_tokens=sum(r.num_cached for r in firsts)),
    )


def chat_logprobs(deltas: Sequence[TextDelta], tokenizer: Tokenizer) -> schemas.ChatLogprobs | None:
    """Return the log-probabilities of the tokens of a piece of reply. Control tokens have no text and are left out."""
    content = [
        schemas.WireTokenLogprob(
            **_wire_token(tokenizer, scored.token, scored.logprob),
            top_logprobs=[schemas.TopLogprob(**_wire_token(tokenizer, token, logprob)) for token, logprob in scored.top],
        )
        for delta in deltas
        if (scored := delta.logprob) is not None and not tokenizer.is_control(scored.token)
    ]
    return schemas.ChatLogprobs(content=content) if content else None


def completion_logprobs(
    deltas: Sequence[TextDelta], tokenizer: Tokenizer, offset: int, *, top: bool
) -> schemas.CompletionLogprobs | None:
    """Return the same for /v1/completions. offset: where the piece begins in the reply."""
    scored = chat_logprobs(deltas, tokenizer)
    if scored is None:
        return None
    logprobs = schemas.CompletionLogprobs(top_logprobs=[] if top else None)
    for token in scored.content:
        logprobs.tokens.append(token.token)
        logprobs.token_logprobs.append(token.logprob)
        logprobs.text_offset.append(offset)
        offset += len(token.token)
        if logprobs.top_logprobs is not None:
            logprobs.top_logprobs.append({other.token: other.logprob for other in token.top_logprobs})
    return logprobs


def _wire_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """Return a token with its bytes, as it may be part of a character only. Tokens of a padded vocabulary have none."""
    content = tokenizer.token_bytes(token) if token < len(tokenizer) else b""
    return {"token": content.decode(errors="replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(content)}
