"""Weights of a model directory: safetensors shards, read through a memory map and written shard by shard.

Files are untrusted: nothing is unpickled, no name leaves the directory.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ivl.checkpoint.files import listing
from ivl.checkpoint.keymaps import IGNORED, TensorEntry, foreign_names
from ivl.checkpoint.sections import open_section
from ivl.checkpoint.tensor_file import DTYPES, TensorFile
from ivl.errors import InputError, short
from ivl.utils.files import not_itself, regular, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_SHARD_BYTES = 5_000_000_000
MAX_HEADER_BYTES = 16 << 20
"""A header that names every tensor of the largest model takes 4 MB; parsing takes many times its size."""
INTEGERS = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
"""Types of quantized weights."""
OnMegabytes = Callable[[int, int], None]
"""Called with megabytes done and megabytes in all."""


class TensorSource(Protocol):
    """Tensors by the names of their files: those of a directory (StoredWeights) or of a GGUF file."""

    @property
    def directory(self) -> Path: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def main_dtype(self) -> torch.dtype: ...

    def get(self, name: str) -> torch.Tensor: ...

    def place(self, name: str) -> str:
        """Return the file of a tensor and its name in there, for messages."""
        ...


class RowSource(TensorSource, Protocol):
    """Tensors of which rows [first, last) can be read without the others."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    def rows(self, name: str, first: int, last: int) -> torch.Tensor: ...


class StoredWeights:
    """The tensors of a directory: names, shapes and dtypes at once, data mapped from the file when asked for.

    One shard stays open at a time, so that reading everything holds at most one shard in memory.

    Args:
        directory: holds `model.safetensors`, or shards and their index.
        rename: from the names in the files to the names used here.
        integers: accept tensors of integers, as quantized weights are.
        files: other files to read instead.

    Raises:
        InputError: if there are no safetensors, a shard is missing, damaged or outside the directory, or the index and the
            shards disagree.
    """

    def __init__(
        self, directory: Path, rename: Callable[[str], str] = str, *, integers: bool = False, files: Sequence[str] = ()
    ) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._known = DTYPES | INTEGERS if integers else DTYPES
        self._places: dict[str, tuple[Path, str]] = {}
        self._low_rank: dict[str, tuple[str, str, float]] = {}
        self._mapped, self._file = lru_cache(1)(_mapped), lru_cache(1)(TensorFile)
        index = directory / INDEX
        listed = _read_index(index) if index.exists() and not files else None
        for file_name in files or (_shards(directory) if listed is None else sorted(set(listed.values()))):
            self._read_header(directory / file_name, rename)
        if listed is not None:
            stored = {name: path.name for path, name in self._places.values()}
            wrong = sorted(name for name in listed.keys() | stored.keys() if listed.get(name) != stored.get(name))
            if wrong:
                raise InputError(f"{index}: does not agree with the shards about {listing(wrong)}")

    def _read_header(self, path: Path, rename: Callable[[str], str]) -> None:
        if not path.exists():
            pickles = sorted(other.name for other in self.directory.glob("*") if other.suffix in PICKLES)
            danger = "may run code when opened and is never read: convert it to safetensors where you trust it"
            hint = f"{listing(pickles, 3)} {danger}" if pickles else f"a directory has {WEIGHTS}, or shards, or {ADAPTER}"
            raise InputError(f"{path}: no such weights file; {hint}")
        handle = self._mapped(path)
        for stored in handle.keys():  # noqa: SIM118 (a handle is no dict)
            name = rename(stored)
            if name in self._places:
                raise InputError(f"{path}: tensor {stored!r} is there twice, also in {self._places[name][0].name}")
            header = handle.get_slice(stored)
            if header.get_dtype() not in self._known:
                known = ", ".join(self._known)
                raise InputError(f"{path}: tensor {stored!r} is {header.get_dtype()}; expected one of {known}")
            self._places[name] = (path, stored)
            self.shapes[name] = tuple(header.get_shape())
            self.dtypes[name] = self._known[header.get_dtype()]

    def get(self, name: str) -> torch.Tensor:
        """Map a tensor from its file; the caller copies it before the file changes."""
        path, stored = self._places[name]
        tensor = self._mapped(path).get_tensor(stored)
        if name not in self._low_rank:
            return tensor
        A, B, scale = self._low_rank[name]
        return (tensor.float() + self.get(B).float() @ self.get(A).float() * scale).to(tensor.dtype)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read rows [first, last) of a tensor; only these are in memory."""
        path, stored = self._places[name]
        rows = self._file(path).rows(stored, first, last)
        if name in self._low_rank:
            A, B, scale = self._low_rank[name]
            rows = (rows.float() + self.get(B)[first:last].float() @ self.get(A).float() * scale).to(rows.dtype)
        return rows

    def place(self, name: str) -> str:
        """Return the file of a tensor and its name in there, for messages."""
        path, stored = self._places[name]
        return f"{path}: tensor {stored!r}"

    def fold(self, scale: float) -> dict[str, int]:
        """Let `MODULE.weight` be read with the low-rank matrices added that are stored beside it, and hide those.

        Returns:
            The rank of each such weight.

        Raises:
            InputError: if matrices do not fit their weight, or are of another kind.
        """
        ranks: dict[str, int] = {}
        for A in [name for name in self.shapes if name.endswith(".lora_A.weight")]:
            weight, B = (A.replace(".lora_A.", new) for new in (".", ".lora_B."))
            shapes = {name: list(self.shapes.get(name, ())) for name in (weight, B, A)}
            (rows, columns), (rank, *_) = (shapes[name] if len(shapes[name]) == 2 else [0, 0] for name in (weight, A))
            if not rank or shapes[B] != [rows, rank] or shapes[A] != [rank, columns]:
                raise InputError(f"{self.directory}: the low-rank matrices of a weight do not fit it: {shapes}")
            self._low_rank[weight], ranks[weight] = (A, B, scale), rank
            for table in (self.shapes, self.dtypes):
                del table[A], table[B]
        if others := [name for name in self.shapes if ".lora_" in name]:
            raise InputError(f"{self.directory}: only plain LoRA is supported, not {listing(others, 3)}")
        return ranks

    def alias(self, name: str, source: str) -> None:
        """Let a tensor be read under one more name."""
        for table in (self.shapes, self.dtypes, self._places):
            table[name] = table[source]  # type: ignore[index]

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most elements that are no integers."""
        counts: Counter[torch.dtype] = Counter()
        for name, dtype in self.dtypes.items():
            if dtype.is_floating_point:
                counts[dtype] += math.prod(self.shapes[name])
        if not counts:
            raise InputError(f"{self.directory}: has no tensor of {', '.join(DTYPES)}")
        return counts.most_common(1)[0][0]


