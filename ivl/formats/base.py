"""What every reader of rows offers: a length, random access, and a place to name in errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ivl.data.records import DataError, Layout, describe, to_record
from ivl.errors import InputError
from ivl.types import Record


class Rows(ABC):
    """The rows of one file or folder. Forked and spawned workers may share one: reads are positional, state is small.

    Reading a row that is damaged raises the DataError of its source; a file that changed since it was opened, InputError.
    """

    container: str
    layout: Layout | None = None
    """What every row must be; None reads each row by its own keys."""
    max_open: ClassVar[int] = 64
    """Files of a folder that stay open in one process."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> bytes | dict[str, Any]:
        """A JSON object as bytes, or a row with its media as a dict; `to_record` reads both."""

    @abstractmethod
    def source(self, index: int) -> str:
        """Where the row is, as `file:line`, `file:row N` or `file:key`."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of everything on disk."""

    def line(self, index: int) -> int:
        """The line a row begins on, counted from 1; the row's number where the file has no lines."""
        return index + 1

    def close(self) -> None:
        """Give back what reading opened; reading opens it again."""
        return None

    def record(self, index: int, *, root: Path, dataset: str = "") -> Record:
        """Read one row as a Record.

        Raises:
            DataError: if the row is not what it should be.
        """
        return to_record(self[index], source=self.source(index), root=root, dataset=dataset, layout=self.layout)

    @property
    def format(self) -> str:
        """What the file was taken for, in words. Every row is read by its own keys, whatever the first one has."""
        try:
            first = self[0]
        except DataError:
            first = b""
        return describe(self.container, first, self.layout)


class Shards(Rows):
    """Files of one kind, one after another."""

    def __init__(self, shards: list[Rows]) -> None:
        self.container = shards[0].container
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])
        self._open: dict[int, None] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard - 1] if shard else 0)

    def __getitem__(self, index: int) -> bytes | dict[str, Any]:
        shard, at = self._find(index)
        self._open.pop(shard, None)
        self._open[shard] = None  # newest last
        if len(self._open) > self._shards[0].max_open:
            oldest = next(iter(self._open))
            del self._open[oldest]
            self._shards[oldest].close()
        return self._shards[shard][at]

    def source(self, index: int) -> str:
        shard, at = self._find(index)
        return self._shards[shard].source(at)

    def line(self, index: int) -> int:
        shard, at = self._find(index)
        return self._shards[shard].line(at)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self._shards)

    def close(self) -> None:
        for shard in self._open:
            self._shards[shard].close()
        self._open.clear()


class Stamp:
    """Size and time of a file as it was opened, to notice a change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        self.size, self.mtime_ns = stat.st_size, stat.st_mtime_ns

    def check(self, size: int, mtime_ns: int) -> None:
        if (size, mtime_ns) != (self.size, self.mtime_ns):
            raise InputError(f"{self.path}: changed while in use; start again with the new file")
