"""Random access to the rows of a .jsonl or .json file through their byte offsets, so that memory stays flat."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ivl.data.records import DataError, describe
from ivl.errors import InputError

CHUNK = 1 << 24


class Rows:
    """The rows of one file: `rows[i]` is the bytes of one JSON object, `rows.line(i)` its line, counted from 1.

    Opening reads the file once. Later reads are positional, so that forked workers may share the file.

    Raises:
        InputError: if the file is missing or empty; when a row is read and the file has changed since it was opened.
    """

    def __init__(self, path: str | Path) -> None:
        self._fd: int | None = None
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._stamp = _stamp(file.fileno())
                first = file.read(4096).lstrip()[:1]
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None
        self.container: Literal["json", "jsonl"] = "json" if first == b"[" else "jsonl"
        self._starts, self._ends, self._lines = (_index_array if first == b"[" else _index_lines)(self.path)
        if not len(self):
            raise InputError(f"{self.path}: has no rows")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY)
        if _stamp(self._fd) != self._stamp:
            raise InputError(f"{self.path}: changed while in use; start again with the new file")
        start = int(self._starts[index])
        return os.pread(self._fd, int(self._ends[index]) - start, start)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def line(self, index: int) -> int:
        return index + 1 if self._lines is None else int(self._lines[index])

    @property
    def num_bytes(self) -> int:
        return self._stamp[0]

    def source(self, index: int) -> str:
        return f"{self.path}:{self.line(index)}"

    @property
    def format(self) -> str:
        """What the file was taken for."""
        return describe(self.container, self[0])


Index = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _index_lines(path: Path) -> Index:
    """Start and end of every line that is not blank, int64 [num_rows]; line numbers only where some lines are blank."""
    breaks = [np.array([-1])]
    at = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + at)
            at += len(chunk)
    marks = np.concatenate([*breaks, [at]]).astype(np.int64)
    starts, ends = marks[:-1] + 1, marks[1:]
    # Blank is "" or a lone carriage return; a row of JSON has at least two bytes.
    full = ends - starts > 1
    if full.all() or (full[:-1].all() and not full[-1]):
        return starts[full], ends[full], None
    return starts[full], ends[full], np.flatnonzero(full) + 1


def _index_array(path: Path) -> Index:
    """Start, end and line of every element of a JSON array.

    Latin-1 makes one character of each byte, and leaves quotes and brackets of UTF-8 text where they are.
    """
    text = path.read_bytes().decode("latin-1")
    decode = json.JSONDecoder().raw_decode
    spans: list[tuple[int, int]] = []
    at = _skip(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        try:
            _, end = decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken(path, text, error.pos, f"not valid JSON ({error.msg})") from None
        except RecursionError:
            raise _broken(path, text, at, "nested too deep") from None
        spans.append((at, end))
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise _broken(path, text, at, "expected a comma or the end of the array")
    if not spans:
        raise InputError(f"{path}: has no rows")
    starts, ends = np.array(spans, dtype=np.int64).T.copy()
    breaks = np.flatnonzero(np.frombuffer(text.encode("latin-1"), dtype=np.uint8) == ord("\n"))
    return starts, ends, np.searchsorted(breaks, starts) + 1


def _broken(path: Path, text: str, at: int, problem: str) -> DataError:
    return DataError(f"{path}:{text.count(chr(10), 0, at) + 1}", "broken_json", problem)


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _stamp(fd: int) -> tuple[int, int]:
    stat = os.fstat(fd)
    return stat.st_size, stat.st_mtime_ns


def write_jsonl(rows: Iterable[dict[str, Any]], path: str | Path) -> Path:
    """Write rows as UTF-8 jsonl, one object per line; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