def _mapped(path: Path) -> Any:
    """Open a safetensors file as a memory map."""
    try:
        regular(path)
        with path.open("rb") as file:
            head = file.read(512)
        if problem := not_itself(head):
            raise InputError(f"{path}: is {problem}")
        length = int.from_bytes(head[:8], "little")
        if MAX_HEADER_BYTES < length < path.stat().st_size:
            raise SafetensorError(f"its header has {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, UnicodeError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {str(error)[:300]}; fetch it again") from None


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor an infinity, which its sum says at the speed of memory.

    A sum that is not finite may have overflowed, so only then each element is looked at.
    """
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_finite(weights: TensorSource, names: Iterable[str]) -> None:
    """Raise InputError for the first of these tensors that holds NaN or an infinity."""
    for name in names:
        if not is_finite(weights.get(name)):
            raise InputError(
                f"{weights.place(name)} holds NaN or infinite numbers; fetch it again, or take an earlier checkpoint"
            )


def check_entries(entries: Sequence[TensorEntry], shapes: Mapping[str, Sequence[int]], weights: TensorSource) -> None:
    """Compare what a model needs with what a checkpoint has, before anything is allocated.

    Args:
        shapes: shape of each of our parameters that the entries name.

    Raises:
        InputError: listing every kind of disagreement: missing, unexpected and misshapen tensors.
    """
    needed = {
        name: shape for entry in entries for name, shape in zip(entry.theirs, entry.shapes(shapes[entry.ours]), strict=True)
    }
    kinds = {
        "missing": [name for name in needed if name not in weights.shapes],
        "unexpected": [name for name in weights.shapes if name not in needed and not IGNORED.fullmatch(name)],
        "misshapen": [
            f"{name} {list(weights.shapes[name])} instead of {list(shape)}"
            for name, shape in needed.items()
            if weights.shapes.get(name, shape) != shape
        ],
    }
    problems = [f"{len(names)} {kind}: {listing(names)}" for kind, names in kinds.items() if names]
    if foreign := foreign_names(kinds["unexpected"], needed):
        raise InputError(
            f"{weights.directory}: is half converted: {len(foreign)} of {len(weights.shapes)} tensors have names of another "
            f"dialect than config.json's, first {foreign[0]}; convert the original directory again"
        )
    for lead in {
        name.removesuffix(want) for want in kinds["missing"][:1] for name in kinds["unexpected"] if name.endswith(want)
    }:
        if lead.endswith(".") and {lead + name for name in kinds["missing"]} <= weights.shapes.keys():
            count = len(kinds["missing"])
            raise InputError(f"{weights.directory}: {count} tensors have {lead!r} before their names; rename them without it")
    if problems:
        raise InputError(f"{weights.directory}: weights do not fit config.json; " + "; ".join(problems))


def write_shards(
    directory: Path,
    entries: Sequence[TensorEntry],
    like: Mapping[str, torch.Tensor],
    get: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype,
    extra: Mapping[str, torch.Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: OnMegabytes | None = None,
) -> None:
    """Write entries as `model.safetensors`, or as shards and their index; older weights in the directory are removed.

    Args:
        like: a tensor of the shape and kind of each of our parameters, on any device.
        get: returns our parameter by its name; called shard by shard, so that at most one shard is held.
        dtype: of the written tensors; integers stay as they are.
        extra: a few small tensors to write as well, by their names in the file.

    Raises:
        InputError: if a file cannot be written (disk full, no permission), or float16 cannot express a number.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    def size(tensor: torch.Tensor) -> int:
        return tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize

    by_name = {entry.ours: entry for entry in entries}
    shards = split_state_dict_into_shards_factory(
        {name: like[name] for name in by_name}, get_storage_size=size, filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    ).filename_to_tensors  # fmt: skip
    weight_map: dict[str, str] = {}
    done, total = 0, sum(size(like[name]) for name in by_name)
    for file_name, shard in shards.items():
        tensors: dict[str, torch.Tensor] = dict(extra or {}) if file_name == list(shards)[-1] else {}
        for entry in (by_name[name] for name in shard):
            for name, tensor in zip(entry.theirs, entry.split(get(entry.ours).detach()), strict=True):
                # A copy of its own: parts of a fused weight share storage, which safetensors refuses.
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                tensors[name] = torch.empty(tensor.shape, dtype=kind).copy_(tensor)
                if kind is torch.float16 and not is_finite(tensors[name]):
                    raise InputError(
                        f"tensor {name!r} holds {tensor.abs().max():g}, which float16 cannot express; take bfloat16"
                    )
                done += tensors[name].nbytes
            if progress:
                progress(done // 10**6, total // 10**6)
        weight_map |= dict.fromkeys(tensors, file_name)
        write_tensors(directory / file_name, tensors)
        del tensors
    written = {*shards}
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        written.add(INDEX)
    for old in [directory / INDEX, *directory.glob("model*.safetensors")]:
        if old.name not in written and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name):
            old.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        InputError: if it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        save_file(tensors, part, metadata={"format": "pt"})
        part.chmod(mode)  # safetensors writes files that only their owner can read
        part.replace(path)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error}") from error


def _shards(directory: Path) -> list[str]:
    """The weights files of a directory without an index: one, or all shards that their names count."""
    shards = sorted(path.name for path in directory.glob("model-?????-of-?????.safetensors"))
    if not shards or (directory / WEIGHTS).exists():
        return [WEIGHTS]
    total = shards[-1][-17:-12]
    expected = [f"model-{number:05d}-of-{total}.safetensors" for number in range(1, 1 + int(total))] if total.isdigit() else []
    if shards != expected:
        missing = sorted({*expected} - {*shards}) or [INDEX]
        raise InputError(f"{directory}: {len(shards)} shards without {INDEX}; {listing(missing)} is missing")
    return shards


def _read_index(path: Path) -> dict[str, str]:
    """Read which shard holds each tensor; a shard must be a plain file name beside the index."""
    weight_map = open_section(path).section("weight_map").values
    if not weight_map:
        raise InputError(f"{path}: has no weight_map")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w][\w.-]{,200}\.safetensors", file_name):
            problem = f"shard {short(file_name)} of {short(name)} is no plain .safetensors file name; refused"
            raise InputError(f"{path}: {problem}")
    return dict(weight_map)
