"""Rows of parquet and Arrow files and of saved Hugging Face data sets. Needs pyarrow and datasets (the `data` extra)."""

from __future__ import annotations

from abc import abstractmethod
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
"""Decoded row groups of one parquet file that stay in memory, so that neighboring rows are cheap."""


class TableRows(Rows):
    """The rows of one table in blocks (row groups, record batches); row i is number i + 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = Stamp(path / "state.json" if path.is_dir() else path)
        self._file: Any = None
        with self._errors():
            sizes = self._block_sizes()
            if any(size < 0 for size in sizes):
                raise ValueError(f"blocks of {sizes} rows")
            self._ends = np.cumsum(sizes, dtype=np.int64)
        self.close()
        if not len(self):
            raise InputError(f"{path}: has no rows")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def raw(self, index: int) -> dict[str, Any]:
        stamp = Stamp(self._stamp.path)
        self._stamp.check(stamp.size, stamp.mtime_ns)
        block = int(np.searchsorted(self._ends, index, side="right"))
        at = index - int(self._ends[block - 1] if block else 0)
        with self._errors(index):
            row = self._row(block, at)
            row.validate(full=True)
            return row.to_pylist()[0]

    @abstractmethod
    def _block_sizes(self) -> list[int]: ...

    @abstractmethod
    def _row(self, block: int, at: int) -> pa.Table | pa.RecordBatch:
        """A table of one row: the row `at` of a block."""

    @contextmanager
    def _errors(self, index: int | None = None) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # libraries raise whatever their parsing meets
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

    def _row(self, block: int, at: int) -> pa.Table:
        return self._group(block).slice(at, 1)

    def _group(self, number: int) -> pa.Table:
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
    """An Arrow file or stream, memory-mapped: a row costs its own bytes."""

    container = "arrow"

    def _open(self) -> list[pa.RecordBatch]:
        if self._file is None:
            source = pa.memory_map(str(self.path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                reader = pa.ipc.open_file(source)
                self._file = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            else:
                self._file = list(pa.ipc.open_stream(source))
        return self._file

    def _block_sizes(self) -> list[int]:
        return [batch.num_rows for batch in self._open()]

    def _row(self, block: int, at: int) -> pa.RecordBatch:
        return self._open()[block].slice(at, 1)


class SavedRows(TableRows):
    """A folder that `save_to_disk` of Hugging Face's datasets wrote."""

    container = "arrow"

    def _open(self) -> Any:
        """The data set, which gives tables; images stay encoded."""
        if self._file is None:
            try:
                import datasets
            except ImportError:  # pragma: no cover
                raise InputError(f"{self.path}: reading it needs datasets; pip install 'ivl[data]'") from None
            self._file = datasets.load_from_disk(str(self.path)).with_format("arrow")
        return self._file

    def _block_sizes(self) -> list[int]:
        return [len(self._open())]

    def _row(self, block: int, at: int) -> pa.Table:  # noqa: ARG002, all rows are one block
        return self._open()[at]

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.glob("*.arrow"))
