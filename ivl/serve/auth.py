"""API keys: where they come from, and whether a request has one."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ivl.errors import InputError

VARIABLE = "IVL_API_KEYS"
MIN_LENGTH = 16


def load_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Keys of a file, one a line (lines of # are comments), and of IVL_API_KEYS, with commas between them.

    Raises:
        InputError: for a file without keys, or a key that is short or has other than printable ASCII; it is not shown.
    """
    found: list[tuple[str, str]] = []
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot read the keys ({type(error).__name__})") from error
        found = [(f"{file}:{n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
        if not found:
            raise InputError(f"{file}: there is no key in it; write one a line")
    found += [(VARIABLE, key.strip()) for key in environment.get(VARIABLE, "").split(",") if key.strip()]
    for place, key in found:
        if len(key) < MIN_LENGTH or not re.fullmatch(r"[!-~]+", key):
            raise InputError(f"{place}: a key needs {MIN_LENGTH} or more printable characters without spaces; make one with "
                             "`openssl rand -hex 24`")  # fmt: skip
    return tuple(dict.fromkeys(key for _, key in found))


class Keys:
    """The keys that open the server; none at all opens it to everybody. Only digests are kept."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def admit(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header has a key: as Bearer token, or as password of Basic, for browsers. Takes as long
        for every key, right or wrong."""
        if not self._digests:
            return True
        scheme, _, value = (authorization or b"").strip().partition(b" ")
        given = value.strip()
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                given = b""
        elif scheme.lower() != b"bearer":
            given = b""
        digest = _digest(given)
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
