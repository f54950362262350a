"""Builds the FastAPI application, with the page or without it. Guard stands before the page, too."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ivl.errors import InputError
from ivl.serve.auth import Keys
from ivl.serve.config import ServeConfig
from ivl.serve.errors import to_api_error
from ivl.serve.guard import OPEN, Guard, RequestContext, log
from ivl.serve.media import MediaGateway
from ivl.serve.metrics import Metrics
from ivl.serve.openapi import document
from ivl.serve.page import FILES, add_page
from ivl.serve.routes import router
from ivl.serve.service import Service


def create_app(
    service: Service,
    config: ServeConfig,
    *,
    keys: Sequence[str] = (),
    gateway: MediaGateway | None = None,
    page_of: Path | None = None,
) -> FastAPI:
    """Return the application around a service, which starts and ends with it.

    app.state has service, config, gateway, metrics, has_page and has_keys.

    Args:
        keys: Keys that open the server; without one it is open to everybody who can reach it.
        gateway: The gateway for media; by default one within config.media.
        page_of: Directory of the model, for a page at /; None serves no page.

    Raises:
        InputError: if the page's examples cannot be read.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(
        title="ivl", summary="InternVL2.5 behind OpenAI's interface", lifespan=lifespan,
        docs_url=None, redoc_url=None,  # they would run scripts of another site beside the key
    )  # fmt: skip
    metrics = Metrics(service)

    def finished(context: RequestContext) -> None:
        metrics.finished(context)
        fields = {"id": context.id, "route": context.route, "status": context.status, **context.facts}
        fields.setdefault("seconds", round(time.perf_counter() - context.arrived, 4))
        log.info("request", extra={"fields": fields})

    app.state.service, app.state.config, app.state.metrics = service, config, metrics
    app.state.gateway, app.state.created = gateway or MediaGateway(config.media), int(time.time())
    app.state.has_page, app.state.has_keys = page_of is not None, bool(keys)
    open_paths = (*OPEN, *FILES) if page_of is not None else OPEN
    app.add_middleware(Guard, config=config, keys=Keys(tuple(keys)), finished=finished, open_paths=open_paths)
    app.add_exception_handler(HTTPException, _error_response)
    app.add_exception_handler(InputError, _error_response)
    app.include_router(router)
    described = document(app)  # now, as it takes a while
    app.openapi = lambda: described  # what FastAPI's manual says to do
    if page_of is not None:
        add_page(app, page_of)
    return app


async def _error_response(_: Request, error: Exception) -> Response:
    return to_api_error(error).response()
