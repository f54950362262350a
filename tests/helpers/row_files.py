"""Files of rows in every container, for the tests of readers and of `convert`."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ivl.types import ImageRef, Record, Text, VideoRef


def png(seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (3, 2), (seed % 256, 7, 9)).save(out, "PNG")
    return out.getvalue()


def tar_file(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def parquet_file(path: Path, rows: list[dict[str, Any]], *, group: int = 2) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group, write_page_checksum=True)
    return path


def saved_dataset(folder: Path, rows: list[dict[str, Any]], *, files: int = 2) -> Path:
    """A folder that `datasets` wrote."""
    datasets.Dataset.from_list(rows).save_to_disk(str(folder), num_shards=files)
    return folder


def contents(record: Record) -> list[Any]:
    """What a record says and shows, wherever its media are kept."""

    def part(each: Any) -> Any:
        if isinstance(each, Text):
            return each.text
        if isinstance(each, VideoRef):
            return "video", each.source, each.clip
        assert isinstance(each, ImageRef)
        return each.source if isinstance(each.source, bytes) else Path(str(each.source)).read_bytes()

    return [[(message.role, [part(each) for each in message.content]) for message in talk] for talk in record.conversations]
