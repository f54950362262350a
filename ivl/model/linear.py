"""The linear layer of the whole model, and the gate of the decoder's MLPs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """y_TO = x_TI @ weight_OI^T + bias_O.

    parts: names and row counts of the logical projections fused into this weight, in row order, such as
    (("q_proj", 896), ("k_proj", 128), ("v_proj", 128)). Empty when the layer is a single projection. Checkpoints and
    LoRA adapters see the parts; the computation sees one matrix.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, parts: tuple[tuple[str, int], ...] = ()) -> None:
        super().__init__(in_features, out_features, bias=bias)  # pyright: ignore[reportUnknownMemberType]
        if parts and sum(rows for _, rows in parts) != out_features:
            raise ValueError(f"parts {parts} do not add up to {out_features} rows")
        self.parts = parts

    def reset_parameters(self) -> None:
        """Leave the weights unset: the model's init_weights or a checkpoint fills every one of them."""

    def matrix(self) -> torch.Tensor:
        """Return what forward multiplies by, [out, in], for losses by chunks; subclasses (adapters, 8 bits) compute it."""
        return self.weight


def swiglu(gate_up_TM: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, where a row of gate_up_TM holds gate and up side by side."""
    gate, up = gate_up_TM.chunk(2, dim=-1)
    return F.silu(gate) * up
