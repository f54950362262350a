"""A safetensors file, read by rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from ivl.errors import InputError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights in a safetensors file."""


class TensorFile:
    """A safetensors file. It is read, not mapped: pages of a map would count as memory of the process beside the copy.

    Raises:
        InputError: if it is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            with safe_open(path, framework="pt") as checked:  # checks the header against the size of the file
                self.metadata: dict[str, str] = checked.metadata() or {}
            self._file = path.open("rb", buffering=0)
            length = int.from_bytes(self._file.read(8), "little")
            header: dict[str, Any] = json.loads(self._file.read(length))
            self._begin = 8 + length
            self._places = {name: about for name, about in header.items() if name != "__metadata__"}
            self.dtypes = {name: DTYPES[about["dtype"]] for name, about in self._places.items()}
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        self.shapes = {name: tuple(about["shape"]) for name, about in self._places.items()}

    def get(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        return self._read(name, 0, self.shapes[name])

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read rows [first, last) of a tensor."""
        shape = self.shapes[name]
        return self._read(name, first, (last - first, *shape[1:]))

    def _read(self, name: str, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self.dtypes[name])
        if tensor.numel():
            row = tensor.nbytes // shape[0] if shape else 0
            self._file.seek(self._begin + self._places[name]["data_offsets"][0] + first * row)
            left = memoryview(cast(Any, tensor.flatten().view(torch.uint8).numpy()))
            while left:
                count = self._file.readinto(left)  # at most 2 GB at a time
                if not count:
                    raise InputError(f"{self.path}: has become shorter")
                left = left[count:]
        return tensor
