"""Rewrite rows of one format in another, through Record."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ivl.data.records import to_record
from ivl.datasets.rows import from_record
from ivl.errors import DataError, InputError
from ivl.formats.base import Rows
from ivl.formats.rows import RowFormat, open_rows, row_files
from ivl.formats.writers import ParquetRowWriter, TarWriter, TextWriter, Writer, WrittenLayout
from ivl.utils.files import hold, not_utf8

ConvertTarget = WrittenLayout | Literal["parquet", "webdataset"]
TARGETS: tuple[ConvertTarget, ...] = (*get_args(WrittenLayout), "parquet", "webdataset")
CARRIED = (
    "id", "conversations", "messages", "texts", "image", "images", "video", "videos", "clip", "system",
    "audio", "audios", "tools", "objects", "instruction", "input", "output", "query", "response", "history",
    "chosen", "rejected", "rejected_response", "rejected_messages", "question", "prompt",
)  # fmt: skip
"""Keys that a Record holds, or whose content is refused."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Rows to rewrite in another format. parquet and webdataset take the images in; the others name files."""

    source: Path
    """A file or folder of rows."""
    target: Path
    """The file to write: .jsonl, .json (an array), .parquet or .tar. Images that the source holds as bytes go to a folder
    beside it, its name with _media."""
    to: ConvertTarget | None = None
    """Format to write; by default parquet for .parquet, webdataset for .tar, else reference."""
    format: RowFormat | None = None
    """Format of the source; by default it is found out."""
    root: str | None = None
    """Folder of the source's relative media paths; by default its own folder."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """refuse stops at a bad row; skip leaves it out, reports it and counts it."""
    overwrite: bool = False
    """Replace the target if it exists."""


@dataclass(kw_only=True)
class ConvertReport:
    """Counts of the rows."""

    format: str
    """Format of the source, in words."""
    rows: int = 0
    """Rows written."""
    bad: dict[str, int] = field(default_factory=dict)
    """Rows left out, by kind."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that had a value under a key which a Record does not hold, such as width: it is not carried over."""


def convert(
    config: ConvertConfig,
    *,
    on_bad: Callable[[DataError], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> ConvertReport:
    """Write the rows of the source to the target, which appears whole or not at all.

    Args:
        on_bad: called with the error of each row that is left out.
        on_progress: called with rows done and all rows.

    Raises:
        InputError: for a target that exists, unless it is another regular file and may be overwritten; for one whose suffix is
            not its format's.
        DataError: of the first row that is bad, or that the target cannot hold, unless on_error is skip.
    """
    source, target = config.source, config.target
    to = _checked_target(target, config.to)
    _check_replaceable(config)
    rows = open_rows(source, format=config.format)
    report = ConvertReport(format=rows.format)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _new_part(target) as part:
            with closing(_open_writer(part, target, to)) as writer:
                for index in range(len(rows)):
                    try:
                        _convert_row(rows, index, writer, config, report)
                    except DataError as error:
                        if config.on_error == "refuse":
                            raise
                        report.bad[error.kind] = report.bad.get(error.kind, 0) + 1
                        on_bad(error)
                    on_progress(index + 1, len(rows))
            if not report.rows:
                raise InputError(f"{source}: none of its {len(rows):,} rows could be converted")
            _check_replaceable(config)
            _put_in_place(part, config)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error})") from error
    return report


def _check_replaceable(config: ConvertConfig) -> None:
    """Refuse a target that is there, unless it is a regular file that holds no rows of the source and may be overwritten."""
    target = config.target
    try:
        if not os.path.lexists(target):
            return
        if target.is_symlink() or not target.is_file():
            kind = "a link" if target.is_symlink() else "a folder" if target.is_dir() else "no regular file"
            raise InputError(f"{target}: exists and is {kind}; choose another name")
        if not config.overwrite:
            raise InputError(f"{target}: exists; choose another name, or overwrite it")
        if any(file.exists() and target.samefile(file) for file in row_files(config.source)):
            raise InputError(f"{target}: exists; choose another name, for it holds rows of the source {config.source}")
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror})") from None


@contextmanager
def _new_part(target: Path) -> Iterator[Path]:
    """Yield a new hidden file beside the target, locked for this process, and remove it in the end.

    Parts that killed processes left, on which there is no lock, are removed as well.
    """
    with suppress(OSError):  # a folder that cannot be listed
        for left in filter(Path.is_file, target.parent.iterdir()):
            if re.fullmatch(rf"[.]{re.escape(target.name)}[.]\d+[.][0-9a-f]{{8}}", left.name) and not left.is_symlink():
                with suppress(OSError), left.open("r+b") as file:
                    if hold(file.fileno()):
                        left.unlink()
    part = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with part.open("xb") as held:
        try:
            hold(held.fileno())
            yield part
        finally:
            part.unlink(missing_ok=True)


def _put_in_place(part: Path, config: ConvertConfig) -> None:
    """Give the part its name; a file that came to be there in between is replaced only if it may be overwritten."""
    if config.overwrite:
        part.replace(config.target)
        return
    try:
        os.link(part, config.target)
    except FileExistsError:
        _check_replaceable(config)
        raise
    except OSError:  # a file system without hard links
        part.replace(config.target)


def _checked_target(path: Path, to: ConvertTarget | None) -> ConvertTarget:
    if to is None:
        to = "parquet" if path.suffix == ".parquet" else "webdataset" if path.suffix == ".tar" else "reference"
    if to not in TARGETS:
        raise InputError(f"{path}: the target must be one of {', '.join(TARGETS)}, got {to!r}")
    # With such a suffix the file is recognized when it is read.
    if to == "parquet" and not_utf8(path):
        raise InputError(f"{str(path)!r}: this name is not UTF-8, which pyarrow needs; choose another one")
    suffixes = {"parquet": (".parquet",), "webdataset": (".tar",)}.get(to, (".jsonl", ".json"))
    if path.suffix not in suffixes:
        raise InputError(f"{path}: a file of {to} rows must end in {' or '.join(suffixes)}")
    return to


def _open_writer(partial: Path, target: Path, to: ConvertTarget) -> Writer:
    match to:
        case "parquet":
            return ParquetRowWriter(partial)
        case "webdataset":
            return TarWriter(partial)
        case _:
            return TextWriter(partial, target, to)


def _convert_row(rows: Rows, index: int, writer: Writer, config: ConvertConfig, report: ConvertReport) -> None:
    root = Path(config.root) if config.root is not None else config.source if config.source.is_dir() else config.source.parent
    source, row = rows.source(index), rows[index]
    record = to_record(row, source=source, root=root, layout=rows.layout)
    for key, value in row.items():
        if key not in CARRIED and value is not None:
            report.dropped[key] = report.dropped.get(key, 0) + 1
    writer.write(from_record(record, layout=writer.layout, medium=writer.medium), source)
    report.rows += 1
