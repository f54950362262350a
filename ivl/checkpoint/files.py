"""Safetensors shards and JSON files, in and out. Files are untrusted: nothing is unpickled, no name leaves the directory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ivl.checkpoint.keymaps import IGNORED_SUFFIXES, Entry
from ivl.errors import InputError
from ivl.utils.files import write_atomic

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 64 << 20
MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
"""Of quantised weights."""
MAX_PIECES, MAX_READ = 1024, 1 << 30
"""Pieces and bytes read by one call; systems take 1,024 pieces and 2 GB at most."""
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: if the file is missing, larger than 64 MB or no JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes of JSON, at most {MAX_JSON_BYTES} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model directory has one") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file in one step: readers see the old one or the new one."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class Source(Protocol):
    """Where tensors come from: a directory (Weights) or a GGUF file."""

    @property
    def directory(self) -> Path: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def get(self, name: str) -> torch.Tensor: ...

    def fill(self, pairs: Iterable[tuple[str, torch.Tensor]], meanwhile: Callable[[], object] = bool) -> None: ...


class Weights:
    """The tensors of a directory: names, shapes and dtypes at once, data mapped from the file when asked for.

    One shard is open at a time, so that reading everything holds at most one shard in memory.

    Args:
        directory: holds `model.safetensors`, or shards and their index.
        rename: from the names in the files to the names used here.
        integers: tensors may be of integers, as those of quantised weights are.

    Raises:
        InputError: if there are no safetensors, a shard is missing, damaged or outside the directory, or the index and the
            shards disagree.
    """

    def __init__(self, directory: Path, rename: Callable[[str], str] = str, *, integers: bool = False) -> None:
        self.directory = directory
        self._integers = integers
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._open: tuple[Path, Any] | None = None
        self._starts: dict[Path, dict[str, int]] = {}
        index = directory / INDEX
        listed = _read_index(index) if index.exists() else None
        for file_name in [WEIGHTS] if listed is None else sorted(set(listed.values())):
            self._read_header(directory / file_name, rename)
        if listed is not None:
            found = {stored: path.name for path, stored in self._places.values()}
            wrong = sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))
            if wrong:
                raise InputError(f"{index}: does not agree with the shards about {listing(wrong)}")

    def _read_header(self, path: Path, rename: Callable[[str], str]) -> None:
        if not path.is_file():
            raise InputError(f"{path}: no such weights file{_pickle_hint(self.directory)}")
        handle = self._handle(path)
        for stored in handle.keys():  # noqa: SIM118 (a handle is no dict)
            name = rename(stored)
            if name in self._places:
                raise InputError(f"{path}: tensor {stored!r} is there twice, also in {self._places[name][0].name}")
            header = handle.get_slice(stored)
            known = DTYPES | INTEGERS if self._integers else DTYPES
            if header.get_dtype() not in known:
                raise InputError(f"{path}: tensor {stored!r} is {header.get_dtype()}; expected one of {', '.join(known)}")
            self._places[name] = (path, stored)
            self.shapes[name] = tuple(header.get_shape())
            self.dtypes[name] = known[header.get_dtype()]

    def _handle(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = None
            try:
                self._open = (path, safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: not a readable safetensors file: {error}; fetch it again") from None
        return self._open[1]

    def get(self, name: str) -> torch.Tensor:
        """The tensor, mapped from its file: copy it before the file changes."""
        path, stored = self._places[name]
        return self._handle(path).get_tensor(stored)

    def fill(self, pairs: Iterable[tuple[str, torch.Tensor]], meanwhile: Callable[[], object] = bool) -> None:
        """Copy tensors into memory that is there. What needs no conversion is read straight from the files by several
        threads, without Python's lock: nothing is mapped on the way, and `meanwhile` is done beside it.

        Raises:
            InputError: if a file cannot be read to its end.
        """
        spans: dict[Path, list[tuple[int, memoryview]]] = {}
        others: list[tuple[str, torch.Tensor]] = []
        for name, ours in pairs:
            path, stored = self._places[name]
            plain = ours.device.type == "cpu" and ours.is_contiguous() and ours.dtype == self.dtypes[name]
            if plain and sys.byteorder == "little" and hasattr(os, "preadv"):
                memory = ours.detach().view(-1).view(torch.uint8).numpy().data
                spans.setdefault(path, []).append((self._offsets(path)[stored], memory))
            else:
                others.append((name, ours))
        threads = min(4, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            parts = [(path, part) for path, wanted in spans.items() for part in _shared_out(wanted, threads)]
            reading = [pool.submit(_read_part, path, part) for path, part in parts]
            time.sleep(0.001)  # they are in the system's hands before Python's lock may be taken for long
            meanwhile()
            for name, ours in others:
                ours.copy_(self.get(name))
            for (path, _), done in zip(parts, reading, strict=True):
                try:
                    done.result()
                except OSError as error:
                    raise InputError(f"{path}: cannot be read: {error}; fetch it again") from None

    def _offsets(self, path: Path) -> dict[str, int]:
        """Where the data of every tensor begin; safetensors has checked the header."""
        if path not in self._starts:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            self._starts[path] = {name: 8 + size + at["data_offsets"][0] for name, at in header.items() if "dtype" in at}
        return self._starts[path]

    def alias(self, name: str, source: str) -> None:
        """Let a tensor be read under one more name."""
        for table in (self.shapes, self.dtypes, self._places):
            table[name] = table[source]  # type: ignore[index]

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most elements that are no integers."""
        counts = {dtype: 0 for dtype in self.dtypes.values() if dtype.is_floating_point}
        if not counts:
            raise InputError(f"{self.directory}: has no tensor of {', '.join(DTYPES)}")
        for name, shape in self.shapes.items():
            if self.dtypes[name] in counts:
                counts[self.dtypes[name]] += math.prod(shape)
        return max(counts, key=lambda dtype: counts[dtype])


