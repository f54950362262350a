"""Reads the JSON body of a request in chunks, and refuses what would stop the server before a parser sees it.

A parser holds the interpreter, and with it every stream, for as long as it works. So items, digits and bytes are counted as
they arrive. Images and videos in data: URLs, which may have megabytes, are set aside and never parsed.
"""

from __future__ import annotations

import re
import secrets

from ivl.serve.config import ServeConfig
from ivl.serve.errors import APIError

MIN_ASIDE = 4096
"""Shorter URLs are parsed as the rest is."""
_MEDIUM = re.compile(
    rb'"(?:(?:image|video)_)?url"[ \t\r\n]*:[ \t\r\n]*" {0,9}(data:[\w.+/\\;=-]{0,128};base64,)', re.IGNORECASE
)
_KEPT_BACK = 256
"""Bytes that wait for the next chunk, as this one may end within the beginning of a medium."""
_LONG_NUMBER = re.compile(rb"[0-9]{64}")


class BodyReader:
    """Takes the chunks of a body. `rest` has a name, which no client can guess, for each URL in `media`."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._prefix = f"data:{secrets.token_hex(16)}/"
        self.rest = bytearray()
        self.media: dict[str, bytearray] = {}
        self._num_items = 0
        self._kept_back = b""
        self._in_string = False
        self._medium: bytearray | None = None

    def feed(self, chunk: bytes, *, last: bool = False) -> None:
        """Take the next chunk.

        Raises:
            APIError: for more items, or bytes beside media, than the limits allow, or a number of too many digits.
        """
        data, self._kept_back = self._kept_back + chunk, b""
        while True:
            if self._medium is not None:
                data = self._read_medium(self._medium, data)
                if self._medium is not None:
                    return
            # Without escapes, every quote begins or ends a string. Nothing changes its place.
            plain = data.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in data else data
            found = (m for m in _MEDIUM.finditer(plain) if not 0 <= plain.find(b'"', m.end()) - m.end() < MIN_ASIDE)
            if (match := next(found, None)) is None:
                break
            self._take(data[: match.start(1)], plain[: match.start(1)])
            name = f"{self._prefix}{len(self.media)}"
            self.rest += name.encode()
            self._medium = self.media[name] = bytearray()
            data = data[match.start(1) :]
        end = len(data) if last else max(0, len(data) - _KEPT_BACK)
        end -= _num_backslashes(data[:end]) % 2
        self._take(data[:end], plain[:end])
        self._kept_back = data[end:]

    def _read_medium(self, medium: bytearray, data: bytes) -> bytes:
        """Add data to the medium up to the quote that ends it. Return the rest, from the quote on."""
        piece, quote, rest = data.partition(b'"')
        if quote:
            self._medium = None
        elif _num_backslashes(piece) % 2:
            piece, self._kept_back = piece[:-1], b"\\"
        medium += piece.replace(b"\\/", b"/") if b"\\" in piece else piece  # some encoders escape it
        return quote + rest

    def _take(self, data: bytes, plain: bytes) -> None:
        """Add data to the rest, and count its items. plain: the same without escapes."""
        self.rest += data
        pieces = plain.split(b'"')
        outside = b" ".join(pieces[self._in_string :: 2])
        self._in_string ^= len(pieces) % 2 == 0
        self._num_items += len(pieces) // 2 + sum(map(outside.count, (b",", b"[", b"{")))
        if self._num_items > self._config.max_json_items:
            reason = f"the body has more than {self._config.max_json_items} JSON items, see max_json_items"
            raise APIError(400, reason, code="limit_exceeded")
        if _LONG_NUMBER.search(outside):
            raise APIError(400, "the body has a number of too many digits", code="invalid_json")
        if len(self.rest) > self._config.max_json_bytes:
            reason = f"the request has more than {self._config.max_json_bytes} bytes beside images and videos in data: URLs"
            raise APIError(413, reason, code="request_too_large")


def _num_backslashes(data: bytes) -> int:
    """Return the number of backslashes at the end."""
    return len(data) - len(data.rstrip(b"\\"))
