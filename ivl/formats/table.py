"""Rows of parquet and Arrow files. Needs pyarrow (the `data` extra)."""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ivl.errors import DataError, InputError
from ivl.formats.base import KEPT_BYTES, GroupCache, Rows, Stamp
from ivl.utils.budgets import MAX_GROUP_BYTES, MAX_ROW_ITEMS, MAX_ROW_MEDIA_BYTES, MAX_ROWS, MAX_ROWS_A_BYTE
from ivl.utils.strict_json import read_json

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:  # pragma: no cover
    raise InputError("reading tables needs pyarrow; pip install 'ivl[data]'") from None


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
        if not len(self):
            raise InputError(f"{path}: has no rows")
        if len(self) > min(MAX_ROWS, MAX_ROWS_A_BYTE * self._stamp.size):  # of nulls alone, a few bytes hold billions
            limits = f"the limits are {MAX_ROWS:,}, and {MAX_ROWS_A_BYTE} a byte; split it into several files of one folder"
            raise InputError(f"{path}: {len(self):,} rows in {self._stamp.size:,} bytes, {limits}")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def raw(self, index: int) -> dict[str, Any]:
        stamp = Stamp(self._stamp.path)
        self._stamp.check(stamp.size, stamp.mtime_ns)
        block = int(np.searchsorted(self._ends, index, side="right"))
        at = index - int(self._ends[block - 1] if block else 0)
        with self._errors(index):
            row = self._row(block, at)
            if (size := sum(map(_size, row.columns))) > MAX_ROW_MEDIA_BYTES:
                problem = f"a row of some {size:,} bytes, the limit is {MAX_ROW_MEDIA_BYTES:,}"
                raise DataError(self.source(index), "too_long", problem)
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


def _size(array: pa.Array | pa.ChunkedArray) -> int:
    """What an array takes as Python values. A value of a dictionary counts as often as it is used."""
    if isinstance(array, pa.ChunkedArray):
        return sum(map(_size, array.chunks))
    kind, size = array.type, len(array) * (MAX_ROW_MEDIA_BYTES // MAX_ROW_ITEMS)
    if isinstance(array, pa.ExtensionArray):
        return _size(array.storage)
    if isinstance(array, pa.DictionaryArray):
        lengths = (
            pc.binary_length(array.dictionary)  # pyright: ignore[reportAttributeAccessIssue] (made at import)
            if _is_binary(kind.value_type)
            else pa.nulls(len(array.dictionary), pa.int32())
        )
        return size + (pc.sum(lengths.take(array.indices)).as_py() or 0)  # pyright: ignore[reportAttributeAccessIssue]
    if pa.types.is_struct(kind):
        return size + sum(map(_size, array.flatten()))
    if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):  # a map is a list
        return size + _size(array.flatten())
    if _is_binary(kind) or pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return size + array.nbytes
    raise ValueError(f"a column of the type {kind} is not read")


def _is_binary(kind: pa.DataType) -> bool:
    """Whether the values are texts or bytes with offsets of their own."""
    checks = (pa.types.is_binary, pa.types.is_string, pa.types.is_large_binary, pa.types.is_large_string)
    return any(check(kind) for check in (*checks, pa.types.is_fixed_size_binary))


