"""One small file takes neither memory nor time: pipes, devices, long lines, packed tables and tars are refused by name."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ivl.errors import DataError, InputError
from ivl.formats import base, tar, text
from ivl.formats.rows import open_rows, write_jsonl
from tests.helpers.row_files import tar_file

READ = """
import resource, sys
import pyarrow.parquet
from ivl.errors import DataError
from ivl.formats import table
from ivl.formats.rows import open_rows
table.MAX_GROUP_BYTES, table.MAX_ROW_MEDIA_BYTES = 1 << 25, 12_000_000  # an eighth
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = open_rows(sys.argv[1])
for index in range(len(rows)):
    try:
        rows[index]
    except DataError as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used >> 10)
"""


def read_alone(path: Path) -> tuple[list[str], int]:
    """The errors of all rows, read in a process of its own, and the memory that it took for them in MB."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True, timeout=100)
    *errors, megabytes = done.stdout.splitlines()
    return errors, int(megabytes)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow", "a.tar"])
def test_special_files_are_refused_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: is a pipe, not a regular file"):
        open_rows(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    for format in (None, {"jsonl": "jsonl", "tar": "webdataset"}.get(name[2:], name[2:])):
        with pytest.raises(InputError, match=f"{name}: is a device, not a regular file"):
            open_rows(tmp_path / name, format=format)


def test_a_pipe_in_the_place_of_an_index_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ivl.formats.offsets.MIN_BYTES", 0)
    path = write_jsonl([{"a": 1}], tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / ".a.jsonl.ivl-rows")
    assert open_rows(path)[0] == {"a": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_row_of_many_bytes_is_one_bad_row(tmp_path: Path, name: str) -> None:
    """The file has a hole of 4 GB, which costs no disk."""
    path, array = tmp_path / name, name == "a.json"
    with path.open("wb") as file:
        file.write(b'[{"a": 1}, {"a": "' if array else b'{"a": 1}\n{"a": "')
        file.seek(1 << 27 if array else 1 << 28, os.SEEK_CUR)
        file.write(b'"}, {"a": 3}]' if array else b'"}\n{"a": 3}\n')
    errors, megabytes = read_alone(path)
    assert len(errors) == 1 and errors[0].startswith(f"{path}: row 2: " if array else f"{path}:2: ")
    assert "bytes, the limit of a row is 67,108,864" in errors[0] and megabytes < 150


def test_a_row_of_many_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": [' + b"[]," * 2_000_000 + b"[]]}\n")
    errors, megabytes = read_alone(tmp_path / "a.jsonl")
    assert "values, the limit of a row is 1,000,000" in errors[0] and megabytes < 150


def test_blank_lines_cost_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" * 20_000_000 + b'{"a": 1}\n')
    errors, megabytes = read_alone(tmp_path / "a.jsonl")
    assert not errors and megabytes < 150
    assert open_rows(tmp_path / "a.jsonl").source(0).endswith(":20000001")


