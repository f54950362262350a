"""What every reader of rows offers: a length, random access, and a place to name in errors."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from ivl.errors import DataError, InputError
from ivl.utils.budgets import MAX_ROW_BYTES, MAX_ROW_ITEMS
from ivl.utils.files import regular

RowLayout = Literal["reference", "openai", "sharegpt", "swift", "alpaca", "finevision"]
"""How a row names its turns and media."""
LAYOUT_NAMES = {
    "openai": "OpenAI messages",
    "sharegpt": "ShareGPT",
    "swift": "ms-swift",
    "alpaca": "Alpaca",
    "finevision": "FineVision",
}
KEPT_BYTES = 1 << 25
"""Decoded groups of rows of a data set that stay in memory, unless its reader keeps more."""


class Rows(ABC):
    """The rows of one file or folder. Forked and spawned workers may share one: reads are positional, state is small."""

    container: str
    layout: RowLayout | None = None
    """The layout that every row must have; None reads each row by its own keys."""
    max_open: ClassVar[int] = 64
    """Files of a folder that stay open in one process."""

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one row; media that the file holds are bytes.

        Raises:
            DataError: if the row is damaged.
            InputError: if the file changed since it was opened.
        """
        row = self.raw(index)
        return parse_row(row, source=self.source(index)) if isinstance(row, bytes) else row

    @abstractmethod
    def raw(self, index: int) -> bytes | dict[str, Any]:
        """Read one row without parsing it: the bytes of a line of jsonl or of an element of a JSON array, else the row."""

    @abstractmethod
    def source(self, index: int) -> str:
        """The row's place: `file:line`, `file:row N` or `file:key`."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of all files."""

    def close(self) -> None:  # noqa: B027, formats without open files have nothing to close
        """Close open files; reading opens them again."""

    def groups(self) -> tuple[np.ndarray, np.ndarray] | None:
        """For each group of rows that are decoded together, the number of the row behind its last, and its bytes in memory.

        None where a row is read alone.
        """
        return None

    def keep(self, cache: GroupCache) -> None:  # noqa: B027, formats without groups keep nothing
        """Keep decoded groups in a cache that other files may share."""

    @property
    def format(self) -> str:
        """The format in words, by the keys of the first row. Every row is read by its own keys, whatever the first one has."""
        if self.layout is not None:
            return f"{LAYOUT_NAMES.get(self.layout, self.layout)} {self.container}, as told"
        try:
            first = self[0]
        except DataError:
            first = {}
        keys = {key for key, value in first.items() if value is not None}
        has_lists = bool(keys & {"images", "videos", "system"})
        if "conversations" in keys:
            name = "ShareGPT" if has_lists else "reference" if self.container == "jsonl" else "LLaVA"
        elif "messages" in keys:
            name = "ShareGPT" if has_lists else "OpenAI messages"
        else:
            marks = {"FineVision": {"texts"}, "Alpaca": {"instruction", "output"}, "ms-swift": {"query", "response"}}
            name = next((name for name, needed in marks.items() if needed <= keys), "")
        return f"{name} {self.container}" if name else f"{self.container} of unknown rows"


def parse_row(text: bytes, *, source: str) -> dict[str, Any]:
    """Parse the JSON object of one row.

    Raises:
        DataError: naming `source`, if it is not valid JSON, not text, no object or too large.
    """
    check_items(text, source)
    try:
        row = json.loads(text)
        # Half of a surrogate pair, written as an escape, is valid JSON but no text.
        if b"\\ud" in text or b"\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        remedy = "save the file as UTF-8, as `iconv -f LATIN1 -t UTF-8` does"
        raise DataError(source, "broken_json", f"not UTF-8 (byte 0x{text[error.start]:02x}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(source, "broken_json", f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(source, "bad_row", f"expected an object, got {type(row).__name__}")
    return row


def check_items(text: bytes | str, source: str) -> None:
    """Raise DataError for the JSON of a row that would take too much memory once it is parsed."""
    if len(text) > MAX_ROW_BYTES:
        raise DataError(source, "too_long", f"{len(text):,} bytes, the limit of a row is {MAX_ROW_BYTES:,}")
    opening: tuple[Any, ...] = (b"[", b"{", b",") if isinstance(text, bytes) else ("[", "{", ",")
    if len(text) > MAX_ROW_ITEMS and (count := sum(map(text.count, opening))) > MAX_ROW_ITEMS:
        raise DataError(source, "too_long", f"up to {count:,} values, the limit of a row is {MAX_ROW_ITEMS:,}")


class GroupCache:
    """The decoded groups that were read last, up to a number of bytes, so that neighboring rows are cheap."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[Any, Any] = {}

    def get(self, key: Any, decode: Callable[[], Any]) -> Any:
        """The group under a key, which has `nbytes`; decoded if it is not there."""
        if (group := self._kept.pop(key, None)) is None:
            group = decode()
            while self._kept and sum(each.nbytes for each in self._kept.values()) + group.nbytes > self.limit:
                del self._kept[next(iter(self._kept))]
        self._kept[key] = group  # newest last
        return group

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


class Shards(Rows):
    """Files of one kind, one after another."""

    def __init__(self, shards: list[Rows]) -> None:
        kinds = [shard.container for shard in shards]
        self.container = next((kind for kind in kinds if kind != "jsonl"), "jsonl")  # lines only if all are
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])
        self._open: dict[int, None] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard - 1] if shard else 0)

    def raw(self, index: int) -> bytes | dict[str, Any]:
        shard, at = self._find(index)
        self._open.pop(shard, None)
        self._open[shard] = None  # newest last
        if len(self._open) > self._shards[0].max_open:
            oldest = next(iter(self._open))
            del self._open[oldest]
            self._shards[oldest].close()
        return self._shards[shard].raw(at)

    def source(self, index: int) -> str:
        shard, at = self._find(index)
        return self._shards[shard].source(at)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self._shards)

    def groups(self) -> tuple[np.ndarray, np.ndarray] | None:
        parts = [part for shard in self._shards if (part := shard.groups()) is not None]
        if len(parts) < len(self._shards):
            return None
        starts = self._ends - [len(shard) for shard in self._shards]
        ends = [start + ends for start, (ends, _) in zip(starts, parts, strict=True)]
        return np.concatenate(ends), np.concatenate([sizes for _, sizes in parts])

    def keep(self, cache: GroupCache) -> None:
        for shard in self._shards:
            shard.keep(cache)

    def close(self) -> None:
        for shard in self._open:
            self._shards[shard].close()
        self._open.clear()


class Stamp:
    """Size and time of a file when it was opened, to notice a change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            stat = regular(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        self.size, self.mtime_ns = stat.st_size, stat.st_mtime_ns

    def check(self, size: int, mtime_ns: int) -> None:
        if (size, mtime_ns) != (self.size, self.mtime_ns):
            raise InputError(f"{self.path}: changed while in use; start again with the new file")
