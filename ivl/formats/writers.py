"""Records into files: jsonl or a JSON array with media beside it, parquet and webdataset tar with images inside.

Each writer takes one Record at a time and raises the DataError of what its format cannot hold.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import tarfile
from pathlib import Path
from typing import Any, Protocol

from ivl.data.layouts import Written, from_record, image_suffix, refused
from ivl.errors import DataError
from ivl.types import ImageRef, Record, VideoRef

GROUP_BYTES = 1 << 23
"""Images and text of a parquet row group: small, since a random row costs the decoding of its group."""


class Writer(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class TextWriter:
    """Rows of a layout. Images that are bytes become files beside `target`; media that are files stay where they are."""

    def __init__(self, path: Path, target: Path, layout: Written) -> None:
        self.target = target
        self.layout: Written = layout
        self.folder = target.with_name(f"{target.stem}_media")
        self.array = target.suffix == ".json"
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[" if self.array else "")
        self._between = "\n" if self.array else ""

    def write(self, record: Record) -> None:
        text = json.dumps(from_record(record, layout=self.layout, medium=self._path), ensure_ascii=False)
        self._file.write(self._between + text)
        self._between = ",\n" if self.array else "\n"

    def close(self) -> None:
        self._file.write("\n]\n" if self.array else "\n")
        self._file.close()

    def _path(self, ref: ImageRef | VideoRef) -> str:
        """Relative to the rows where it lies below their folder, else absolute."""
        if isinstance(ref.source, bytes):
            return self._save(ref.source).relative_to(self.target.parent).as_posix()
        path = os.path.abspath(str(ref.source))  # noqa: PTH100, a symbolic link stays one
        below = os.path.relpath(path, self.target.parent.resolve())
        return (path if below.startswith("..") else below) + ("/" if str(ref.source).endswith("/") else "")

    def _save(self, data: bytes) -> Path:
        """Under a name that follows from the bytes: the same picture is one file."""
        name = hashlib.sha256(data).hexdigest()[:32]
        path = self.folder / name[:2] / f"{name}.{image_suffix(data)}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{name}.{secrets.token_hex(4)}")
            partial.write_bytes(data)
            partial.replace(path)
        return path


class ParquetWriter:
    """Columns id, images (structs of bytes and path) and messages (structs of role and content, marked by <image>)."""

    def __init__(self, path: Path) -> None:
        from ivl.formats.table import pa, pq

        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        turn = pa.struct([("role", pa.string()), ("content", pa.string())])
        self._schema = pa.schema([("id", pa.string()), ("images", pa.list_(image)), ("messages", pa.list_(turn))])
        self._table = pa.Table
        self._file = pq.ParquetWriter(path, self._schema, write_page_checksum=True)
        self._rows: list[dict[str, Any]] = []
        self._size = 0

    def write(self, record: Record) -> None:
        row = _embedded(record, "parquet")
        if len(record.conversations) > 1:
            raise refused(record, "several conversations", "parquet")
        self._rows.append({"id": row.get("id"), "images": row.get("images", []), "messages": row["messages"]})
        self._size += sum(len(image["bytes"]) for image in row.get("images", []))
        self._size += sum(len(turn["content"]) for turn in row["messages"])
        if self._size >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._size = [], 0

    def close(self) -> None:
        self._flush()
        self._file.close()


class TarWriter:
    """For each record its images, KEY.jpeg or KEY.0.jpeg and on, and KEY.json with the turns."""

    def __init__(self, path: Path) -> None:
        self._file = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._count = 0

    def write(self, record: Record) -> None:
        row = _embedded(record, "webdataset")
        images = [image["bytes"] for image in row.pop("images", [])]
        kinds = [image_suffix(data) for data in images]
        if "bin" in kinds:
            raise DataError(record.source, "undecodable_media", f"image {kinds.index('bin')} is of no known format")
        key = f"{self._count:09d}"
        self._count += 1
        for number, (data, kind) in enumerate(zip(images, kinds, strict=True)):
            self._add(f"{key}.{kind}" if len(images) == 1 else f"{key}.{number}.{kind}", data)
        self._add(f"{key}.json", json.dumps(row, ensure_ascii=False).encode())

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._file.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        self._file.close()


def _embedded(record: Record, name: str) -> dict[str, Any]:
    """A row whose images are {"bytes", "path"}."""

    def embed(ref: ImageRef | VideoRef) -> dict[str, Any]:
        if isinstance(ref, VideoRef):
            raise refused(record, "a video", name)
        if isinstance(ref.source, bytes):
            return {"bytes": ref.source, "path": None}
        path = Path(str(ref.source))
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(record.source, "missing_media", f"no such file: {path} ({error})") from None
        if not data:
            raise DataError(record.source, "undecodable_media", f"{path} is empty")
        return {"bytes": data, "path": path.name}

    return from_record(record, layout="swift", medium=embed)
