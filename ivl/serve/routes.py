"""The routes of the API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import ValidationError
from pydantic_core import from_json

from ivl.serve.body import BodyReader
from ivl.serve.config import ServeConfig
from ivl.serve.conversation import check_lengths, check_text, load_conversation, plain_prompt, sampling_params
from ivl.serve.errors import APIError
from ivl.serve.guard import RequestContext
from ivl.serve.media import MediaGateway
from ivl.serve.metrics import CONTENT_TYPE, Metrics
from ivl.serve.openapi import described
from ivl.serve.responses import EventStream, JSONParts, ResponseBuilder, to_json, while_connected
from ivl.serve.schemas import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    RequestPart,
    SamplingBody,
    TokenizeRequest,
    Tool,
    validation_error,
)
from ivl.serve.service import ReplyStream, Service
from ivl.types import Conversation
from ivl.utils.machine import return_freed_memory

B = TypeVar("B", ChatRequest, CompletionRequest, TokenizeRequest)
T = TypeVar("T")
STATUSES = {
    400: "Not understood, or beyond a limit", 401: "No valid key", 404: "No such model or page", 408: "Sent too slowly",
    413: "Too large", 415: "Not JSON", 421: "Another Host", 429: "Too busy", 500: "Failed", 503: "Not ready",
}  # fmt: skip
POST: dict[int | str, dict[str, Any]] = {status: described(text, "error") for status, text in STATUSES.items()}
GET: dict[int | str, dict[str, Any]] = {status: POST[status] for status in (401, 404, 421)}
HEAVY_PIXELS = 16_000_000
"""Pixels of a request that may not take the last thread that prepares: half a second of decoding."""
TOKENS_AT_ONCE = 10_000
"""Token ids that become JSON at a time: an encoder holds the interpreter."""
router = APIRouter()


class RouteContext:
    """What a route works with, as a dependency: the service, its configuration and the request."""

    def __init__(self, request: Request) -> None:
        state = request.app.state
        self.service: Service = state.service
        self.config: ServeConfig = state.config
        self.gateway: MediaGateway = state.gateway
        self.metrics: Metrics = state.metrics
        self.created: int = state.created
        self.request = request
        self.context: RequestContext = request.scope["ivl"]

    @property
    def deadline(self) -> float:
        """time.perf_counter() at which the request ends."""
        return self.context.arrived + self.config.request_timeout

    async def within_deadline(self, work: Awaitable[T]) -> T:
        """Return the result of work, in the time that a request may take, while its client stays."""
        try:
            async with asyncio.timeout(self.deadline - time.perf_counter()):
                return await while_connected(self.request.receive, work)
        except TimeoutError:
            raise APIError(503, "the request took longer than it may", code="timeout", retry_after=10) from None

    async def respond(self, body: SamplingBody, submit: Awaitable[list[ReplyStream]]) -> Response:
        """Return the response from streams that submit gives."""
        streams = await self.within_deadline(submit)
        self.context.release()
        self.context.media.clear()
        tokenizer = self.service.processor.tokenizer
        name = self.variant_of(body.model) or self.config.names[0]
        builder = ResponseBuilder(self.context, body, name, streams, tokenizer, self.deadline, self.config.ping)
        if body.stream:
            return EventStream(builder.events())
        return JSONParts(await while_connected(self.request.receive, builder.whole()))

    async def read(self, kind: type[B]) -> B:
        """Return the body as a request of this kind, if the service takes requests at all."""
        self.service.check()
        content_type = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise APIError(415, "the body must be JSON, with `Content-Type: application/json`", code="unsupported_media_type")
        reader = BodyReader(self.config)
        async for chunk in self.request.stream():
            reader.feed(chunk)
        reader.feed(b"", last=True)
        self.context.media = reader.media
        try:
            content = from_json(reader.rest, allow_inf_nan=False)
            check_lengths(content, self.config)
            body = kind.model_validate(content)
        except ValidationError as error:
            raise validation_error(error) from None
        except ValueError:
            raise APIError(400, "the body is not valid JSON", code="invalid_json") from None
        self.check_model(body.model)
        return body

    async def load(self, messages: list[ChatMessage], tools: list[Tool]) -> Conversation:
        """Return messages as a conversation whose media are fetched and checked, with tools that the reply may call."""
        return await load_conversation(messages, tools, self.config, self.gateway, self.context, self.service.processor)

    def check_model(self, name: str) -> None:
        """Raise APIError 404 for a name that the model does not have."""
        if name and name not in self.names:
            names = ", ".join(self.names)
            raise APIError(404, f"there is no such model here; known: {names}", param="model", code="model_not_found")

    @property
    def names(self) -> list[str]:
        """The names that a request may give: those of the model, and its adapters."""
        return [*self.config.names, *filter(None, self.service.engine.models)]

    def variant_of(self, name: str) -> str:
        """Return which of the engine's models a request means."""
        return name if name in self.service.engine.models else ""

    def card(self, name: str) -> dict[str, Any]:
        """Return the model under one of its names."""
        context = self.service.engine.max_context
        parent = {"parent": self.config.names[0]} if self.variant_of(name) else {}
        return {"id": name, "object": "model", "created": self.created, "owned_by": "ivl", "max_model_len": context, **parent}


Shared = Annotated[RouteContext, Depends()]


