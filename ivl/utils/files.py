"""Files that are written whole or not at all, and directories that belong to one process at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Self

from ivl.errors import InputError

PIECE = 1 << 24
"""Bytes that one thread hashes at a time."""
_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def regular(path: str | Path) -> os.stat_result:
    """Check that a path names a regular file or a folder, links followed; returns its size and times.

    Call this before a user's path is opened: a pipe, a socket or a device may never end, and cannot be read twice.

    Raises:
        OSError: if it is not there; ValueError for a name with a null byte.
        InputError: for a pipe, a socket or a device, and for the few lines that git leaves in place of a large file.
    """
    result = Path(path).stat()
    if kind := _SPECIAL.get(stat.S_IFMT(result.st_mode)):
        raise InputError(f"{path}: is {kind}, not a regular file; write its content into a file and name that")
    if stat.S_ISREG(result.st_mode) and len(_LFS_POINTER) < result.st_size < 1024:
        with Path(path).open("rb") as file:
            if (head := file.read(len(_LFS_POINTER))) == _LFS_POINTER:
                raise InputError(f"{path}: is {not_itself(head)}")
    return result


def not_itself(head: bytes) -> str:
    """What a file is instead of itself, by its first bytes, and the remedy; empty unless it is one of these."""
    if head.startswith(_LFS_POINTER):
        return "a git-LFS pointer, not the file itself; run 'git lfs pull' where it was cloned"
    if re.match(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<(!doctype html|html|error>)", head, re.IGNORECASE):
        return "a web page, not the file itself; download it again"
    if head.startswith((b"PK\3\4", b"\x1f\x8b")):
        return "an archive, not the file itself; unpack it"
    if is_bare_base64(head[:100].decode("latin-1")):
        return "base64, not the file itself; decode it"
    return ""


def is_bare_base64(text: str) -> bool:
    """Whether a text is no path but the base64 of a PNG, JPEG, GIF or WebP, which people forget to put into a data: URL."""
    return re.match(r"\s*(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[\w+/=\s]{40}", text) is not None


def real(path: str | Path) -> Path:
    """Return a path without links, as Path.resolve does, which fails at links that lead to one another."""
    return Path(os.path.realpath(path))


def not_utf8(path: str | Path) -> bool:
    """Whether a name holds bytes that are not UTF-8, with which most libraries cannot open a file."""
    return any("\ud800" <= letter <= "\udfff" for letter in str(path))


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, also after a crash, sees the old file or the new one, never a part."""
    with new_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)
    sync(path.parent)


def new_file(place: Path) -> IO[bytes]:
    """Open the hidden file beside a place that will be renamed to it. What a killed process left there is written anew.

    Raises:
        OSError: if it cannot be made, or a link, a pipe or a folder has its name.
    """
    part = place.with_name(f".{place.name}.new")
    with suppress(FileNotFoundError):
        if stat.S_ISREG(part.lstat().st_mode):
            part.unlink()
    return part.open("xb", buffering=1 << 20)  # never through a link


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class NewFiles:
    """Files of one folder that replace older ones together, when all are complete; after an error none does."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._places = {name: folder / name for name in names}
        self._files: dict[str, IO[bytes]] = {}

    def write(self, name: str, data: bytes) -> None:
        """Write the next bytes of one of the files."""
        self._files[name].write(data)

    def copy(self, name: str, source: Path) -> None:
        """Write the content of another file next."""
        with source.open("rb") as file:
            shutil.copyfileobj(file, self._files[name], 1 << 20)

    def __enter__(self) -> Self:
        for name, place in self._places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = new_file(place)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            for name, file in self._files.items() if kind is None else ():
                Path(file.name).replace(self._places[name])
        finally:
            for file in self._files.values():
                with suppress(OSError):
                    file.close()
                Path(file.name).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def digest(paths: Iterable[Path], limit: int | None = None) -> str:
    """Hash the content of files in their order, in threads: about 0.7 GB a second and core.

    Args:
        paths: regular files; their names do not count.
        limit: most bytes that are read; of larger files only pieces that are spread evenly. None reads everything.

    Raises:
        OSError: if a file cannot be read.
    """
    pieces = [(path, at) for path in paths for at in range(0, max(1, path.stat().st_size), PIECE)]
    step = -(-len(pieces) * PIECE // limit) if limit else 1
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        parts = threads.map(_hash_piece, pieces[::step])
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _hash_piece(piece: tuple[Path, int]) -> bytes:
    path, at = piece
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        return hashlib.blake2b(file.read(PIECE), digest_size=16).digest()


def file_hash(path: str | Path, kind: str) -> str:
    """Return the hash of a file by an algorithm of hashlib, computed once as long as the file does not change."""
    status = regular(path)
    return _file_hash(str(path), kind, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(1 << 16)
def _file_hash(path: str, kind: str, *_: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def hold(descriptor: int) -> bool | None:
    """Lock an open file or directory; the lock ends when this process and its forked workers have closed it.

    Unlike the lock of `locked`, it does not end when another part of the process closes the same file.

    Returns:
        Whether it is held; False if another process holds it, None where the file system or the system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows has no fcntl
        return None
    return True


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory, which must exist, for this process.

    The lock is the operating system's, on the file `.lock`: it ends with the process, however that ends, and forked workers
    do not inherit it. Where the file system has no locks, nothing is held. The file is removed at the end.

    Raises:
        InputError: if another process holds the directory, or nothing can be written there.
    """
    path = directory / ".lock"
    try:
        file = _lock(path)
    except (BlockingIOError, PermissionError) as error:
        if error.filename is None:
            raise InputError(f"{directory}: another process is at work in this directory") from None
        raise InputError(f"{directory}: cannot be written ({error.strerror})") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}: cannot be written ({getattr(error, 'strerror', error)})") from None
    with file:
        try:
            yield
        finally:
            with suppress(OSError):
                if not os.fstat(file.fileno()).st_size:  # nobody else's file
                    path.unlink()


def _lock(path: Path) -> IO[bytes]:
    """Open a file and lock it.

    Raises:
        OSError: if it cannot be opened; BlockingIOError or PermissionError without a file name if another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return path.open("ab")
    # Neither through a link nor waiting for the reader of a pipe.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        file = os.fdopen(os.open(path, flags, 0o666), "ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise
        except OSError:  # the file system has no locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its last holder has removed it in between
