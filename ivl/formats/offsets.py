"""Rows at byte offsets of one file; the offsets are computed once, kept beside the file, and mapped by every process.

An index is a .npy file of int64: its version, the container's number, size and time of the file that it belongs to, the length
of each array, then the arrays. Its name starts with a dot, or it lies in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ivl.errors import InputError
from ivl.formats.base import Rows, Stamp
from ivl.utils.files import hold, real, regular

VERSION = 3
MIN_BYTES = 1 << 25
"""A data set of fewer bytes is indexed in memory: that takes milliseconds."""
CONTAINER_NUMBERS = {"jsonl": 0, "json": 1, "webdataset": 2}

Arrays = dict[str, np.ndarray]


class IndexedRows(Rows):
    """Rows at byte offsets of one file. Workers share the file and, where the index is stored, its memory.

    Args:
        set_bytes: size of the data set that the file is a shard of, by which its index is stored; None is the file's own.

    Raises:
        InputError: if the file is missing or empty; when a row is read and the file has changed since it was opened.
    """

    array_names: ClassVar[tuple[str, ...]]
    """Names of the arrays of the index, in their order in the file."""
    row_array: ClassVar[str]
    """The array that has one value for each row, and one more."""
    _fd: int | None = None
    _loaded: Arrays | None = None
    _index: Path | None = None

    def __init__(self, path: Path, container: str, set_bytes: int | None = None) -> None:
        self.path, self.container = path, container
        self._stamp = Stamp(path)
        self._stored = (self._stamp.size if set_bytes is None else set_bytes) >= MIN_BYTES
        self._num_rows = len(self._arrays[self.row_array]) - 1
        if not self._num_rows:
            raise InputError(f"{path}: has no rows")

    def __len__(self) -> int:
        return self._num_rows

    @abstractmethod
    def _build(self) -> Arrays:
        """Compute the index: int64 arrays by `array_names`."""

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
        """Arrays that are mapped from a file are mapped again by the receiver, not copied."""
        return {**self.__dict__, "_fd": None, "_loaded": None if self._index else self._loaded}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and its index; thousands of shards would hold as many descriptors."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._index:
            self._loaded = None

    @property
    def num_bytes(self) -> int:
        return self._stamp.size

    # -- the index

    @property
    def _arrays(self) -> Arrays:
        if self._loaded is None:
            self._loaded, self._index = self._load_or_build()
        return self._loaded

    def _load_or_build(self) -> tuple[Arrays, Path | None]:
        """The arrays, and the index file that they are mapped from if there is one.

        Of all processes that open the file at once, ranks and workers alike, one builds the index; the others wait and map it.
        """
        places = _places(self.path) if self._stored else ()
        if found := self._find(places):
            return found
        with _building(places):
            now = Stamp(self.path)
            self._stamp.check(now.size, now.mtime_ns)
            if found := self._find(places):  # another process has built it meanwhile
                return found
            arrays = self._build()
            for place in places:
                if self._save(place, arrays) and (found := self._find((place,))):
                    return found
        return arrays, None

    def _find(self, places: tuple[Path, ...]) -> tuple[Arrays, Path] | None:
        return next(((mapped, place) for place in places if (mapped := self._load(place)) is not None), None)

    def _head(self, lengths: list[int]) -> list[int]:
        return [VERSION, CONTAINER_NUMBERS[self.container], self._stamp.size, self._stamp.mtime_ns, *lengths]

    def _load(self, place: Path) -> Arrays | None:
        """Map the arrays of an index file; None if it is missing, of another file, or damaged."""
        try:
            regular(place)
            whole = np.load(place, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        start = len(self._head([])) + len(self.array_names)
        lengths = whole[start - len(self.array_names) : start].tolist() if whole.ndim == 1 and whole.dtype == np.int64 else []
        if whole[:start].tolist() != self._head(lengths) or start + sum(lengths) != len(whole) or min(lengths, default=-1) < 0:
            return None
        ends = np.cumsum([start, *lengths]).tolist()
        return {name: whole[ends[n] : ends[n + 1]] for n, name in enumerate(self.array_names)}

    def _save(self, place: Path, arrays: Arrays) -> bool:
        """Write an index file; returns whether the folder took it, for the index is a convenience."""
        partial = place.with_name(f"{place.name}.{os.getpid()}.{secrets.token_hex(4)}")
        parts = [np.asarray(arrays[name], dtype=np.int64) for name in self.array_names]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as file:
                np.save(file, np.concatenate([np.array(self._head([len(part) for part in parts])), *parts]))
            partial.replace(place)
        except OSError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        return True


def _places(path: Path) -> tuple[Path, ...]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivl" / "rows"
    name = hashlib.sha256(os.fsencode(real(path))).hexdigest()[:32]
    return path.with_name(f".{path.name}.ivl-rows"), cache / f"{name}.ivl-rows"


@contextmanager
def _building(places: tuple[Path, ...]) -> Iterator[None]:
    """Hold the lock of an index: the file `.lock` beside the first place that can be written.

    The lock is the operating system's, so that it ends with its process. Whoever had to wait finds the index, and so does
    whoever makes the file anew after its end. Without locks, or a folder to write to, every process builds for itself.
    """
    for place in places:
        lock = place.with_name(f"{place.name}.lock")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError:
            continue
        try:
            while hold(descriptor) is False:
                time.sleep(0.02)
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)
        return
    yield
