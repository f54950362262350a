"""The routes. `create_app` returns a FastAPI application that a page may be mounted on; the Guard stands before that, too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from ivl.errors import InputError
from ivl.serve import conversation, replies
from ivl.serve.answers import Answer, EventStream, attended, known
from ivl.serve.auth import Keys
from ivl.serve.config import ServeConfig
from ivl.serve.guard import Guard, Note, log
from ivl.serve.media import MediaGateway
from ivl.serve.metrics import CONTENT_TYPE, Metrics
from ivl.serve.problems import Problem
from ivl.serve.protocol import Body, ChatRequest, CompletionRequest, Sampling, TokenizeRequest, problem_of
from ivl.serve.replies import ErrorReply
from ivl.serve.service import Service, Stream

B = TypeVar("B", bound=Body)
T = TypeVar("T")
BODIES = (ChatRequest, CompletionRequest, TokenizeRequest)
REFUSALS = {
    400: "Not understood, or beyond a limit", 401: "No valid key", 404: "No such model or page", 408: "Sent too slowly",
    413: "Too large", 415: "Not JSON", 421: "Another Host", 429: "Too busy", 500: "Failed", 503: "Not ready",
}  # fmt: skip
POST: dict[int | str, dict[str, Any]] = {k: {"model": ErrorReply, "description": text} for k, text in REFUSALS.items()}
GET: dict[int | str, dict[str, Any]] = {status: POST[status] for status in (401, 404, 421)}


def _reads(kind: type[B]) -> Callable[[Request], Awaitable[B]]:
    """A dependency: the body as a request of this kind, read only if the service takes requests at all."""

    async def body(request: Request) -> B:
        request.app.state.service.check()
        content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content != "application/json":
            raise Problem(415, "the body must be JSON, with `Content-Type: application/json`", code="unsupported_media_type")
        read = [chunk async for chunk in request.stream()]  # not request.body(), which would keep it
        try:
            return kind.model_validate_json(b"".join(read))
        except ValidationError as error:
            raise problem_of(error) from None

    return body


Chat = Annotated[ChatRequest, Depends(_reads(ChatRequest))]
Completion = Annotated[CompletionRequest, Depends(_reads(CompletionRequest))]
Tokenize = Annotated[TokenizeRequest, Depends(_reads(TokenizeRequest))]


def create_app(
    service: Service, config: ServeConfig, *, keys: Sequence[str] = (), gateway: MediaGateway | None = None
) -> FastAPI:
    """The application around a service, which starts and ends with it.

    keys: what opens it; none opens it to everybody who can reach it. app.state has service, config, gateway and metrics.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(
        title="ivl", summary="InternVL2.5 behind OpenAI's interface", lifespan=lifespan,
        docs_url=None, redoc_url=None,  # they would run scripts of another site beside the key
    )  # fmt: skip
    metrics = Metrics(service)
    app.state.service, app.state.config, app.state.metrics = service, config, metrics
    app.state.gateway = gateway or MediaGateway(config.media)

    def finished(note: Note) -> None:
        metrics.finished(note)
        fields = {"id": note.id, "route": note.route, "status": note.status, **note.facts}
        fields.setdefault("seconds", round(time.perf_counter() - note.arrived, 4))
        log.info("request", extra={"fields": fields})

    app.state.finished = finished
    app.add_middleware(Guard, config=config, keys=Keys(tuple(keys)), finished=finished)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(InputError, _input_problem)
    app.openapi = lambda: _document(app)  # what FastAPI's manual says to do
    _add_routes(app, service, config)
    _add_state(app, service, config, metrics)
    return app


