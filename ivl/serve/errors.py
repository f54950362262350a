"""The one error that clients get, in OpenAI's form."""

from __future__ import annotations

import json

from starlette.exceptions import HTTPException
from starlette.responses import Response

from ivl.errors import InputError

TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error",
    503: "server_error", 504: "server_error",
}  # fmt: skip
"""Error types by status; all others are invalid_request_error."""


class APIError(HTTPException):
    """A response other than 2xx. The message is for the client; it never repeats the text of a library."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
        if status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="ivl"'  # the scheme that browsers know, and no second one
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> bytes:
        """The body: {"error": {message, type, param, code}} as JSON."""
        kind = TYPES.get(self.status_code, "invalid_request_error")
        content = {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
        return json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace")

    def response(self) -> Response:
        """Return the error as a response."""
        return Response(self.body, self.status_code, self.headers, "application/json")


class MediaRefusal(InputError):
    """Refuses a medium. The message holds no path, address, base64 or text of a library, and may be shown to anybody.

    status is an HTTP status: 400 unusable, 403 not allowed, 413 too large, 504 too slow.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def internal_error() -> APIError:
    """Return the error for a fault of the server."""
    return APIError(500, "something went wrong inside the server; the log has the place", code="internal_error")


def stopping_error() -> APIError:
    """Return the error for a server that ends."""
    return APIError(503, "the server is shutting down", code="shutting_down", retry_after=5)


def to_api_error(error: Exception) -> APIError:
    """Return any error as one that may be shown to a client."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, InputError):
        return APIError(getattr(error, "status", 400), str(error), code="invalid_value")
    if isinstance(error, HTTPException):  # of a route that is not there
        shown = APIError(error.status_code, str(error.detail))
        shown.headers = {**(error.headers or {}), **(shown.headers or {})}
        return shown
    return internal_error()