def _describe(body: type[RequestPart], response: str, *, streams: bool = False) -> dict[str, Any]:
    """Return the arguments by which a route tells the OpenAPI document what it reads itself and what it answers."""
    schema, success = {"$ref": f"#/components/schemas/{body.__name__}"}, described("The response", response)
    if streams:
        success["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "responses": {200: success, **POST},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    }


@router.post("/v1/chat/completions", **_describe(ChatRequest, "chat", streams=True), tags=["v1"])
async def chat_completions(shared: Shared) -> Response:
    """A reply to a conversation with images and videos, whole or as server-sent events."""
    body = await shared.read(ChatRequest)
    params = sampling_params(body, shared.config)

    async def submit() -> list[ReplyStream]:
        conversation = await shared.load(body.messages, body.offered)
        body.messages.clear()  # they may be large, and a stream may be long
        heavy = shared.context.pixels > HEAVY_PIXELS or params[0].guide is not None
        variant = shared.variant_of(body.model)
        return await shared.service.submit_all(conversation, params, group=shared.context.group, heavy=heavy, variant=variant)

    return await shared.respond(body, submit())


@router.post("/v1/completions", **_describe(CompletionRequest, "completion", streams=True), tags=["v1"])
async def completions(shared: Shared) -> Response:
    """The continuation of a text, without the model's template."""
    body = await shared.read(CompletionRequest)
    service, config = shared.service, shared.config
    params, prompts = sampling_params(body, config), body.prompts
    if not prompts or len(prompts) * body.n > config.max_n:
        reason = f"{len(prompts)} prompts of {body.n} replies each: at least 1 and at most {config.max_n} replies"
        raise APIError(400, reason, param="prompt")

    async def submit() -> list[ReplyStream]:
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        check_text(texts, config, "prompt")
        for text in texts:
            service.check_fits([text], "prompt")
        rendered = await service.in_pool(
            lambda: [plain_prompt(prompt, service.processor) for prompt in prompts],
            group=shared.context.group, count=len(prompts) * body.n,
        )  # fmt: skip
        streams: list[ReplyStream] = []
        ready = asyncio.Event()
        try:
            for prompt in rendered:
                heavy, variant = params[0].guide is not None, shared.variant_of(body.model)
                streams += await service.submit_all(
                    prompt, params, ready, group=shared.context.group, heavy=heavy, variant=variant
                )
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    return await shared.respond(body, submit())


@router.post("/tokenize", **_describe(TokenizeRequest, "tokens"))
async def tokenize(shared: Shared) -> Response:
    """Token ids of a text, or of a conversation as the model gets it; those of images are placeholders."""
    body = await shared.read(TokenizeRequest)
    service, processor, group = shared.service, shared.service.processor, shared.context.group

    async def encode() -> list[bytes]:
        if body.messages is None:
            text = body.prompt or ""
            check_text([text], shared.config, "prompt")
            return await service.in_pool(lambda: parts(processor.tokenizer.encode(text)), group=group)
        conversation = await shared.load(body.messages, body.tools)
        heavy = shared.context.pixels > HEAVY_PIXELS
        return await service.in_pool(lambda: parts(processor.prompt(conversation).tokens_T.tolist()), group=group, heavy=heavy)

    def parts(tokens: list[int]) -> list[bytes]:
        if len(tokens) > TOKENS_AT_ONCE:
            return_freed_memory()  # the tokenizer's: some 200 bytes for each token of a long text
        slices = [to_json(tokens[at : at + TOKENS_AT_ONCE])[1:-1] for at in range(0, len(tokens), TOKENS_AT_ONCE)]
        head = to_json({"count": len(tokens), "max_model_len": service.engine.max_context})
        return [head[:-1].encode(), b',"tokens":[', ",".join(slices).encode(), b"]}"]

    return JSONParts(await shared.within_deadline(encode()))


@router.get("/v1/models", responses={**GET, 200: described("The models", "models")}, tags=["v1"])
async def models(shared: Shared) -> dict[str, Any]:
    """The model under each of its names, and its adapters."""
    return {"object": "list", "data": [shared.card(name) for name in shared.names]}


@router.get("/v1/models/{name:path}", responses={**GET, 200: described("The model", "model")}, tags=["v1"])
async def model(shared: Shared, name: str) -> dict[str, Any]:
    """The model under one of its names."""
    if not name or not shared.request.scope["path"].endswith(f"/{name}"):  # name lacks a newline at the end of the path
        raise APIError(404, "there is no such model here", param="model", code="model_not_found")
    shared.check_model(name)
    return shared.card(name)


@router.get("/health", responses={200: described("Alive", "status")})
async def health() -> dict[str, str]:
    """Whether the process answers. It needs no key."""
    return {"status": "ok"}


@router.get("/ready", responses={**GET, 200: described("Ready", "status"), 503: POST[503]})
async def ready(shared: Shared) -> dict[str, str]:
    """Whether requests are taken now."""
    shared.service.check(0)
    return {"status": "ready"}


@router.get("/metrics", responses={**GET, 200: {"content": {"text/plain": {}}}}, response_class=Response)
async def metrics(shared: Shared) -> Response:
    """Figures in the text format of Prometheus."""
    return Response(shared.metrics.text(), media_type=CONTENT_TYPE)