def test_a_file_of_too_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_ROWS", 3)
    monkeypatch.setattr(tar, "MAX_ROWS", 3)
    for name, content in (("a.jsonl", "1\n2\n3\n4\n"), ("a.json", "[1, 2, 3, 4]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=f"{name}: has more than 3 rows; split it"):
            open_rows(tmp_path / name)
    with pytest.raises(InputError, match="more than 3 members; split it"):
        open_rows(tar_file(tmp_path / "a.tar", [(f"{n}.txt", b"") for n in range(4)]))


@pytest.mark.parametrize(("rows", "megabytes"), [(4, 40), (1, 12), (9, 40)])
def test_a_row_group_of_one_letter_is_refused_before_it_is_read(tmp_path: Path, rows: int, megabytes: int) -> None:
    table = pa.table({"messages": pa.chunked_array([pa.array(["a" * (megabytes << 20)])] * rows)})
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, table.schema, compression="zstd", dictionary_pagesize_limit=1 << 30) as writer:
        writer.write_table(table, row_group_size=rows)
    assert path.stat().st_size < 1 << 17
    errors, used = read_alone(path)
    assert len(errors) == rows and used < 30
    assert errors[0].startswith(f"{path}:row 1: its row group takes") and "row_group_size=100" in errors[0]


def test_a_value_of_a_dictionary_counts_as_often_as_it_is_shown(tmp_path: Path) -> None:
    """40,000 images of one row that are the same megabyte, of which nothing is unpacked; and a million empty ones."""
    bytes_ = pa.DictionaryArray.from_arrays(pa.array([0] * 40_001, pa.int32()), pa.array([b"a" * (1 << 20)]))
    images = pa.ListArray.from_arrays([0, 40_000, 40_001], bytes_)
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out,
        pa.ipc.new_file(out, pa.schema([("images", images.type)])) as writer,
    ):
        writer.write_batch(pa.record_batch([images], ["images"]))
    errors, used = read_alone(tmp_path / "a.arrow")
    assert len(errors) == 1 and errors[0].startswith(f"{tmp_path}/a.arrow:row 1: a row of some 41,9") and used < 150


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_a_table_of_billions_of_nulls_is_refused(tmp_path: Path, name: str) -> None:
    table = pa.table({"text": pa.nulls(1_000_000)})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError, match=rf"{name}: 1,000,000 rows in \d,?\d* bytes, the limits are .* a byte; split it"):
        open_rows(tmp_path / name)


@pytest.mark.parametrize("stream", [False, True])
def test_compressed_batches_are_weighed_before_they_are_unpacked(
    tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = ["a" * 10_000, "b" * 10_000]
    table = pa.table({"text": pa.chunked_array([letters, letters]), "kind": pa.array(letters * 2).dictionary_encode()})
    path, options = tmp_path / "a.arrow", pa.ipc.IpcWriteOptions(compression="zstd")
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema, options=options) as writer:
        writer.write_table(table)
    assert path.stat().st_size < 4000
    assert open_rows(path)[3] == {"text": letters[1], "kind": letters[1]}
    monkeypatch.setattr("ivl.formats.table.MAX_GROUP_BYTES", 60_000)  # 40,000 of the texts, and 20,000 of the dictionary
    with pytest.raises(InputError, match=r"compressed and take 60,\d+ bytes in memory, the limit is 60,000; write it without"):
        open_rows(path)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    assert open_rows(path)[0]["text"] == letters[0]  # not compressed: it is mapped


def test_honest_tables_are_read_as_before(tmp_path: Path) -> None:
    rows = [{"id": n, "images": [{"bytes": bytes([n % 256]) * 9, "path": None}] * (n % 3), "text": "é" * n, "clip": [0.5, n]}
            for n in range(300)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=64)
    opened = open_rows(tmp_path / "a.parquet")
    assert [opened[n] for n in range(300)] == rows


def test_members_of_a_tar_are_weighed_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(tar, "MAX_ROW_MEDIA_BYTES", 5000)
    rows = open_rows(tar_file(tmp_path / "a.tar", [
        ("a.txt", b"x" * 1001), ("a.png", b"x"), ("b.txt", b"x"), ("b.png", b"x" * 5000),
        ("c.txt", b"x"), ("c.png", b"x" * 4999),
    ]))  # fmt: skip
    for index, size in ((0, "1,001"), (1, "5,001")):
        with pytest.raises(DataError, match=f"members of {size} bytes") as caught:
            rows[index]
        assert caught.value.kind == "too_long"
    assert rows[2]["images"][0]["bytes"] == b"x" * 4999


def test_a_long_header_of_a_tar_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, 1 << 28
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(1 << 29)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="a header of 268,435,456 bytes"):
        open_rows(tmp_path / "a.tar")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 100_000


def test_a_row_within_the_budgets_is_parsed() -> None:
    assert base.parse_row(b'{"a": "' + b"x" * 2_000_000 + b'"}', source="a:1")["a"] == "x" * 2_000_000
