"""Rows at byte offsets of one file; the offsets are computed once, kept beside the file, and mapped by every process.

An index is a .npy file of int64: its version, the container's number, size and time of the file that it belongs to, the length
of each array, then the arrays. Its name starts with a dot, or it lies in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ivl.errors import InputError
from ivl.formats.base import Rows, Stamp
from ivl.utils.files import regular

VERSION = 3
MIN_BYTES = 1 << 25
"""Smaller files are indexed in memory: that takes milliseconds."""
CONTAINER_NUMBERS = {"jsonl": 0, "json": 1, "webdataset": 2}

Arrays = dict[str, np.ndarray]


class IndexedRows(Rows):
    """Rows at byte offsets of one file. Workers share the file and, where it is large, the memory of its index.

    Raises:
        InputError: if the file is missing or empty; when a row is read and the file has changed since it was opened.
    """

    array_names: ClassVar[tuple[str, ...]]
    """Names of the arrays of the index, in their order in the file."""
    _fd: int | None = None

    def __init__(self, path: Path, container: str) -> None:
        self.path, self.container = path, container
        self._stamp = Stamp(path)
        self._arrays, self._index = self._load_or_build()
        if not len(self):
            raise InputError(f"{path}: has no rows")

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
        return {**self.__dict__, "_fd": None, "_arrays": None if self._index else self._arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._index:
            self._arrays, self._index = self._load_or_build()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def num_bytes(self) -> int:
        return self._stamp.size

    # -- the index

    def _load_or_build(self) -> tuple[Arrays, Path | None]:
        """The arrays, and the index file that they are mapped from if there is one.

        Several processes may do this at once: each writes its own file and moves it into place whole.
        """
        places = _places(self.path) if self._stamp.size >= MIN_BYTES else ()
        for place in places:
            if (mapped := self._load(place)) is not None:
                return mapped, place
        arrays = self._build()
        for place in places:
            if self._save(place, arrays) and (mapped := self._load(place)) is not None:
                return mapped, place
        return arrays, None

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
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return path.with_name(f".{path.name}.ivl-rows"), cache / f"{name}.ivl-rows"