def _add_routes(app: FastAPI, service: Service, config: ServeConfig) -> None:
    gateway: MediaGateway = app.state.gateway
    tokenizer = service.processor.tokenizer

    async def within(request: Request, work: Awaitable[T]) -> T:
        """The result of work, in the time a request may take, for a client that stays."""
        left = request.scope["ivl"].arrived + config.request_timeout - time.perf_counter()
        try:
            async with asyncio.timeout(left):
                return await attended(request.receive, work)
        except TimeoutError:
            raise Problem(503, "the request took longer than it may", code="timeout", retry_after=10) from None

    async def answer(request: Request, body: Sampling, submit: Awaitable[list[Stream]]) -> Response:
        note: Note = request.scope["ivl"]
        streams = await within(request, submit)
        request.scope["ivl.release"]()
        deadline = note.arrived + config.request_timeout
        made = Answer(note, body, config.names[0], streams, tokenizer, deadline, config.ping)
        if body.stream:
            return EventStream(made.events())
        whole = await attended(request.receive, made.whole())
        return Response(whole.model_dump_json(), media_type="application/json")

    @app.post("/v1/chat/completions", responses=_answers(replies.ChatReply), openapi_extra=_takes(ChatRequest), tags=["v1"])
    async def chat_completions(request: Request, body: Chat) -> Response:
        """A reply to a conversation with images and videos, whole or as server-sent events."""
        _check_model(body.model, config)
        params = conversation.params(body, config)

        async def submit() -> list[Stream]:
            asked = await conversation.conversation(body.messages, config, gateway, request.scope["ivl.hold"])
            body.messages.clear()  # they may be large, and a stream may be long
            return await service.submit_all(asked, params)

        return await answer(request, body, submit())

    @app.post("/v1/completions", responses=_answers(replies.TextReply), openapi_extra=_takes(CompletionRequest), tags=["v1"])
    async def completions(request: Request, body: Completion) -> Response:
        """What follows a text, without the model's template."""
        _check_model(body.model, config)
        params, prompts = conversation.params(body, config), body.prompts
        if not prompts or len(prompts) * body.n > config.max_n:
            message = f"{len(prompts)} prompts of {body.n} replies each: at least 1 and at most {config.max_n} replies"
            raise Problem(400, message, param="prompt")

        async def submit() -> list[Stream]:
            rendered = await service.away(lambda: [conversation.prompt(p, config, service.processor) for p in prompts])
            streams: list[Stream] = []
            ready = asyncio.Event()
            try:
                for prompt in rendered:
                    streams += await service.submit_all(prompt, params, ready)
            except BaseException:
                for stream in streams:
                    stream.cancel()
                raise
            return streams

        return await answer(request, body, submit())

    @app.post("/tokenize", response_model=replies.TokenizeReply, responses=POST, openapi_extra=_takes(TokenizeRequest))
    async def tokenize(request: Request, body: Tokenize) -> replies.TokenizeReply:
        """Token ids of a text, or of a conversation as the model gets it; those of images are placeholders."""
        _check_model(body.model, config)

        async def ids() -> list[int]:
            if body.messages is None:
                text = body.prompt or ""
                conversation.check_text([text], config, "prompt")
                return await service.away(lambda: tokenizer.encode(text))
            ready = await conversation.conversation(body.messages, config, gateway, request.scope["ivl.hold"])
            return await service.away(lambda: service.processor.prompt(ready).tokens_T.tolist())

        found = await within(request, ids())
        return replies.TokenizeReply(count=len(found), max_model_len=service.engine.max_context, tokens=found)

    created = replies.now()

    def card(name: str) -> replies.ModelCard:
        return replies.ModelCard(id=name, created=created, max_model_len=service.engine.max_context)

    @app.get("/v1/models", responses=GET, tags=["v1"])
    async def models() -> replies.ModelList:
        """The model under each of its names."""
        return replies.ModelList(data=[card(name) for name in config.names])

    @app.get("/v1/models/{name:path}", responses=GET, tags=["v1"])
    async def model(name: str) -> replies.ModelCard:
        """The model under one of its names."""
        _check_model(name, config)
        return card(name)


def _add_state(app: FastAPI, service: Service, config: ServeConfig, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> replies.Status:
        """Whether the process answers. The one route without a key."""
        return replies.Status(status="ok")

    @app.get("/ready", responses={**GET, 503: POST[503]})
    async def ready() -> replies.Status:
        """Whether requests are taken now."""
        service.check(0)
        return replies.Status(status="ready")

    @app.get("/metrics", responses={**GET, 200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def figures() -> Response:
        """Figures in the text format of Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _check_model(name: str, config: ServeConfig) -> None:
    if name and name not in config.names:
        known_names = ", ".join(config.names)
        raise Problem(404, f"there is no such model here; known: {known_names}", param="model", code="model_not_found")


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = error if isinstance(error, Problem) else Problem(error.status_code, str(error.detail))
    return JSONResponse(problem.content, problem.status_code, {**(error.headers or {}), **(problem.headers or {})})


async def _input_problem(request: Request, error: Exception) -> Response:
    return await _http_problem(request, known(error))


# The OpenAPI document


def _answers(kind: type[Any]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": kind, "content": {"text/event-stream": {"schema": {"type": "string"}}}}, **POST}


def _takes(kind: type[Body]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _document(app: FastAPI) -> dict[str, Any]:
    """Routes as FastAPI sees them, with the bodies that they read themselves, and how to give a key."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        _, bodies = models_json_schema([(kind, "validation") for kind in BODIES], ref_template="#/components/schemas/{model}")
        components = made.setdefault("components", {})
        components["schemas"] = components.get("schemas", {}) | bodies["$defs"]
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
        made["paths"]["/health"]["get"]["security"] = []
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = made
    return app.openapi_schema
