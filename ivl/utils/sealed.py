"""Directories that are written whole, and whose files say later whether a disk or a person has changed them."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivl.errors import InputError, short
from ivl.utils.files import digest, regular, sync, write_json
from ivl.utils.strict_json import read_json


def seal(directory: Path, marker: str, hashed: Mapping[str, list[Any]] | None = None) -> None:
    """Flush every file of a directory to disk, and write a marker with the size and hash of each.

    Args:
        directory: a directory whose files are complete.
        marker: the marker's name.
        hashed: size and hash of files that need not be read again, by their names.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in (*files, *(path for path in directory.rglob("*") if path.is_dir())):
        sync(path)
    names = {path.relative_to(directory).as_posix(): path for path in files}
    known = hashed or {}
    write_json(directory / marker, {name: known.get(name) or size_and_hash(path) for name, path in names.items()})


def size_and_hash(path: Path) -> list[Any]:
    """Return what a marker says of a file."""
    return [path.stat().st_size, digest([path])]


def check_sealed(directory: Path, marker: str, *, content: bool = True) -> set[str]:
    """Compare a directory with its marker, and return the names of the files that were written, the marker included.

    Args:
        directory: a directory that `seal` has marked; further files may lie in it.
        marker: the marker's name. Markers of older versions have a file's size instead of size and hash.
        content: compare hashes, which reads every file.

    Raises:
        InputError: naming the first file that is not as it was written.
    """
    written = read_json(directory / marker)
    if not isinstance(written, dict) or not written:
        raise InputError(f"{directory / marker}: lists no files")
    for name, value in written.items():
        path = directory / name
        size, known = value if isinstance(value, list) and len(value) == 2 else (value, None)
        try:
            found = regular(path).st_size
            as_written = not content or known is None or found != size or digest([path]) == known
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
        if found != size:
            raise InputError(f"{path}: has {found} bytes, but {short(size)} were written")
        if not as_written:
            raise InputError(f"{path}: its content is not what was written")
    return {marker, *written}


def put_in_place(new: Path, place: Path) -> None:
    """Rename a directory to its place. What is there already is renamed to PLACE.old and named on stderr, never deleted."""
    if os.path.lexists(place):
        numbers = (f"-{number}" if number > 1 else "" for number in itertools.count(1))
        old = next(path for n in numbers if not os.path.lexists(path := place.with_name(f"{place.name}.old{n}")))
        place.rename(old)
        print(f"{place} was there already and is now {old}", file=sys.stderr)
    new.rename(place)
    sync(place.parent)
