"""Rows of one format into another, through Record."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from ivl.data.records import to_record
from ivl.data.rows import from_record
from ivl.errors import DataError, InputError
from ivl.formats.rows import Rows, open_rows
from ivl.formats.writers import ParquetRowWriter, TarWriter, TextWriter, Writer, WrittenLayout
from ivl.types import Record

Target = WrittenLayout | Literal["parquet", "webdataset"]
SUFFIXES: dict[str, tuple[str, ...]] = {"parquet": (".parquet",), "webdataset": (".tar",)}
"""How the file of a target must be called, so that it is taken for what it is; .jsonl or .json for the others."""
CARRIED = (
    "id", "conversations", "messages", "texts", "image", "images", "video", "videos", "clip", "system",
    "audio", "audios", "tools", "objects",
)  # fmt: skip
"""Keys that a Record holds, or whose content is refused."""


@dataclass(kw_only=True)
class Converted:
    """What became of the rows."""

    format: str
    """What the source was taken for."""
    rows: int = 0
    """Rows written."""
    bad: dict[str, int] = field(default_factory=dict)
    """Rows left out, by kind."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that had a value under a key which a Record does not hold, such as width: it is not carried over."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Target | None = None,
    format: str | None = None,
    root: str | None = None,
    on_error: Literal["refuse", "skip"] = "refuse",
    overwrite: bool = False,
    on_bad: Callable[[DataError], None] = lambda error: None,
    on_progress: Callable[[int, int], None] = lambda done, rows: None,
) -> Converted:
    """Write the rows of `source` to the file `target`, which appears whole or not at all.

    Args:
        to: what to write; None takes parquet for .parquet, webdataset for .tar, else reference.
        format: how `source` is read; None looks.
        root: where relative media paths of `source` start; None is its folder.
        on_bad: told of each row that is left out. on_progress: told rows done and all rows.

    Raises:
        InputError: for a target that exists, or whose suffix is not its format's.
        DataError: of the first row that is bad, or that the target cannot hold, unless on_error is skip.
    """
    source, target = Path(source), Path(target)
    to = _target(target, to)
    if target.exists() and (not overwrite or target.is_dir() or target.samefile(source)):
        raise InputError(f"{target}: exists; choose another name{'' if target.is_dir() else ', or overwrite it'}")
    rows = open_rows(source, format=format)
    base = Path(root) if root is not None else source if source.is_dir() else source.parent
    result = Converted(format=rows.format)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        writer = _writer(partial, target, to)
        try:
            for index in range(len(rows)):
                try:
                    record = _read(rows, index, base, result)
                    writer.write(from_record(record, layout=writer.layout, medium=writer.medium), record.source)
                    result.rows += 1
                except DataError as error:
                    if on_error == "refuse":
                        raise
                    result.bad[error.kind] = result.bad.get(error.kind, 0) + 1
                    on_bad(error)
                on_progress(index + 1, len(rows))
        finally:
            writer.close()
        if not result.rows:
            raise InputError(f"{source}: none of its {len(rows):,} rows could be converted")
        partial.replace(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return result


def _target(path: Path, to: Target | None) -> Target:
    if to is None:
        guessed = next((name for name, suffixes in SUFFIXES.items() if path.suffix in suffixes), "reference")
        return _target(path, cast(Target, guessed))
    known = (*get_args(WrittenLayout), *SUFFIXES)
    if to not in known:
        raise InputError(f"{path}: the target must be one of {', '.join(known)}, got {to!r}")
    suffixes = SUFFIXES.get(to, (".jsonl", ".json"))
    if path.suffix not in suffixes:
        raise InputError(f"{path}: a file of {to} rows must end in {' or '.join(suffixes)}")
    return to


def _writer(partial: Path, target: Path, to: Target) -> Writer:
    match to:
        case "parquet":
            return ParquetRowWriter(partial)
        case "webdataset":
            return TarWriter(partial)
        case _:
            return TextWriter(partial, target, to)


def _read(rows: Rows, index: int, root: Path, result: Converted) -> Record:
    source, row = rows.source(index), rows[index]
    record = to_record(row, source=source, root=root, layout=rows.layout)
    for key, value in row.items():
        if key not in CARRIED and value is not None:
            result.dropped[key] = result.dropped.get(key, 0) + 1
    return record
