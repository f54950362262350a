"""A model directory as a whole: its fingerprint, and its replacement, which keeps what ivl did not write."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ivl.checkpoint.config_json import dialect_of
from ivl.checkpoint.shards import FOLDER
from ivl.errors import InputError, short
from ivl.utils.files import hold, real

_OWN = re.compile(
    r"(config|generation_config|model\.safetensors\.index|tokenizer|tokenizer_config|special_tokens_map|preprocessor_config"
    r"|video_preprocessor_config|processor_config|quantization)\.json|chat_template\.jinja|(model|mmproj)\.gguf|tokenizer\.model"
    r"|model(-\d{5}-of-\d{5})?\.safetensors"
)
"""Names of the files that ivl writes into a model directory."""


def listing(names: Sequence[str], limit: int = 8) -> str:
    """Join names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def fingerprint(directory: Path) -> str:
    """Hash names, sizes and times of a model's files, which tells it from a retrained model in the same directory."""
    digest = hashlib.sha256()
    for path in sorted((*directory.iterdir(), *(directory / FOLDER).glob("*"))):
        if path.suffix in (".safetensors", ".json", ".model", ".txt") and path.is_file():
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


@contextmanager
def new_directory(target: str | Path, *, force: bool = False, sources: Sequence[str | Path] = ()) -> Iterator[Path]:
    """Yield a directory that becomes the target when the block ends well, and vanishes when it does not.

    A model directory that is there is exchanged for the new one at once, so that a kill leaves the old or the new one. A
    killed process may leave the hidden part behind, which the next one for the same target clears.

    Args:
        force: replace a target that is a model directory and holds only files that ivl writes.
        sources: directories that are read meanwhile; the target must not lie inside one.

    Raises:
        InputError: before anything changes, if the target exists and is not to be replaced, is being written by another
            process, or cannot be written. Errors of the block that the system raised become one, too.
    """
    new_parents: list[Path] = []
    try:
        target = Path(os.path.abspath(target))  # noqa: PTH100 (links stay)
        str(target).encode()
        replaced = _check_target(target, force, sources)
        part = target.with_name(f".{target.name}.ivl-part")
        new_parents = [parent for parent in target.parents if not parent.exists()]
        part.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            for directory in (part, target) if replaced else (part,):
                held.enter_context(_held(directory, target))
            _clear(part)
            try:
                yield part
                if replaced:
                    _check_target(target, force, sources)
                    _exchange(part, target)
                else:
                    part.rename(target)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
            new_parents = []
            if replaced:
                _clear(part)
                part.rmdir()
    except UnicodeEncodeError:
        raise InputError(f"{str(target)!r}: this name is not UTF-8, which weights files need; name another directory") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{short(str(target), 300)}: cannot be written: {error}") from None
    finally:
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()


def _check_target(target: Path, force: bool, sources: Sequence[str | Path]) -> bool:
    """Return whether a model directory is there, which will be replaced."""
    for source in map(Path, sources):
        if source.is_dir() and real(source) in real(target).parents:
            raise InputError(f"{target}: lies inside {source}, which is read; name another directory")
    if target.is_symlink():
        raise InputError(f"{target}: is a symbolic link; name the directory itself")
    if not target.exists():
        return False
    if not target.is_dir():
        raise InputError(f"{target}: is a file; name another directory")
    if not (names := sorted(path.name for path in target.iterdir())):
        return False
    if not force:
        raise InputError(f"{target}: exists; name another directory, or give --force to replace it")
    if "config.json" in names:
        dialect_of(target)
    if "model.gguf" not in names and not ("config.json" in names and any(name.endswith(".safetensors") for name in names)):
        raise InputError(f"{target}: has no config.json with weights, so it is no model directory and will not be replaced")
    foreign = [name for name in names if not _OWN.fullmatch(name) or not stat.S_ISREG((target / name).lstat().st_mode)]
    if foreign:
        raise InputError(f"{target}: holds {listing(foreign)}, which ivl did not write; move that, or name another directory")
    return True


@contextmanager
def _held(directory: Path, target: Path) -> Iterator[None]:
    """Hold a directory for this process, without a file in it; the lock ends with the process."""
    if os.name != "posix":  # a directory cannot be opened
        yield
        return
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if hold(handle) is False:
            raise InputError(f"{target}: another process is writing this directory")
        if not os.path.samestat(os.fstat(handle), directory.stat()):
            raise InputError(f"{target}: another process has written this directory meanwhile")
        yield
    finally:
        os.close(handle)


def _clear(part: Path) -> None:
    """Remove the files of ours from a part; others are an error."""
    for path in part.iterdir():
        own = _OWN.fullmatch(re.sub(r"^\.(.*)\.new$|(.*)\.part$", r"\1\2", path.name))
        if not own and not re.fullmatch(r"\.tmp\w{6}", path.name):  # safetensors'
            raise InputError(f"{part}: holds {path.name}, which ivl did not write; move that away")
        path.unlink()


def _exchange(new: Path, old: Path) -> None:
    """Let two directories change names, at once where the system can."""
    with suppress(AttributeError):
        swap = ctypes.CDLL(None).renameat2
        if swap(-100, os.fsencode(new), -100, os.fsencode(old), 2) == 0:  # AT_FDCWD, RENAME_EXCHANGE
            return
    aside = new.with_name(f"{new.name}-old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)
