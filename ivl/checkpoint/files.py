"""Files of a model directory that need no torch: JSON objects, the directory's fingerprint, its atomic replacement."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.utils.strict_json import read_json

MAX_JSON_BYTES = 64 << 20
"""Files are untrusted; parsing a larger one would take minutes."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        InputError: if the file is missing, larger than 64 MB or no JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; a model directory has one")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise InputError(f"{path}: {size} bytes of JSON, at most {MAX_JSON_BYTES} are read")
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def listing(names: Sequence[str], limit: int = 8) -> str:
    """Join names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def fingerprint(directory: Path) -> str:
    """Hash names, sizes and times of a model's files, which tells it from a retrained model in the same directory."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".safetensors", ".json", ".model", ".txt"):
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


@contextmanager
def new_directory(target: str | Path, *, force: bool = False, mark: str = "config.json") -> Iterator[Path]:
    """Yield a directory that becomes the target when the block ends well, and vanishes when it does not.

    Args:
        force: replace a target that is there.
        mark: the file that a directory must have to be replaced.

    Raises:
        InputError: if the target is there already and force is not given, or if it is no model directory.
    """
    target = Path(target).absolute()
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not force:
        raise InputError(f"{target}: exists; name another directory, or give --force to replace it")
    if occupied and not (target / mark).is_file():
        raise InputError(f"{target}: has no {mark}, so it is no model directory and will not be replaced")
    # Beside the target, so that a rename suffices; the process id keeps two runs apart.
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error}") from None
    try:
        yield part
        if target.exists():
            target.rename(old)
        part.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
