"""Restricts which Gradio routes and files a browser may reach.

Gradio has many more routes: API documents, monitoring, a proxy, downloads of addresses, and copies of local files named in
events, which it checks only in servers that it started itself.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ivl.serve.errors import APIError
from ivl.serve.service import Service

_FILE = "/gradio_api/file="
_EVENTS = ("/gradio_api/queue/join", "/gradio_api/run/predict")
ROUTES = {
    "GET": re.compile(
        r"/|/theme\.css|/favicon\.ico|/(assets|static)/[\w./@+-]+|/gradio_api/(heartbeat/\w+|queue/data|upload_progress|file=.+)"
    ),
    "POST": re.compile(r"/gradio_api/(upload|queue/join|run/predict|cancel|reset)"),
}
MAX_EVENT_BYTES = 8 << 20
"""Size of an event of the page: its text and the names of its files."""
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""A reply may name images of other servers, put there by text in an image. No browser fetches them."""
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
}  # fmt: skip


class PageGate:
    """ASGI application around Gradio's. uploads: the one directory whose files may be named and fetched."""

    def __init__(self, app: ASGIApp, service: Service, uploads: Path) -> None:
        self.app, self.service, self.uploads = app, service, uploads.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise APIError(404, "there is nothing here")
        request = Request(scope, receive)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        method = "GET" if request.method == "HEAD" else request.method
        routes = ROUTES.get(method)
        if routes is None or not routes.fullmatch(path) or ".." in path:
            raise APIError(404, "there is nothing here")
        if method == "POST" and not _is_own(request):
            raise APIError(403, "another site may not use this page", code="cross_site")
        if path.startswith(_FILE) and not self._is_upload(path.removeprefix(_FILE)):
            raise APIError(404, "there is nothing here")
        if path == "/":
            scope = {**scope, "query_string": b""}  # Gradio would load states from it
        if path in _EVENTS:
            receive = await self._event(request)
        await self._run(scope, receive, _with_headers(send))

    async def _event(self, request: Request) -> Receive:
        """Read the body of an event, and return a receive that gives it again.

        Raises:
            APIError: if the event names a file that was not sent to this page.
        """
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_EVENT_BYTES:
                raise APIError(413, f"the event is larger than {MAX_EVENT_BYTES} bytes", code="request_too_large")
        try:
            event = json.loads(body)
        except (ValueError, RecursionError):
            raise APIError(400, "the event is not JSON") from None
        if not all(self._is_upload(path) for path in _paths(event)):
            raise APIError(403, "only files that were sent to this page can be named")
        whole = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            return next(whole, None) or await request.receive()

        return receive

    def _is_upload(self, path: Any) -> bool:
        if not isinstance(path, str) or "\0" in path:
            return False
        file = Path(path)
        return file.is_absolute() and file.resolve().is_relative_to(self.uploads) and file.is_file()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application until the server shuts down: streams of open pages have no end of their own."""
        task = asyncio.ensure_future(self.app(scope, receive, send))
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=0.5)
                if self.service.draining and not self.service.num_open:
                    task.cancel()
            if not task.cancelled():
                task.result()
        finally:
            task.cancel()


def _is_own(request: Request) -> bool:
    """Whether a browser sends a request for the page itself. Other sites could use the key that the browser keeps."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        return site in ("same-origin", "none")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def _paths(value: Any) -> list[Any]:
    """Return every value named path, however deep it lies."""
    paths, pending = [], [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            paths += [item["path"]] if "path" in item else []
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return paths


def _with_headers(send: Send) -> Send:
    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return marked
