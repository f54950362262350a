"""The folder of a filter run: outputs that only grow, and how much of them is certain."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ivl.errors import InputError
from ivl.utils.files import sync, write_atomic

SYNC_SECONDS = 2.0
LOCK_SECONDS = 3.0
"""The worker processes of a run that was killed hold its lock for a second more."""
_ENTRY = struct.Struct("<II")


class Folder:
    """The outputs of a run. identity: what a run must share with the one it continues; fresh: remove an earlier run first,
    whatever it was.

    Raises:
        InputError: on entry, if another run is at work here, left other settings or data, or the files are not of a run.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, fresh: bool = False) -> None:
        self.path, self.identity, self.fresh = path, identity, fresh
        self.position = 0
        self.complete = False
        self._lengths: dict[str, int] = {}
        self._open: dict[str, IO[bytes]] = {}
        self._synced = time.monotonic()
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Folder:
        try:
            (self.path / "kept").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be made ({error.strerror})") from None
        self._take_lock()
        state = self.path / "progress.json"
        if self.fresh and state.is_file():
            self._clear()
        if state.is_file():
            self._continue(json.loads(state.read_text("utf-8")))
        elif (self.path / "meta.json").exists() or any((self.path / "kept").iterdir()):
            raise InputError(f"{self.path}: holds files that are not of a filter run; choose another folder")
        else:
            self.sync()
        return self

    def __exit__(self, *error: object) -> None:
        for file in (*self._open.values(), self._lock):
            if file is not None:
                file.close()

    def _clear(self) -> None:
        names = ("meta.json", "report.json", "report.html", "dropped.jsonl", "verdicts.jsonl", "progress.json")
        for path in [*self.path.glob("kept/*.jsonl"), *self.path.glob("signatures-*.bin"), *(self.path / n for n in names)]:
            path.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: two runs in one folder are not noticed
            return
        self._lock = (self.path / ".lock").open("wb")
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > end:
                    raise InputError(f"{self.path}: another run is at work in this folder") from None
                time.sleep(0.1)

    def _continue(self, state: dict[str, Any]) -> None:
        for part, now in self.identity.items():
            if state["identity"][part] != now:
                raise InputError(
                    f"{self.path}: holds a run with another {part} ({_short(state['identity'][part])}, now {_short(now)}); "
                    "choose another folder, or give --fresh to start again"
                )
        self.position, self.complete, self._lengths = state["position"], state["complete"], state["files"]
        if self.complete:
            return
        for path in [*self.path.glob("*.jsonl"), *self.path.glob("*.bin"), *self.path.glob("kept/*.jsonl")]:
            length = self._lengths.get(path.relative_to(self.path).as_posix(), 0)
            if path.stat().st_size < length:
                raise InputError(f"{path}: is shorter than the run left it; give --fresh to start again")
            os.truncate(path, length)

    def append(self, name: str, data: bytes) -> None:
        if name not in self._open:
            self._open[name] = (self.path / name).open("ab", buffering=1 << 20)
        self._open[name].write(data)
        self._lengths[name] = self._lengths.get(name, 0) + len(data)

    def log(self, name: str, key: str, signature: bytes) -> None:
        text = key.encode("utf-8", "surrogateescape")
        self.append(name, _ENTRY.pack(len(text), len(signature)) + text + signature)

    def entries(self, name: str) -> Iterator[tuple[str, bytes]]:
        """What was logged, in order."""
        if not self._lengths.get(name):
            return
        with (self.path / name).open("rb") as file:
            while head := file.read(_ENTRY.size):
                key_size, size = _ENTRY.unpack(head)
                yield file.read(key_size).decode("utf-8", "surrogateescape"), file.read(size)

    def sync_sometimes(self) -> None:
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """All rows before `position` are certain after this."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if self._open:
            sync(self.path / "kept")
            sync(self.path)
        self._open.clear()
        self._save()
        self._synced = time.monotonic()

    def _save(self) -> None:
        state = {"identity": self.identity, "position": self.position, "complete": self.complete, "files": self._lengths}
        write_atomic(self.path / "progress.json", json.dumps(state))

    def finish(self) -> None:
        self.complete = True
        self._save()
        for path in self.path.glob("signatures-*.bin"):
            path.unlink()


def _short(value: Any, limit: int = 120) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
