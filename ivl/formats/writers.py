"""Rows into files: jsonl or a JSON array with media beside it, parquet and webdataset tar with images inside.

A writer says which layout its rows have, and what stands for a medium in them; then it takes one row at a time. It raises the
DataError of what its format cannot hold, which starts with the row's source.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import secrets
import tarfile
from pathlib import Path
from typing import Any, Literal, Protocol

from ivl.errors import DataError, InputError
from ivl.types import ImageRef, VideoRef
from ivl.utils.budgets import MAX_ROW_MEDIA_BYTES
from ivl.utils.files import real, regular

WrittenLayout = Literal["reference", "openai", "sharegpt", "swift"]
"""Layouts that rows are written in."""
GROUP_BYTES = 1 << 23
"""Images and text of a parquet row group: few, since a random row costs the decoding of its group."""
IMAGE_SUFFIXES = {
    b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff",
}  # fmt: skip
"""Suffixes by the first bytes."""


class Writer(Protocol):
    layout: WrittenLayout

    def medium(self, ref: ImageRef | VideoRef, source: str) -> Any:
        """Return what stands for a medium in a row that came from `source`."""

    def write(self, row: dict[str, Any], source: str) -> None: ...

    def close(self) -> None: ...


def image_suffix(data: bytes) -> str:
    """Return `png`, `jpeg`, ... by the first bytes; `bin` for what is no known image."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in IMAGE_SUFFIXES.items() if data.startswith(magic)), "bin")


def medium_value(ref: ImageRef | VideoRef) -> str:
    """Return a path, or a data URL for bytes."""
    if isinstance(ref.source, bytes):
        return f"data:image/{image_suffix(ref.source)};base64,{base64.b64encode(ref.source).decode()}"
    return str(ref.source)


def refused(source: str, content: str, layout: str | None = None) -> DataError:
    """Make the error of a row with content that a layout cannot hold; None is any layout."""
    return DataError(source, "bad_row", f"a row{f' of {layout} layout' if layout else ''} cannot hold {content}")


class TextWriter:
    """Rows of a layout. Images that are bytes become files beside `target`; media that are files stay where they are."""

    def __init__(self, path: Path, target: Path, layout: WrittenLayout) -> None:
        self.target = target
        self.layout: WrittenLayout = layout
        self.folder = target.with_name(f"{target.stem}_media")
        self.array = target.suffix == ".json"
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[" if self.array else "")
        self._between = "\n" if self.array else ""

    def medium(self, ref: ImageRef | VideoRef, source: str) -> str:  # noqa: ARG002, a Writer's method
        """A path: relative to the rows where it lies below their folder, else absolute."""
        if isinstance(ref.source, bytes):
            return self._save(ref.source).relative_to(self.target.parent).as_posix()
        path = os.path.abspath(str(ref.source))  # noqa: PTH100, a symbolic link stays one
        below = os.path.relpath(path, real(self.target.parent))
        return (path if below.startswith("..") else below) + ("/" if str(ref.source).endswith("/") else "")

    def write(self, row: dict[str, Any], source: str) -> None:
        try:
            self._file.write(self._between + json.dumps(row, ensure_ascii=False))
        except UnicodeEncodeError:
            raise refused(source, "a path that is not UTF-8; rename the file or its folder", self.layout) from None
        self._between = ",\n" if self.array else "\n"

    def close(self) -> None:
        self._file.write("\n]\n" if self.array else "\n")
        self._file.close()

    def _save(self, data: bytes) -> Path:
        """Write the image under the hash of its bytes, so that the same picture is one file."""
        name = hashlib.sha256(data).hexdigest()[:32]
        path = self.folder / name[:2] / f"{name}.{image_suffix(data)}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{name}.{secrets.token_hex(4)}")
            partial.write_bytes(data)
            partial.replace(path)
        return path


class ParquetRowWriter:
    """Columns id, images (structs of bytes and path) and messages (structs of role and content, marked by <image>)."""

    layout: WrittenLayout = "swift"

    def __init__(self, path: Path) -> None:
        from ivl.formats.table import pa, pq

        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        turn = pa.struct([("role", pa.string()), ("content", pa.string())])
        self._schema = pa.schema([("id", pa.string()), ("images", pa.list_(image)), ("messages", pa.list_(turn))])
        self._table = pa.Table
        self._file = pq.ParquetWriter(path, self._schema, write_page_checksum=True)
        self._rows: list[dict[str, Any]] = []
        self._size = 0

    def medium(self, ref: ImageRef | VideoRef, source: str) -> dict[str, Any]:
        return _embedded(ref, source, "parquet")

    def write(self, row: dict[str, Any], source: str) -> None:
        if "chosen" in row or isinstance(row["messages"][0], list):
            raise refused(source, "several conversations", "parquet")
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
    """For each row its images, KEY.jpeg or KEY.0.jpeg and on, and KEY.json with the turns."""

    layout: WrittenLayout = "swift"

    def __init__(self, path: Path) -> None:
        self._file = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._count = 0

    def medium(self, ref: ImageRef | VideoRef, source: str) -> dict[str, Any]:
        return _embedded(ref, source, "webdataset")

    def write(self, row: dict[str, Any], source: str) -> None:
        images = [image["bytes"] for image in row.get("images", [])]
        kinds = [image_suffix(data) for data in images]
        if "bin" in kinds:
            raise DataError(source, "undecodable_media", f"image {kinds.index('bin')} is of no known format")
        key = f"{self._count:09d}"
        self._count += 1
        for number, (data, kind) in enumerate(zip(images, kinds, strict=True)):
            self._add(f"{key}.{kind}" if len(images) == 1 else f"{key}.{number}.{kind}", data)
        rest = {name: value for name, value in row.items() if name != "images"}
        self._add(f"{key}.json", json.dumps(rest, ensure_ascii=False).encode())

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._file.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        self._file.close()


def _embedded(ref: ImageRef | VideoRef, source: str, layout: str) -> dict[str, Any]:
    """{"bytes", "path"} of an image."""
    if isinstance(ref, VideoRef):
        raise refused(source, "a video", layout)
    if isinstance(ref.source, bytes):
        return {"bytes": ref.source, "path": None}
    path = Path(str(ref.source))
    try:
        if (size := regular(path).st_size) > MAX_ROW_MEDIA_BYTES:
            raise DataError(source, "too_long", f"{path} has {size:,} bytes, the limit of a row is {MAX_ROW_MEDIA_BYTES:,}")
        data = path.read_bytes()
    except DataError:
        raise
    except InputError as error:  # a pipe or a device
        raise DataError(source, "undecodable_media", str(error)) from None
    except (OSError, ValueError) as error:
        raise DataError(source, "missing_media", f"no such file: {path} ({error})") from None
    if not data:
        raise DataError(source, "undecodable_media", f"{path} is empty")
    return {"bytes": data, "path": path.name}
