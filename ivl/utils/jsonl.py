"""Append-only logs that survive kill -9: plain ones, and journals of whole chunks that a later run continues."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, Self

from ivl.errors import InputError, short
from ivl.utils.budgets import MAX_ROW_BYTES
from ivl.utils.files import hold, regular

CHOOSE = "choose another output or remove the file"
DAMAGED = "remove this line and all that follow, and the same command goes on from there"


def whole_text(text: str) -> str:
    """Replace each lone surrogate by U+FFFD: training rows cannot hold it, and no tokenizer encodes it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class AppendLog:
    """A file that only grows, and belongs to one process at a time.

    Opening creates a missing file and changes nothing of another one. The lock is the operating system's, on the file itself:
    it ends with the process, however that ends. Read the lines that are there after opening, not before, for until then
    another process may write: `resume` does.

    Raises:
        InputError: if another process holds the file, or it cannot be written; also from every method that writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                regular(path)
            self._file = path.open("ab", buffering=0)
            if not _wait_for(self._file):
                self._file.close()
                raise InputError(f"{path}: another process is writing this file")

    def resume(self, begins: bytes, take: Callable[[int, dict[str, Any]], bool], remedy: str = DAMAGED) -> bool:
        """Read the lines that are there, and cut off what a killed process left unfinished.

        Args:
            begins: the bytes that a log of this kind begins with. A file without a line to keep is emptied only if it begins
                with them, or with the part of them that a killed process has written.
            take: gets number and object of each whole line, and tells whether the log may end behind it; where it may not end
                behind the first, nothing is kept.
            remedy: what to do about a broken line.

        Returns:
            Whether there is a line to go on from.

        Raises:
            InputError: for a file that is no such log, at a whole line that is no JSON object, and whatever `take` raises; the
                file is then closed, and as it was.
        """
        end = position = 0
        try:
            with self._writing(), self.path.open("rb") as file:
                start = file.read(len(begins))
                file.seek(0)
                for number, line in enumerate(lines_of(file), 1):
                    if line.endswith(b"\n"):
                        position += len(line)
                        with reading_line(self.path, number, CHOOSE if number == 1 else remedy):
                            end = position if take(number, _object(line)) else end
                    if not end:
                        break
                if not end and start != begins[: len(start)]:
                    raise InputError(f"{self.path}:1: not a journal or log of ivl; {CHOOSE}")
                if os.fstat(self._file.fileno()).st_size > end:
                    self._file.truncate(end)
        except BaseException:
            self.close()
            raise
        return end > 0

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append one JSON line per row. The operating system has them; `sync` also puts them on disk."""
        data = memoryview(b"".join(map(json_line, rows)))
        with self._writing():
            while data:
                data = data[self._file.write(data) :]

    def sync(self) -> None:
        with self._writing():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Name the file in errors of the operating system, such as a full disk."""
        try:
            yield
        except OSError as error:
            remedy = "; make room, and the same command goes on" if error.errno == errno.ENOSPC else ""
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error}){remedy}") from None


def _wait_for(file: IO[bytes]) -> bool:
    """Lock a file for this process; False if another one holds it. Where the file system has no locks, nothing is held."""
    for _ in range(20):  # forked workers hold it, too, and end a moment after a killed process
        if hold(file.fileno()) is not False:
            return True
        time.sleep(0.1)
    return False


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file. One of more than MAX_ROW_BYTES, which no row has, comes in pieces."""
    return iter(partial(file.readline, MAX_ROW_BYTES + 1), b"")


def json_line(row: dict[str, Any]) -> bytes:
    """Encode a row as one line of UTF-8. A lone surrogate becomes its JSON escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


class Journal:
    """A log of chunks whose first line says what run it belongs to.

    A chunk is written and synced as one piece. What a kill leaves of a chunk is cut off when the journal is opened again, so
    a run that goes on computes whole chunks and ends with the same bytes as one that was never stopped.

    Raises:
        InputError: if the file belongs to another run, or is no journal; the message says what differs.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, fresh: bool = False) -> None:
        """Open the journal.

        Args:
            about: what run it is.
            fresh: whether to empty a journal of the same kind, one with these keys, instead of going on with it.
        """
        self.path, self.about, self.fresh = path, json.loads(json.dumps(about)), fresh  # tuples become lists, as in the file
        self.num_chunks, self._log, first = 0, AppendLog(path), {"about": self.about}
        if not self._log.resume(b'{"about": ' if fresh else json_line(first), self._take):
            self._write([first])

    def _take(self, number: int, row: dict[str, Any]) -> bool:
        if number == 1:
            _check_about(self.path, dict(row["about"]), self.about, keys_only=self.fresh)
            return not self.fresh
        if row.get("end_of_chunk") != self.num_chunks:
            return False
        self.num_chunks += 1
        return True

    def clear(self) -> None:
        """Forget every chunk, and keep the first line, which tells what run this was."""
        self._log.resume(b"", lambda number, _: number == 1)
        self.num_chunks = 0

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
    """What a journal is about, and the rows of its whole chunks with their line numbers.

    Rows at the end that belong to no whole chunk are left out, and counted on stderr.

    Raises:
        InputError: if there is no such file or it is not a journal; while iterating, at a broken line.
    """
    try:
        regular(path)
        with path.open("rb") as file:
            line = next(lines_of(file), b"")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    with reading_line(path, 1, "give a journal, such as `ivl prefer sample` writes"):
        about = dict(_object(line)["about"])
    return about, _journal_rows(path)


def _journal_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    chunk: list[tuple[int, dict[str, Any]]] = []
    with path.open("rb") as file:
        for number, line in enumerate(lines_of(file), 1):
            with reading_line(path, number, "run the command that writes it again, which goes on from its last whole chunk"):
                row = _object(line)
            if "end_of_chunk" in row:
                yield from chunk
                chunk = []
            elif number > 1:
                chunk.append((number, row))
    if chunk:
        _warn_of_cut(path, len(chunk))


@cache
def _warn_of_cut(path: Path, rows: int) -> None:
    """Print the warning once, however often the journal is read."""
    print(f"{path}: the last {rows:,} rows are of a chunk that was cut off; they are left out", file=sys.stderr)


def _object(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise TypeError(f"an object was expected, not {short(row)}")
    return row


@contextmanager
def reading_line(path: Path, number: int, remedy: str = DAMAGED) -> Iterator[None]:
    """Name file, line and remedy where a line is damaged: no JSON, or without the keys and values that ivl writes."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        broken = isinstance(error, ValueError | RecursionError)
        problem = "not valid JSON" if broken else f"not a line that ivl wrote, {type(error).__name__}"
        raise InputError(f"{path}:{number}: {problem} ({str(error)[:200]}); {remedy}") from None


def _check_about(path: Path, found: dict[str, Any], about: dict[str, Any], *, keys_only: bool) -> None:
    different = [key for key in {**found, **about} if found.get(key) != about.get(key)]
    if different and not (keys_only and found.keys() == about.keys()):
        what = "; ".join(f"{key} was {short(found.get(key))}, is {short(about.get(key))}" for key in sorted(different))
        raise InputError(f"{path}: belongs to another run ({what}); {CHOOSE}")
