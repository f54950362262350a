"""Where the rows of a file lie: arrays computed once, kept beside the file, memory-mapped by every process.

The index file is the arrays one after another, then a JSON footer (what it was computed from, and where each array lies),
then the footer's length and a magic word. Its name starts with a dot, or it lies in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ivl.errors import InputError
from ivl.formats.base import Rows, Stamp

VERSION = 1
MAGIC = b"ivl-rows"
MIN_BYTES = 1 << 25
"""Smaller files are indexed in memory: that takes milliseconds."""

Arrays = dict[str, np.ndarray]
Build = Callable[[], Iterator[tuple[str, np.ndarray]]]
"""Yields (name, piece); the pieces of one array come one after another, all int64."""


class IndexedRows(Rows):
    """Rows at byte offsets of one file. Workers share the file and, where it is large, the memory of its index.

    Raises:
        InputError: if the file is missing or empty; when a row is read and the file has changed since it was opened.
    """

    _fd: int | None = None

    def __init__(self, path: Path, container: str) -> None:
        self.path, self.container = path, container
        self._stamp = Stamp(path)
        self._arrays, self._index = load_or_build(self._stamp, container, self._build)
        if not len(self):
            raise InputError(f"{path}: has no rows")

    @abstractmethod
    def _build(self) -> Iterator[tuple[str, np.ndarray]]:
        """Compute the index."""

    def _read(self, start: int, end: int) -> bytes:
        if self._fd is None:
            try:
                self._fd = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None
        stat = os.fstat(self._fd)
        self._stamp.check(stat.st_size, stat.st_mtime_ns)
        if not 0 <= start <= end <= self._stamp.size:
            raise InputError(f"{self._index}: is damaged; delete it")
        return os.pread(self._fd, end - start, start)

    def __getstate__(self) -> dict[str, Any]:
        """What is mapped from a file is mapped again, not copied."""
        return {**self.__dict__, "_fd": None, "_arrays": None if self._index else self._arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._index:
            arrays = load(self._index, self._stamp, self.container)
            if arrays is None:  # deleted since
                arrays, self._index = load_or_build(self._stamp, self.container, self._build)
            self._arrays = arrays

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def num_bytes(self) -> int:
        return self._stamp.size


def load_or_build(stamp: Stamp, kind: str, build: Build) -> tuple[Arrays, Path | None]:
    """The arrays of a file, and the index file they are mapped from if there is one.

    Several processes may do this at once: each writes its own file and moves it into place whole.
    """
    if stamp.size < MIN_BYTES:
        return _in_memory(build), None
    places = _places(stamp.path)
    for place in places:
        if (arrays := load(place, stamp, kind)) is not None:
            return arrays, place
    for place in places:
        if _write(place, stamp, kind, build) and (arrays := load(place, stamp, kind)) is not None:
            return arrays, place
    return _in_memory(build), None


def load(place: Path, stamp: Stamp, kind: str) -> Arrays | None:
    """Map the arrays of an index file; None if it is missing, of another file, or not whole."""
    try:
        with place.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 16, 0))
            tail = file.read()
            if len(tail) != 16 or tail[8:] != MAGIC:
                return None
            length = int.from_bytes(tail[:8], "little")
            if length > size - 16:
                return None
            file.seek(size - 16 - length)
            footer = json.loads(file.read(length))
        if footer["of"] != _identity(stamp, kind):
            return None
        if any(8 * (at + count) > size for at, count in footer["arrays"].values()):
            return None
        whole = np.memmap(place, dtype="<i8", mode="r", shape=(size // 8,)) if size >= 8 else np.zeros(0, np.int64)
        return {name: whole[at : at + count] for name, (at, count) in footer["arrays"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(stamp: Stamp, kind: str) -> dict[str, int | str]:
    return {"version": VERSION, "kind": kind, "size": stamp.size, "mtime_ns": stamp.mtime_ns}


def _places(path: Path) -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivl" / "rows"
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return path.with_name(f".{path.name}.ivl-rows"), cache / f"{name}.ivl-rows"


def _in_memory(build: Build) -> Arrays:
    pieces: dict[str, list[np.ndarray]] = {}
    for name, piece in build():
        pieces.setdefault(name, []).append(piece)
    return {name: np.concatenate(each).astype("<i8", copy=False) for name, each in pieces.items()}


def _write(place: Path, stamp: Stamp, kind: str, build: Build) -> bool:
    """Write the index; False if the folder does not take it."""
    partial = place.with_name(f"{place.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("xb")
    except OSError:
        return False
    try:
        with file:
            arrays: dict[str, list[int]] = {}
            at = 0
            for name, piece in build():
                file.write(np.ascontiguousarray(piece, dtype="<i8").data)
                arrays.setdefault(name, [at, 0])[1] += len(piece)
                at += len(piece)
            footer = json.dumps({"of": _identity(stamp, kind), "arrays": arrays}).encode()
            file.write(footer + len(footer).to_bytes(8, "little") + MAGIC)
        partial.replace(place)
        return True
    except OSError:  # a full disk, say: the index is a convenience
        return False
    finally:
        partial.unlink(missing_ok=True)