class ParquetRows(TableRows):
    """A row is found by decoding its row group; the last few are kept. Page checksums are verified where there are any.

    Texts and bytes are read as dictionaries: a value of 500 MB that comes four times is in memory once.
    """

    container = "parquet"
    max_open = 4

    def __init__(self, path: Path) -> None:
        self._kept = GroupCache(KEPT_BYTES)
        super().__init__(path)

    def _open(self) -> pq.ParquetFile:
        if self._file is None:
            metadata = pq.read_metadata(self.path)
            leaves = map(metadata.schema.column, range(metadata.num_columns))
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            self._file = pq.ParquetFile(self.path, metadata=metadata, read_dictionary=texts, page_checksum_verification=True)
        return self._file

    def _block_sizes(self) -> list[int]:
        metadata = self._open().metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        sizes = [group.num_rows for group in groups]
        if sum(sizes) != metadata.num_rows:
            raise ValueError(f"row groups of {sum(sizes)} rows, but {metadata.num_rows} rows")
        self._group_bytes = np.array([group.total_byte_size for group in groups], dtype=np.int64)
        return sizes

    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        return self._ends, self._group_bytes

    def keep(self, cache: GroupCache) -> None:
        self._kept = cache

    def _row(self, block: int, at: int) -> pa.Table:
        return self._kept.get((self.path, block), lambda: self._decode(block)).slice(at, 1)

    def _decode(self, number: int) -> pa.Table:
        self._check_group(number)
        table = self._open().read_row_group(number, use_threads=False)
        table.validate(full=True)
        return table

    def _check_group(self, number: int) -> None:
        """Refuse a row group by what the file says of it; a few bytes may stand for many equal numbers."""
        metadata = self._open().metadata
        group = metadata.row_group(number)
        size = group.total_byte_size + 8 * metadata.num_columns * group.num_rows
        if size > min(MAX_GROUP_BYTES, MAX_ROW_MEDIA_BYTES * group.num_rows):
            problem = (
                f"its row group takes {size:,} bytes in memory for {group.num_rows:,} rows, the limits are "
                f"{MAX_GROUP_BYTES:,}, and {MAX_ROW_MEDIA_BYTES:,} a row; write smaller ones (row_group_size=100)"
            )
            raise DataError(self.source(int(self._ends[number] - group.num_rows)), "too_long", problem)


class ArrowRows(TableRows):
    """An Arrow file or stream, memory-mapped: a row costs its own bytes. Compressed batches are all unpacked at once."""

    container = "arrow"

    def _open(self) -> list[pa.RecordBatch]:
        if self._file is None:
            source = pa.memory_map(str(self.path))
            start = 8 if source.read(6) == b"ARROW1" else 0  # a file is a stream, and a list of its batches
            if start:
                pa.ipc.open_file(source)  # fails where the list is missing, for the file was cut off
            source.seek(start)
            if (size := _unpacked_bytes(source)) > MAX_GROUP_BYTES:
                problem = f"its batches are compressed and take {size:,} bytes in memory, the limit is {MAX_GROUP_BYTES:,}"
                raise InputError(f"{self.path}: {problem}; write it without compression, or as parquet")
            source.seek(start)
            self._file = list(pa.ipc.open_stream(source))
        return self._file

    def _block_sizes(self) -> list[int]:
        return [batch.num_rows for batch in self._open()]

    def _row(self, block: int, at: int) -> pa.RecordBatch:
        row = self._open()[block].slice(at, 1)
        row.validate(full=True)
        return row


def _unpacked_bytes(source: pa.NativeFile) -> int:
    """What the compressed buffers of a stream's batches take in memory, by the number before each.

    The numbers of Arrow's Message.fbs are those of its fields: a message has its kind (1) and its batch (2), a batch of a
    dictionary its values (1), and a batch its buffers (2), each with place and length, and its compression (3).
    """
    total, messages = 0, pa.ipc.MessageReader.open_stream(source)
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return total
        data, body = message.metadata.to_pybytes(), message.body
        header = _field(data, _target(data, 0), 2)
        if message.type == "dictionary":
            header = _field(data, _target(data, header), 1)
        elif message.type != "record batch":
            continue
        batch = _target(data, header)
        if _field(data, batch, 3) and (buffers := _field(data, batch, 2)):
            at = _target(data, buffers)
            (count,) = struct.unpack_from("<I", data, at)
            for place, length in struct.iter_unpack("<qq", data[at + 4 : at + 4 + 16 * count]):
                total += max(length, int.from_bytes(body[place : place + 8], "little", signed=True)) if length else 0


def _target(data: bytes, at: int) -> int:
    """Where the reference at a place of a flatbuffer leads."""
    return at + struct.unpack_from("<I", data, at)[0]


def _field(data: bytes, table: int, number: int) -> int:
    """Where a table of a flatbuffer has a field, 0 if it lacks it."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    entry = 4 + 2 * number
    offset = struct.unpack_from("<H", data, fields + entry)[0] if entry < struct.unpack_from("<H", data, fields)[0] else 0
    return offset and table + offset


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `save_to_disk` of Hugging Face's datasets wrote, in their order.

    Raises:
        InputError: if its state.json names none, or names rows by their numbers, as old versions did.
    """
    state = read_json(folder / "state.json")
    names = [file.get("filename") for file in state.get("_data_files") or ()] if isinstance(state, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{folder}: state.json names no files of rows")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise InputError(f"{folder}: holds a selection of rows; load it by datasets, and save it again")
    return [folder / name for name in names]
