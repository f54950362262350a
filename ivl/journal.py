"""Results that survive kill -9: rows written a chunk at a time and continued where they end; files whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ivl.errors import InputError


class Journal:
    """A jsonl file whose first line says what the rest belongs to.

    A chunk is written and synced as one piece; what a kill leaves of a chunk is cut off when the file is opened again, so a
    run that goes on computes whole chunks and ends with the same bytes as one that was never stopped.

    Raises:
        InputError: if the file belongs to something else; the message says what differs.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, json.loads(json.dumps(about))  # lists for tuples, as they will be read
        self.num_chunks, good = 0, 0
        head = _line({"about": self.about})
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            if lines and lines[0].endswith(b"\n"):
                self._check(lines[0])
                good = len(lines[0])
                at = good
                for line in lines[1:]:
                    at += len(line)
                    if line.endswith(b"\n") and json.loads(line).get("end_of_chunk") == self.num_chunks:
                        self.num_chunks, good = self.num_chunks + 1, at
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(good)
        self._file.seek(good)
        if not good:
            self._write(head)

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._write(b"".join(map(_line, rows)) + _line({"end_of_chunk": self.num_chunks}))
        self.num_chunks += 1

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check(self, head: bytes) -> None:
        try:
            found = json.loads(head)["about"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path}:1: not a journal of ivl; choose another output or remove the file") from None
        different = [key for key in {**found, **self.about} if found.get(key) != self.about.get(key)]
        if different:
            what = "; ".join(f"{key} was {found.get(key)!r}, is {self.about.get(key)!r}" for key in sorted(different))
            raise InputError(f"{self.path}: belongs to another run ({what}); choose another output or remove the file")


def read_journal(path: Path) -> tuple[dict[str, Any], Iterator[tuple[int, dict[str, Any]]]]:
    """What a finished journal is about, and its rows with their line numbers.

    Raises:
        InputError: if there is no such file or it is not a journal; while iterating, at a broken line.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        head = _parse(path, 1, file.readline())
    if "about" not in head:
        raise InputError(f"{path}:1: not a journal of ivl")
    return head["about"], _rows(path)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            row = _parse(path, number, line)
            if number > 1 and "end_of_chunk" not in row:
                yield number, row


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not valid JSON ({error}); was the run that wrote it stopped?") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}:{number}: expected an object, got {type(row).__name__}")
    return row


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def write_whole(path: Path, text: str) -> None:
    """The whole file or none of it, also after a crash."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """What a file or folder holds is certain after this."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
