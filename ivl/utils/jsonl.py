"""Append-only logs that survive kill -9: plain ones, and journals of whole chunks that a later run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Self

from ivl.errors import InputError


class AppendLog:
    """A file that only grows.

    Opening truncates it to its first `keep` bytes, so that the caller can cut off what a killed process left unfinished.
    None keeps everything.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: IO[bytes] = path.open("ab", buffering=1 << 20)
        if keep is not None and self._file.tell() > keep:
            self._file.truncate(keep)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append one JSON line per row. The operating system has them; `sync` also puts them on disk."""
        self.append_bytes(b"".join(map(json_line, rows)))
        self._file.flush()

    def append_bytes(self, data: bytes) -> None:
        """Append raw bytes, which may stay in this process until `sync` or `close`."""
        self._file.write(data)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def json_line(row: dict[str, Any]) -> bytes:
    """Encode a row as one line of UTF-8. A lone surrogate becomes its JSON escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_rows(path: Path, remedy: str = "was the run that wrote it stopped?") -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Line number, offset of the line's end and object of each complete line; an unfinished last line is left out.

    Raises:
        InputError: at a complete line that is no JSON object, naming the file and line.
    """
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield number, end, _object(path, number, line, remedy)


class Journal:
    """A log of chunks whose first line says what run it belongs to.

    A chunk is written and synced as one piece. What a kill leaves of a chunk is cut off when the journal is opened again, so
    a run that goes on computes whole chunks and ends with the same bytes as one that was never stopped.

    Raises:
        InputError: if the file belongs to another run, or is no journal; the message says what differs.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, json.loads(json.dumps(about))  # tuples become the lists that will be read
        self.num_chunks, keep = 0, 0
        if path.exists():
            for number, end, row in read_rows(path, "choose another output or remove the file"):
                if number == 1:
                    _check_about(path, row.get("about"), self.about)
                    keep = end
                elif row.get("end_of_chunk") == self.num_chunks:
                    self.num_chunks, keep = self.num_chunks + 1, end
        self._log = AppendLog(path, keep)
        if not keep:
            self._write([{"about": self.about}])

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append one chunk; it is on disk when this returns."""
        self._write([*rows, {"end_of_chunk": self.num_chunks}])
        self.num_chunks += 1

    def close(self) -> None:
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._log.append(rows)
        self._log.sync()


def read_journal(path: Path) -> tuple[dict[str, Any], Iterator[tuple[int, dict[str, Any]]]]:
    """What a finished journal is about, and its rows with their line numbers.

    Raises:
        InputError: if there is no such file or it is not a journal; while iterating, at a broken line.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        head = _object(path, 1, file.readline(), "was the run that wrote it stopped?")
    if "about" not in head:
        raise InputError(f"{path}:1: not a journal of ivl")
    return head["about"], _journal_rows(path)


def _journal_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            row = _object(path, number, line, "was the run that wrote it stopped?")
            if number > 1 and "end_of_chunk" not in row:
                yield number, row


def _object(path: Path, number: int, line: bytes, remedy: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}:{number}: expected an object, got {type(row).__name__}; {remedy}")
    return row


def _check_about(path: Path, found: Any, about: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise InputError(f"{path}:1: not a journal of ivl; choose another output or remove the file")
    different = [key for key in {**found, **about} if found.get(key) != about.get(key)]
    if different:
        what = "; ".join(f"{key} was {found.get(key)!r}, is {about.get(key)!r}" for key in sorted(different))
        raise InputError(f"{path}: belongs to another run ({what}); choose another output or remove the file")
