"""One linear layer for the whole model, so that kernels are chosen in one place."""

from __future__ import annotations

import torch
from torch import nn


class Linear(nn.Linear):
    """y_TO = x_TI @ weight_OI^T + bias_O.

    parts: names and row counts of the logical projections fused into this weight, in row order, such as
    (("q_proj", 896), ("k_proj", 128), ("v_proj", 128)). Empty when the layer is a single projection. Checkpoints and
    LoRA adapters see the parts; the computation sees one matrix.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, parts: tuple[tuple[str, int], ...] = ()) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if parts and sum(rows for _, rows in parts) != out_features:
            raise ValueError(f"parts {parts} do not add up to {out_features} rows")
        self.parts = parts

    def reset_parameters(self) -> None:
        """Weights are left unset: the model's init_weights or a checkpoint fills every one of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)