def _shared_out(spans: list[tuple[int, memoryview]], count: int) -> list[list[tuple[int, memoryview]]]:
    """Pieces of a file, (offset, memory), in order of offset and in parts of equal size."""
    share = max(1, -(-sum(len(memory) for _, memory in spans) // count))
    parts: list[list[tuple[int, memoryview]]] = [[] for _ in range(count)]
    done = 0
    for offset, memory in sorted(spans, key=lambda span: span[0]):
        while memory:
            part = done // share
            piece = memory[: min(share * (part + 1) - done, MAX_READ)]
            parts[part].append((offset, piece))
            offset, memory, done = offset + len(piece), memory[len(piece) :], done + len(piece)
    return [part for part in parts if part]


def _read_part(path: Path, spans: list[tuple[int, memoryview]]) -> None:
    """Read pieces of a file; those that lie in a row are read by one call."""
    with path.open("rb", buffering=0) as file:
        at = 0
        while at < len(spans):
            (start, first), run = spans[at], [spans[at][1]]
            length, at = len(first), at + 1
            while at < len(spans) and len(run) < MAX_PIECES and spans[at][0] == start + length:
                if length + len(spans[at][1]) > MAX_READ:
                    break
                run.append(spans[at][1])
                length, at = length + len(spans[at][1]), at + 1
            _read_run(file.fileno(), start, run)


def _read_run(file: int, start: int, run: list[memoryview]) -> None:
    while run:
        count = os.preadv(file, run, start)
        if not count:
            raise OSError("the file ends too early")
        start += count
        while run and count >= len(run[0]):
            count -= len(run.pop(0))
        if run:
            run[0] = run[0][count:]


def listing(names: Sequence[str], limit: int = 8) -> str:
    """Names for a message: the first few and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_entries(entries: Sequence[Entry], shapes: Mapping[str, Sequence[int]], weights: Source) -> None:
    """Compare what a model needs with what a checkpoint has, before anything is allocated.

    Args:
        shapes: shape of each of our parameters that the entries name.

    Raises:
        InputError: listing every kind of disagreement: missing, unexpected and misshapen tensors.
    """
    needed = {
        name: shape for entry in entries for name, shape in zip(entry.theirs, entry.shapes(shapes[entry.ours]), strict=True)
    }
    missing = [name for name in needed if name not in weights.shapes]
    unexpected = [name for name in weights.shapes if name not in needed and not name.endswith(IGNORED_SUFFIXES)]
    misshapen = [
        f"{name} {list(weights.shapes[name])} instead of {list(shape)}"
        for name, shape in needed.items()
        if name in weights.shapes and weights.shapes[name] != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{len(names)} {kind}: {listing(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise InputError(f"{weights.directory}: weights do not fit config.json; " + "; ".join(problems))


def write_shards(
    directory: Path,
    entries: Sequence[Entry],
    like: Mapping[str, torch.Tensor],
    get: Callable[[Entry], torch.Tensor],
    *,
    dtype: torch.dtype,
    extra: Mapping[str, torch.Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write entries as `model.safetensors`, or as shards and their index; older weights in the directory are removed.

    Args:
        like: a tensor of the shape and kind of each of our parameters, on any device.
        get: our parameter for an entry, asked for shard by shard; at most one shard is held.
        dtype: of the written tensors; integers stay as they are.
        extra: a few small tensors to write as well, by their names in the file.

    Raises:
        InputError: if a file cannot be written (disk full, no permission).
    """
    kinds = [dtype if like[entry.ours].is_floating_point() else like[entry.ours].dtype for entry in entries]
    sizes = [like[entry.ours].numel() * kind.itemsize for entry, kind in zip(entries, kinds, strict=True)]
    shards: list[list[Entry]] = [[]]
    room = max_shard_bytes
    for entry, size in zip(entries, sizes, strict=True):
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= size
    count = len(shards)
    file_names = [WEIGHTS] if count == 1 else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    weight_map: dict[str, str] = {}
    done = 0
    for file_name, shard in zip(file_names, shards, strict=True):
        tensors: dict[str, torch.Tensor] = dict(extra or {}) if file_name == file_names[-1] else {}
        weight_map |= dict.fromkeys(tensors, file_name)
        for entry in shard:
            for name, tensor in zip(entry.theirs, entry.split(get(entry)), strict=True):
                # A copy of its own: parts of a fused weight share storage, which safetensors refuses.
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                tensors[name] = torch.empty(tensor.shape, dtype=kind).copy_(tensor.detach())
                weight_map[name] = file_name
                done += tensors[name].nbytes
            if progress:
                progress(done, sum(sizes))
        part = directory / f"{file_name}.part"
        try:
            part.touch()
            mode = part.stat().st_mode
            save_file(tensors, part, metadata={"format": "pt"})
            part.chmod(mode)  # safetensors writes files that only their owner can read
            part.replace(directory / file_name)
        except (SafetensorError, OSError) as error:
            part.unlink(missing_ok=True)
            raise InputError(f"{directory / file_name}: cannot be written: {error}") from error
        del tensors
    if count > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
    for old in [directory / INDEX, *directory.glob("model*.safetensors")]:
        if old.name not in file_names and not (old.name == INDEX and count > 1):
            old.unlink(missing_ok=True)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard file name; a shard must be a plain file name beside the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: has no weight_map")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", file_name):
            raise InputError(f"{path}: shard {file_name!r} of {name!r} is no plain .safetensors file name; refused")
    return weight_map


def _pickle_hint(directory: Path) -> str:
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLES)
    if not pickles:
        return "; a model directory has model.safetensors, or shards with an index"
    return f"; {listing(pickles, 3)} may run code when opened and is never read: convert it to safetensors where you trust it"


def fingerprint(directory: Path) -> str:
    """Tells a model from its retrained successor in the same directory: names, sizes and times of its files."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".safetensors", ".json", ".model", ".txt"):
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
