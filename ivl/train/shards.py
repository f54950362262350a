"""What a rank holds of a tensor that is spread over ranks, and tensors in files, of which a rank reads its rows alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from ivl.errors import InputError
from ivl.train.world import ModelCuts

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights in a safetensors file."""


class StoredTensors(Protocol):
    """Tensors in files by name. Rows [first, last) of one are read without the others."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...  # noqa: D102
    def get(self, name: str) -> torch.Tensor: ...  # noqa: D102
    def rows(self, name: str, first: int, last: int) -> torch.Tensor: ...  # noqa: D102


def own_part(tensor: Any) -> torch.Tensor:
    """Return what this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if hasattr(tensor, "full_tensor") else tensor


def own_rows(tensor: Any) -> tuple[int, int]:
    """Return which rows [first, last) of a tensor this rank holds: FSDP2 splits by rows, all of a tensor that is not split."""
    if not hasattr(tensor, "full_tensor"):
        return 0, len(tensor)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], offset[0] + shape[0]


@torch.no_grad()
def fill(tensor: torch.Tensor, stored: StoredTensors, name: str, cuts: ModelCuts) -> None:
    """Read what this rank holds of a parameter, or of a moment `PARAMETER|NAME`, converting type and device."""
    if (parameter := name.partition("|")[0]) in cuts.cuts:  # rows of each part, or columns: read whole
        keep(tensor, cuts.share(parameter, stored.get(name)))
        return
    first, last = own_rows(tensor)
    if first < last:
        own_part(tensor).copy_(stored.rows(name, first, last))


@torch.no_grad()
def keep(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Take the rows that this rank holds of a whole tensor."""
    first, last = own_rows(tensor)
    own_part(tensor).copy_(whole[first:last])


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
