"""Builds responses from streams of deltas: one JSON object, or server-sent events.

Log-probabilities become JSON token by token, as they come: an encoder holds the interpreter, and with it every stream, for
as long as it works, and those of a long reply have megabytes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ivl.processing.tokenizer import Tokenizer
from ivl.serve.errors import APIError, to_api_error
from ivl.serve.guard import ClientGone, RequestContext, log
from ivl.serve.schemas import ChatRequest, CompletionRequest, SamplingBody
from ivl.serve.service import ReplyStream, merge
from ivl.serve.tools import CallReader
from ivl.types import FinishReason, TextDelta

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


def to_json(content: Any) -> str:
    """Return content as JSON without blanks."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


class JSONParts(Response):
    """Sends JSON in parts, each of which may be some megabytes."""

    media_type = "application/json"

    def __init__(self, parts: Sequence[bytes]) -> None:
        super().__init__(headers={"content-length": str(sum(map(len, parts)))})
        self.parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002, ASGI's signature
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@dataclass
class ReplyPiece:
    """Text and log-probabilities of a reply, or of what came of it at a time."""

    text: str = ""
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    scores: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """JSON of the log-probabilities: the items of each list, by its name."""
    offset: int = 0
    """Where the text of the next token begins in the reply."""
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Calls of tools, as OpenAI has them."""


@dataclass
class ResponseBuilder:
    """Turns the replies to one request into its response.

    streams: body.n for each prompt, in order. deadline: time.perf_counter() at which the request ends. ping: seconds of
    silence after which a stream carries a comment.
    """

    context: RequestContext
    body: SamplingBody
    model: str
    streams: Sequence[ReplyStream]
    tokenizer: Tokenizer
    deadline: float
    ping: float

    def __post_init__(self) -> None:
        self.is_chat = isinstance(self.body, ChatRequest)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.context.id}"
        self.created = int(time.time())
        offers_tools = isinstance(self.body, ChatRequest) and self.body.offered
        self.readers = [CallReader() for _ in self.streams] if offers_tools else []

    async def whole(self) -> list[bytes]:
        """Return the complete response as JSON, in parts that are quickly sent.

        Raises:
            APIError: if a reply cannot be finished.
        """
        replies = [ReplyPiece() for _ in self.streams]
        try:
            async with aclosing(merge(self.streams, deadline=self.deadline)) as batches:
                async for batch in batches:
                    for number, delta in batch:
                        self._add(replies[number], delta, number)
        finally:
            self._record()
        head = self._head("chat.completion") | {"usage": usage(self.streams, self.body.n)}
        parts = [f'{to_json(head)[:-1]},"choices":['.encode()]
        for number, reply in enumerate(replies):
            parts.append(b"," * (number > 0) + self._choice(reply, number).encode())
        return [*parts, b"]}"]

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the response in chunks. An error on the way is an event, too. The last event is always [DONE]."""
        try:
            if self.is_chat:
                for number in range(len(self.streams)):
                    yield self._chunk([self._choice(ReplyPiece(), number, {"role": "assistant"})])
            lengths = [0] * len(self.streams)
            async with aclosing(merge(self.streams, ping=self.ping, deadline=self.deadline)) as batches:
                async for batch in batches:
                    if events := self._events(batch, lengths) if batch else PING:
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

    def _events(self, batch: Sequence[tuple[int, TextDelta]], lengths: list[int]) -> bytes:
        """Return a chunk for each reply of which deltas with content came. lengths: the text of each so far."""
        pieces: dict[int, ReplyPiece] = {}
        for number, delta in batch:
            self._add(pieces.setdefault(number, ReplyPiece(offset=lengths[number])), delta, number)
            lengths[number] += len(delta.text)
        return b"".join(
            self._chunk([self._choice(piece, number, {"tool_calls": piece.calls} if piece.calls else {})])
            for number, piece in sorted(pieces.items())
            if piece.text or piece.finish_reason or piece.scores or piece.calls
        )

    def _add(self, piece: ReplyPiece, delta: TextDelta, number: int) -> None:
        """Add a delta of the reply of this number to what has come of it."""
        text, piece.finish_reason = delta.text, delta.finish_reason or piece.finish_reason
        if self.readers:
            reader = self.readers[number]
            text, calls = reader.push(text, last=delta.finish_reason is not None)
            piece.calls += calls
            if delta.finish_reason == "stop" and reader.num_calls:
                piece.finish_reason = "tool_calls"
        piece.text += text
        if (scored := delta.logprob) is None or self.tokenizer.is_control(scored.token):  # these have no text
            return
        token = self._token(scored.token, scored.logprob)
        top = [self._token(other, logprob) for other, logprob in scored.top]
        if self.is_chat:
            columns: dict[str, Any] = {"content": {**token, "top_logprobs": top}}
        else:
            columns = {"tokens": token["token"], "token_logprobs": token["logprob"], "text_offset": piece.offset}
            piece.offset += len(token["token"])
            if isinstance(self.body, CompletionRequest) and self.body.logprobs:
                columns["top_logprobs"] = {other["token"]: other["logprob"] for other in top}
        for name, value in columns.items():
            piece.scores[name].append(to_json(value))

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        """Return a token with its bytes, as it may be part of a character only. Tokens of a padded vocabulary have none."""
        content = self.tokenizer.token_bytes(token) if token < len(self.tokenizer) else b""
        text = content.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(content)}

    def _choice(self, piece: ReplyPiece, number: int, delta: dict[str, Any] | None = None) -> str:
        """Return a choice as JSON. delta: what a part of a stream of chat has beside its text."""
        choice: dict[str, Any] = {"index": number, "text": piece.text, "finish_reason": piece.finish_reason}
        if self.is_chat:
            del choice["text"]
            if delta is not None:
                choice["delta"] = delta if piece.calls and not piece.text else {"content": piece.text, **delta}
            else:
                calls = [{key: value for key, value in call.items() if key != "index"} for call in piece.calls]
                message = {"role": "assistant", "content": piece.text or (None if calls else ""), "refusal": None}
                choice["message"] = message | ({"tool_calls": calls} if calls else {})
        if isinstance(self.body, ChatRequest) and delta is None and self.body.logprobs:
            piece.scores.setdefault("content", [])  # of a reply that ends at once, too
        lists = [f'"{name}":[{",".join(items)}]' for name, items in piece.scores.items()]
        lists += ['"refusal":null'] if self.is_chat else [] if "top_logprobs" in piece.scores else ['"top_logprobs":null']
        logprobs = "{" + ",".join(lists) + "}" if piece.scores else "null"
        return f'{to_json(choice)[:-1]},"logprobs":{logprobs}}}'

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind if self.is_chat else "text_completion", "created": self.created, "model": self.model,
        }  # fmt: skip

    def _chunk(self, choices: Sequence[str], counts: dict[str, Any] | None = None) -> bytes:
        head = self._head("chat.completion.chunk") | ({"usage": counts} if self.body.wants_usage else {})
        return f'data: {to_json(head)[:-1]},"choices":[{",".join(choices)}]}}\n\n'.encode()

    def _record(self) -> None:
        self.context.facts |= facts(self.streams, self.body.n, self.context.arrived)


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
        "prompt_tokens": counts["prompt_tokens"],
        "cached_tokens": counts["prompt_tokens_details"]["cached_tokens"],
        "new_tokens": counts["completion_tokens"],
        "tiles": sum(request.num_tiles for request in requests[::n]),
        "replies": len(requests),
        "finish": [request.finish_reason or "none" for request in requests],
        "prepare_s": round(requests[0].timings.prepare, 4),
        "queue_s": round(max(request.timings.queue for request in requests), 4),
        "seconds": round(time.perf_counter() - arrived, 4),
    }
    return figures | ({"first_token_s": round(min(first_tokens) - arrived, 4)} if first_tokens else {})


def usage(streams: Sequence[ReplyStream], n: int) -> dict[str, Any]:
    """Return the tokens of a request. A prompt counts once, however many replies it has."""
    firsts = [stream.request for stream in streams[::n]]
    num_prompt, num_new = sum(r.num_prompt for r in firsts), sum(len(stream.request.tokens) for stream in streams)
    return {
        "prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(r.num_cached for r in firsts)},
    }  # fmt: skip
