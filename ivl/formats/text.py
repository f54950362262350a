"""Rows of a .jsonl file or a JSON array, found through their byte offsets, so that memory stays flat."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np

from ivl.errors import DataError, InputError
from ivl.formats.offsets import Arrays, IndexedRows
from ivl.utils.progress import reporting

CHUNK = 1 << 24
SLOW = 1 << 28
"""Files of more bytes show their progress while they are indexed."""

Advance = Callable[[int], None]


class TextRows(IndexedRows):
    """Row i begins at byte starts[i] and ends before starts[i + 1], but for white space and the comma of an array.

    Its line is 1, plus i where each row has a line of its own (jsonl), plus the number of gaps[k] <= i: `gaps` holds the row
    that follows each other line break.
    """

    array_names = ("starts", "gaps")

    def __init__(self, path: Path, container: Literal["json", "jsonl"]) -> None:
        super().__init__(path, container)

    def _build(self) -> Arrays:
        size = self._stamp.size
        index = _index_lines if self.container == "jsonl" else _index_array
        slow = size >= SLOW
        with reporting(f"indexing {self.path.name}", "bytes") if slow else nullcontext() as show:
            try:
                return index(self.path, (lambda at: show(at, size)) if show else lambda _: None)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None

    def __len__(self) -> int:
        return len(self._arrays["starts"]) - 1

    def raw(self, index: int) -> bytes:
        start, end = self._arrays["starts"][index : index + 2].tolist()
        return self._read(start, end).rstrip(b" \t\r\n" if self.container == "jsonl" else b" \t\r\n,")

    def line(self, index: int) -> int:
        lead = index if self.container == "jsonl" else 0
        return 1 + lead + int(np.searchsorted(self._arrays["gaps"], index, side="right"))

    def source(self, index: int) -> str:
        return f"{self.path}:{self.line(index)}"


def _index_lines(path: Path, advance: Advance) -> Arrays:
    """The start of every line that is not blank, and the end of the file; for each blank line, the row that follows.

    Blank is an empty line or a lone carriage return.
    """
    starts: list[np.ndarray] = []
    gaps: list[np.ndarray] = []
    at = line_start = num_rows = 0
    last = 0  # the byte before the chunk
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            bytes_N = np.frombuffer(chunk, dtype=np.uint8)
            breaks = np.flatnonzero(bytes_N == ord("\n"))
            if len(breaks):
                ends = breaks + at
                lines = np.concatenate([[line_start], ends[:-1] + 1])
                before = bytes_N[np.maximum(breaks, 1) - 1]
                if breaks[0] == 0:
                    before[0] = last
                full = ends - lines > (before == ord("\r"))
                starts.append(lines[full])
                if not full.all():
                    gaps.append(num_rows + np.cumsum(full)[~full])
                num_rows += int(full.sum())
                line_start = int(ends[-1]) + 1
            last = chunk[-1]
            at += len(chunk)
            advance(at)
    if at - line_start > (last == ord("\r")):
        starts.append(np.array([line_start]))
    empty = np.zeros(0, np.int64)
    return {"starts": np.concatenate([*starts, [at]]).astype(np.int64), "gaps": np.concatenate([*gaps, empty]).astype(np.int64)}


def _index_array(path: Path, advance: Advance) -> Arrays:
    """The start of every element of a JSON array and the end of the last; for each line break, the element that follows.

    Latin-1 makes one character of each byte, and leaves quotes and brackets of UTF-8 text where they are.
    """
    data = path.read_bytes()
    text = data.decode("latin-1")
    decode = json.JSONDecoder().raw_decode
    starts: list[int] = []
    opening = _skip(text, 3 if data.startswith(b"\xef\xbb\xbf") else 0)
    if text[opening : opening + 1] != "[":
        raise _broken(path, text, opening, "not a JSON array")
    end = _skip(text, opening + 1)
    at = end
    while text[at : at + 1] != "]":
        try:
            _, end = decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken(path, text, error.pos, f"not valid JSON ({error.msg})") from None
        except ValueError as error:  # a number of thousands of digits
            raise _broken(path, text, at, f"not valid JSON ({error})") from None
        except RecursionError:
            raise _broken(path, text, at, "nested too deep") from None
        starts.append(at)
        advance(end)
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
            if text[at : at + 1] == "]":
                raise _broken(path, text, at, "a comma before the end of the array")
        elif text[at : at + 1] != "]":
            raise _broken(path, text, at, "expected a comma or the end of the array")
    if (rest := _skip(text, at + 1)) < len(text):
        raise _broken(path, text, rest, "something follows the array")
    breaks = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
    return {"starts": np.array([*starts, end]), "gaps": np.searchsorted(np.array(starts), breaks)}


def _broken(path: Path, text: str, at: int, problem: str) -> DataError:
    return DataError(f"{path}:{text.count(chr(10), 0, at) + 1}", "broken_json", problem)


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at
