"""Rows of parquet files and of Arrow files, such as a saved HF data set. Needs pyarrow (the `data` extra)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ivl.errors import DataError, InputError
from ivl.formats.base import Rows, Stamp

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:  # pragma: no cover
    raise InputError("reading tables needs pyarrow; pip install 'ivl[data]'") from None

KEPT_BYTES = 1 << 25
"""Decoded row groups of one parquet file that stay in memory, so that neighbouring rows are cheap."""


class TableRows(Rows):
    """The rows of one table in blocks (row groups, record batches); row i is number i + 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = Stamp(path)
        self._file: Any = None
        with self._errors():
            sizes = self._block_sizes()
            if any(size < 0 for size in sizes):
                raise ValueError(f"blocks of {sizes} rows")
            self._ends = np.cumsum(sizes, dtype=np.int64)
        self.close()
        if not len(self._ends) or not self._ends[-1]:
            raise InputError(f"{path}: has no rows")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def raw(self, index: int) -> dict[str, Any]:
        stamp = Stamp(self.path)
        self._stamp.check(stamp.size, stamp.mtime_ns)
        block = int(np.searchsorted(self._ends, index, side="right"))
        at = index - int(self._ends[block - 1] if block else 0)
        with self._errors(index):
            row = self._block(block).slice(at, 1)
            row.validate(full=True)
            return row.to_pylist()[0]

    def _block_sizes(self) -> list[int]:
        raise NotImplementedError

    def _block(self, number: int) -> pa.Table | pa.RecordBatch:
        raise NotImplementedError

    @contextmanager
    def _errors(self, index: int | None = None) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, IndexError, MemoryError) as error:
            words = " ".join(str(error).split())[:200] or type(error).__name__
            if index is None:
                raise InputError(f"{self.path}: is no whole {self.container} file ({words})") from None
            raise DataError(self.source(index), "broken_json", f"cannot be decoded ({words})") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def close(self) -> None:
        self._file = None

    def source(self, index: int) -> str:
        return f"{self.path}:row {index + 1}"

    @property
    def num_bytes(self) -> int:
        return self._stamp.size


class ParquetRows(TableRows):
    """A row is found by decoding its row group; the last few are kept. Page checksums are verified where there are any."""

    container = "parquet"
    max_open = 4

    def __init__(self, path: Path) -> None:
        self._kept: dict[int, pa.Table] = {}
        super().__init__(path)

    def _open(self) -> pq.ParquetFile:
        if self._file is None:
            self._file = pq.ParquetFile(self.path, page_checksum_verification=True)
        return self._file

    def _block_sizes(self) -> list[int]:
        metadata = self._open().metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        if sum(sizes) != metadata.num_rows:
            raise ValueError(f"row groups of {sum(sizes)} rows, but {metadata.num_rows} rows")
        return sizes

    def _block(self, number: int) -> pa.Table:
        if number not in self._kept:
            table = self._open().read_row_group(number, use_threads=False)
            while self._kept and sum(each.nbytes for each in self._kept.values()) + table.nbytes > KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = table
        return self._kept[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": {}}

    def close(self) -> None:
        super().close()
        self._kept = {}


class ArrowRows(TableRows):
    """An IPC file or stream, memory-mapped: a row costs its own bytes."""

    container = "arrow"

    def _open(self) -> list[pa.RecordBatch]:
        if self._file is None:
            source = pa.memory_map(str(self.path))
            if source.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(source)
                self._file = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            else:
                source.seek(0)
                self._file = list(pa.ipc.open_stream(source))
        return self._file

    def _block_sizes(self) -> list[int]:
        return [batch.num_rows for batch in self._open()]

    def _block(self, number: int) -> pa.RecordBatch:
        return self._open()[number]


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder written by `save_to_disk`, in order.

    Raises:
        InputError: if its state.json does not name them, or names what lies elsewhere or is missing.
    """
    state = folder / "state.json"
    try:
        described = json.loads(state.read_bytes())
        names = [each["filename"] for each in described["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{state}: does not list the files of a saved data set") from None
    if described.get("_indices_data_files"):
        raise InputError(f"{state}: the data set is a selection over its files; save it again after flatten_indices()")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{state}: names {name!r}, which is no file of this folder")
    return [folder / name for name in names]
