"""The rows of a data set in two parts, one to train on and one to validate with, by the content of each row."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from ivl.errors import DataError, InputError
from ivl.formats.base import Rows


class SomeRows(Rows):
    """Some of the rows of a file or folder, at their own places."""

    def __init__(self, rows: Rows, indices: np.ndarray) -> None:
        self.rows, self.indices = rows, indices
        self.container, self.layout = rows.container, rows.layout

    def __len__(self) -> int:
        return len(self.indices)

    def raw(self, index: int) -> bytes | dict[str, Any]:
        return self.rows.raw(int(self.indices[index]))

    def source(self, index: int) -> str:
        return self.rows.source(int(self.indices[index]))

    @property
    def num_bytes(self) -> int:
        return self.rows.num_bytes

    def close(self) -> None:
        self.rows.close()


def part_of(rows: Rows, share: float, *, validation: bool) -> Rows:
    """Return the rows that are kept for validation, or the others; a share of 0 keeps none.

    The share is exact, at least one row and not all: those with the least hashes of their content are kept. So a row stays on
    its side when the file is sorted anew, and equal rows, which may make the share a little larger, are on one side.

    Raises:
        InputError: if there are too few different rows for two parts.
    """
    if not share:
        return rows
    hashes = np.array([_hash(rows, index) for index in range(len(rows))])
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    kept = hashes <= np.sort(hashes)[count - 1] if count else np.zeros(len(rows), dtype=bool)
    if not count or kept.all():
        raise InputError(f"{rows.source(0)}: {len(rows)} rows are too few, or too much alike, to keep some for validation")
    return SomeRows(rows, np.flatnonzero(kept == validation))


def _hash(rows: Rows, index: int) -> int:
    """Hash a row. One that cannot be read counts by its place, and is reported when it is drawn."""
    try:
        raw = rows.raw(index)
    except DataError:
        raw = rows.source(index).encode()
    data = raw.strip() if isinstance(raw, bytes) else repr(raw).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1  # fits int64
