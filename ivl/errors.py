"""The errors that a user's input can cause; the command line prints them without a traceback."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any, Literal


class InputError(ValueError):
    """Bad input: a file, a row, a flag, a checkpoint. The message names the place, the value and the remedy."""


MediaFault = Literal["missing_media", "undecodable_media"]
DataFault = (
    MediaFault
    | Literal["broken_json", "bad_row", "bad_roles", "empty_answer", "placeholder_mismatch", "too_long", "nothing_trained"]
)
"""What can be wrong with a row; reports count rows by these."""


class MediaError(InputError):
    """An image or video that is not there (`missing_media`) or cannot be decoded (`undecodable_media`)."""

    def __init__(self, kind: MediaFault, problem: str) -> None:
        super().__init__(problem)
        self.kind: MediaFault = kind

    def __reduce__(self) -> tuple[type[MediaError], tuple[MediaFault, str]]:
        return MediaError, (self.kind, str(self))


class DataError(InputError):
    """A bad row. The message starts with its source, such as `file:line`; `kind` is what a report counts it as."""

    def __init__(self, source: str, kind: DataFault, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source, self.problem = source, problem
        self.kind: DataFault = kind

    def __reduce__(self) -> tuple[type[DataError], tuple[str, DataFault, str]]:
        return DataError, (self.source, self.kind, self.problem)


def nearest(word: object, known: Iterable[str], kind: str) -> str:
    """The remedy for an unknown word: `did you mean 'x'?`, or all known words, as in `keys are a, b`."""
    known = list(known)
    near = difflib.get_close_matches(str(word)[:100], known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{kind} are {', '.join(known)}"


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def short(value: Any, limit: int = 80) -> str:
    """The value's repr, shortened to `limit` characters however long or deep the value is."""
    text = repr(value[:limit]) if isinstance(value, bytes) else _repr.repr(value)
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."
