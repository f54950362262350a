"""The GGUF container (versions 2 and 3, little endian): metadata and where each tensor lies. Files are untrusted."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.errors import InputError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct codes of the value types."""
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]
    """Slowest dimension first, as torch has it."""
    kind: int
    """ggml's number of the storage type."""
    start: int
    """Byte offset in the file."""


class GgufFile:
    """A file mapped into memory.

    fields: every metadata value, arrays as lists. tensors: by name.

    Raises:
        InputError: if the file is no GGUF, of another version or byte order, or shorter than it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            with path.open("rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at = 0
            self._read()
        except (OSError, ValueError, struct.error, OverflowError) as error:
            raise InputError(f"{path}: not a readable GGUF file: {error}") from None

    def _read(self) -> None:
        if self.bytes[:4] != b"GGUF":
            raise ValueError(f"it starts with {self.bytes[:4]!r}")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} or big endian; little endian versions 2 and 3 can be read")
        num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
        for _ in range(num_fields):
            key = self._string()
            self.fields[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        data = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in infos:
            self.tensors[name] = StoredTensor(shape, kind, data + offset)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._scalar("I")
        if num_dims > _MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {num_dims} dimensions")
        dims = self._scalars("Q", num_dims)
        kind, offset = self._scalar("I"), self._scalar("Q")
        return name, tuple(reversed(dims)), kind, offset

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        size = count * struct.calcsize(f"<{code}")
        if size > len(self.bytes) - self._at:
            raise ValueError(f"it ends at byte {len(self.bytes)}, inside its header")
        values = struct.unpack_from(f"<{count}{code}", self.bytes, self._at)
        self._at += size
        return values

    def _scalar(self, code: str) -> Any:
        return self._scalars(code, 1)[0]

    def _string(self) -> str:
        size = self._scalar("Q")
        if size > len(self.bytes) - self._at:
            raise ValueError(f"it ends at byte {len(self.bytes)}, inside a text of {size} bytes")
        text = self.bytes[self._at : self._at + size].decode()
        self._at += size
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind}")
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            return list(self._scalars(_SCALARS[inner], count))
        if inner != _STRING:
            raise ValueError(f"an array of type {inner}")
        return [self._string() for _ in range(count)]

    def slice(self, name: str, block_size: int, block_bytes: int) -> memoryview:
        """The bytes of a tensor stored in blocks of so many numbers.

        Raises:
            InputError: if the file ends before the tensor does.
        """
        tensor = self.tensors[name]
        end = tensor.start + math.prod(tensor.shape) // block_size * block_bytes
        if end > len(self.bytes):
            raise InputError(f"{self.path}: ends at byte {len(self.bytes)}, tensor {name} at {end}; fetch it again")
        return memoryview(self.bytes)[tensor.start : end]
