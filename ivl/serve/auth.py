"""Reads API keys and checks the key of a request."""

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
    """Return the keys of a file, one a line (lines with # are comments), and of IVL_API_KEYS, separated by commas.

    Raises:
        InputError: for a file without keys, or a key that is short or has other than printable ASCII; it is not shown.
    """
    keys: list[tuple[str, str]] = []
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot read the keys ({type(error).__name__})") from error
        keys = [(f"{file}:{n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
        if not keys:
            raise InputError(f"{file}: the file has no key; write one a line")
    keys += [(VARIABLE, key.strip()) for key in environment.get(VARIABLE, "").split(",") if key.strip()]
    for place, key in keys:
        if len(key) < MIN_LENGTH or not re.fullmatch(r"[!-~]+", key):
            raise InputError(f"{place}: a key needs {MIN_LENGTH} or more printable characters without spaces; make one with "
                             "`openssl rand -hex 24`")  # fmt: skip
    return tuple(dict.fromkeys(key for _, key in keys))


class Keys:
    """Checks keys; without any the server is open to everybody. Only digests of the keys are kept."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def admit(self, authorization: bytes | None) -> str:
        """Return the group whose requests share cached prompts, which is everybody or those of one key; "" without a key.

        An Authorization header has a key as a Bearer token or, for browsers, as the password of Basic. The time does not
        depend on the key.
        """
        if not self._digests:
            return "everybody"
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
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex() if any(matches) else ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
