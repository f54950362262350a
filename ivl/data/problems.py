"""What can be wrong with a row, and the error that says so."""

from __future__ import annotations

import reprlib
from typing import Any, Literal

from ivl.errors import InputError

Kind = Literal[
    "broken_json", "bad_row", "bad_roles", "empty_answer", "placeholder_mismatch",
    "missing_media", "undecodable_media", "too_long", "nothing_trained",
]  # fmt: skip
"""What can be wrong with a row; the report counts by these."""


class DataError(InputError):
    """A bad row. The message starts with its source, such as `file:line`; `kind` is what the report counts it as."""

    kind: Kind

    def __init__(self, source: str, kind: Kind, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source, self.kind, self.problem = source, kind, problem

    def __reduce__(self) -> tuple[type[DataError], tuple[str, Kind, str]]:
        return DataError, (self.source, self.kind, self.problem)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def short(value: Any, limit: int = 80) -> str:
    """The value in a few words, however long or deep it is."""
    text = repr(value[:limit]) if isinstance(value, bytes) else _repr.repr(value)
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."
