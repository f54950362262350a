"""What a rank holds of a tensor that is spread over ranks, and tensors in files, of which a rank reads its rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ivl.train.world import ModelCuts


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
