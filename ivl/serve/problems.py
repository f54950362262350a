"""The one error a client gets, shaped as OpenAI's."""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException

TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error",
    503: "server_error", 504: "server_error",
}  # fmt: skip
"""Error types by status; all others are invalid_request_error."""


class Problem(HTTPException):
    """An answer other than 2xx. The message is for the client; it never holds a library's text."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
        if status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="ivl"'  # what browsers know, and no second scheme
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    @property
    def content(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}"""
        kind = TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        return json.dumps(self.content, ensure_ascii=False).encode(errors="backslashreplace")


def internal() -> Problem:
    return Problem(500, "something went wrong inside the server; the log has the place", code="internal_error")
