"""Random access to the rows of a data set, whatever file or folder holds them.

The container is found by what the file holds; rows are then read by their own keys (see ivl.data.records), so that one file
may mix layouts. Both can be forced by naming a format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ivl.errors import InputError
from ivl.formats.base import KEPT_BYTES, GroupCache, RowLayout, Rows, Shards
from ivl.formats.text import TextRows, is_json
from ivl.utils.files import digest, not_itself, regular

Container = Literal["jsonl", "json", "parquet", "arrow", "webdataset"]
"""How a file or folder is built."""
RowFormat = Literal[Container, RowLayout]
"""A format that `open_rows` can be told: how the file is built, or the layout that its rows must have."""
CONTAINERS: tuple[Container, ...] = get_args(Container)
FORMATS: tuple[RowFormat, ...] = get_args(RowFormat)

SUFFIXES = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
MAX_HASHED = 1 << 32


def open_rows(path: str | Path, *, format: str | None = None) -> Rows:
    """Open a file or a folder of rows: jsonl, JSON array, parquet, a saved HF data set, webdataset tar.

    Args:
        format: one of FORMATS. A container (`parquet`) is how the file is built; a layout (`sharegpt`) is what every row must
            be, and decides where a row could be read in two ways. None looks.

    Raises:
        InputError: if the file is missing, empty, damaged or of no known kind.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise InputError(f"{path}: format must be one of {', '.join(FORMATS)}, got {format!r}")
    rows = _open(path, format if format in CONTAINERS else container_of(path))
    if format in get_args(RowLayout):
        rows.layout = cast(RowLayout, format)
    return rows


def container_of(path: str | Path) -> str:
    """How a file or folder is built, one of CONTAINERS, by what it holds.

    Raises:
        InputError: if it cannot be read, is compressed as a whole, or is a folder of no or several kinds of rows.
    """
    path = Path(path)
    if path.is_dir():
        return _container_of_folder(path)
    head = _head(path)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise InputError(f"{path}: is compressed, which leaves no random access to its rows; unpack it first")
    if head.startswith(b"PAR1") or path.suffix == ".parquet":
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or path.suffix == ".arrow":
        return "arrow"
    if head[257:262] == b"ustar" or path.suffix == ".tar":
        return "webdataset"
    return "json" if is_json(head) else "jsonl"


def _head(path: Path) -> bytes:
    try:
        regular(path)
        with path.open("rb") as file:
            return file.read(4096)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def _container_of_folder(folder: Path) -> str:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise InputError(f"{folder}: holds the splits {', '.join(splits)}; name one of these folders")
    if (folder / "state.json").is_file():
        return "arrow"
    if (folder / "meta.json").is_file() and (folder / "dropped.jsonl").is_file():
        raise InputError(f"{folder}: `ivl data filter` wrote it, with the rows that it dropped; name {folder / 'meta.json'}")
    kinds = sorted({SUFFIXES[path.suffix] for path in _files(folder)} - {"json"})
    if len(kinds) != 1:
        raise InputError(f"{folder}: has {' and '.join(kinds) or 'no known kind of'} rows; name a file or folder of one kind")
    return kinds[0]


def _open(path: Path, container: str) -> Rows:
    if not path.is_dir():
        return _open_file(path, container)
    if container == "arrow" and (path / "state.json").is_file():
        from ivl.formats.table import saved_files

        files = saved_files(path)
    else:
        files = [file for file in _files(path) if SUFFIXES[file.suffix] == container]
    set_bytes = sum(file.stat().st_size for file in files if file.is_file())
    shards: list[Rows] = []
    for file in files:
        shards.append(_open_file(file, container, set_bytes))
        shards[-1].close()
    if not shards:
        raise InputError(f"{path}: has no file of {container} rows")
    if len(shards) == 1:
        return shards[0]
    rows = Shards(shards)
    rows.keep(GroupCache(KEPT_BYTES))
    return rows


def _files(folder: Path) -> list[Path]:
    """Files that may hold rows, at any depth, in order of their names; hidden ones are left alone."""
    found = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def row_files(path: str | Path) -> list[Path]:
    """Return the files that hold the rows of a file or folder."""
    return _files(Path(path)) if Path(path).is_dir() else [Path(path)]


def hash_rows(path: str | Path, container: str) -> str:
    """Hash the content of a file or folder of rows. Of tables and archives beyond MAX_HASHED bytes, which may hold all media of
    a data set, only evenly spread pieces are read.
    """
    try:
        return digest(row_files(path), None if container in ("json", "jsonl") else MAX_HASHED)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _open_file(path: Path, container: str, set_bytes: int | None = None) -> Rows:
    head = _head(path)
    if problem := not_itself(head):
        raise InputError(f"{path}: is {problem}")
    if container in ("json", "jsonl"):
        return TextRows(path, "json" if is_json(head) else "jsonl", set_bytes)
    if container in ("parquet", "arrow"):
        from ivl.formats.table import ArrowRows, ParquetRows

        return (ParquetRows if container == "parquet" else ArrowRows)(path)
    if container == "webdataset":
        from ivl.formats.tar import TarRows

        return TarRows(path, set_bytes)
    raise InputError(f"{path}: no rows are read from {container}")


def write_jsonl(rows: Iterable[dict[str, Any]], path: str | Path) -> Path:
    """Write rows as UTF-8 jsonl, one object per line; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
