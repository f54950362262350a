"""Files that are written whole or not at all, and directories that belong to one process at a time."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivl.errors import InputError

_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def regular(path: str | Path) -> os.stat_result:
    """Check that a path names a regular file or a folder, links followed; returns its size and times.

    Call this before a user's path is opened: a pipe, a socket or a device may never end, and cannot be read twice.

    Raises:
        OSError: if it is not there; ValueError for a name with a null byte.
        InputError: for a pipe, a socket or a device.
    """
    result = Path(path).stat()
    if kind := _SPECIAL.get(stat.S_IFMT(result.st_mode)):
        raise InputError(f"{path}: is {kind}, not a regular file; write its content into a file and name that")
    return result


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, also after a crash, sees the old file or the new one, never a part."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory, which must exist, for this process.

    The lock is the operating system's, on the file `.lock`: it ends with the process, however that ends, and forked workers
    do not inherit it. Where the file system has no locks, nothing is held.

    Raises:
        InputError: if another process holds the directory, or nothing can be written there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        file = (directory / ".lock").open("ab")
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{directory}: another process is at work in this directory") from None
        except OSError:
            pass
        yield
