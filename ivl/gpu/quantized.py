"""Products of quantized layers on a card: torch's own kernels for few rows, and dequantizing for many.

None of these kernels has been run by this project on a real card: tests put their documented meaning in their place, and
`python -m benchmarks.gpu` compares and times them on a card.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch.nn import functional as F

from ivl.quant.layers import QuantLinear

FEW_ROWS = 64
"""Up to this many rows reading the weight takes longer than multiplying by it."""
FEWEST_ROWS = 32
"""Rows that an integer product is filled up to: torch._int_mm takes more than 16 on a card."""
TIMED_CALLS = 20


class CardLinear(QuantLinear):
    """Dequantizes in panels so large that launches do not count."""

    panel = 1 << 26


class Int8Linear(CardLinear):
    """8-bit weights with a scale per row. The weight is stored signed."""

    def prepare(self) -> None:
        """Store the weight in the form that the kernels take."""
        self.weight = (self.weight ^ 128).view(torch.int8)

    def dequantized(self, rows: slice) -> torch.Tensor:
        return self.weight[rows].to(self.scale.dtype) * self.scale[rows]

    def integer_sums(self, q_TI: torch.Tensor) -> torch.Tensor:
        filled = F.pad(q_TI, (0, 0, 0, FEWEST_ROWS - len(q_TI))) if len(q_TI) < FEWEST_ROWS else q_TI
        return torch.ops.aten._int_mm(filled, self.weight.t())[: len(q_TI)]


class FusedInt8Linear(Int8Linear):
    """Multiplies few rows without writing the dequantized weight to memory."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x_TI = input.reshape(-1, self.in_features)
        if len(x_TI) > FEW_ROWS:
            return super().forward(input)
        y_TO = torch.ops.aten._weight_int8pack_mm(x_TI, self.weight, self.scale.flatten().to(x_TI.dtype))
        return (y_TO if self.bias is None else y_TO + self.bias).view(*input.shape[:-1], self.out_features)


class Int4Linear(CardLinear):
    """4-bit weights in bfloat16 models. The weight is stored in the kernel's order, scales and zero points side by side."""

    scale_and_zero_GO2: torch.Tensor

    def prepare(self) -> None:
        """Store the weight in the form that the kernel takes: there it is (q - 8) * scale + zero."""
        middle = torch.full_like(self.scale, 8) if self.zero is None else self.zero.to(self.scale.dtype)
        pairs = torch.stack([self.scale, (8 - middle) * self.scale], dim=2).transpose(0, 1).contiguous()
        self.register_buffer("scale_and_zero_GO2", pairs, persistent=False)
        tiles = next(tiles for tiles in (8, 4, 2) if self.in_features % (16 * tiles) == 0)
        # The kernel wants the earlier element of a byte in the higher half.
        self.weight = torch.ops.aten._convert_weight_to_int4pack((self.weight << 4 | self.weight >> 4).contiguous(), tiles)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x_TI = input.reshape(-1, self.in_features)
        y_TO = self._product(x_TI) if len(x_TI) <= FEW_ROWS else F.linear(x_TI, self.matrix())
        return (y_TO if self.bias is None else y_TO + self.bias).view(*input.shape[:-1], self.out_features)

    def matrix(self) -> torch.Tensor:
        """Return the dequantized weight: the product of the unit matrix, which needs no second copy of the weight."""
        return self._product(torch.eye(self.in_features, dtype=self.scale.dtype, device=self.scale.device)).t()

    def _product(self, x_TI: torch.Tensor) -> torch.Tensor:
        assert self.config.group is not None
        return torch.ops.aten._weight_int4pack_mm(x_TI.contiguous(), self.weight, self.config.group, self.scale_and_zero_GO2)


def prepare_layer(layer: QuantLinear) -> None:
    """Give a layer on a card its fastest product, in place. Its weight can then be used, but no longer saved."""
    config, width = layer.config, layer.in_features
    if config.bits == 8 and config.group is None and width % 8 == layer.out_features % 8 == 0:
        layer.__class__ = Int8Linear
        cast(Int8Linear, layer).prepare()
        if not config.activations and _fused_pays(width, layer.out_features, layer.scale.dtype, layer.weight.device):
            layer.__class__ = FusedInt8Linear
    elif config.bits == 4 and layer.scale.dtype is torch.bfloat16 and width % 32 == layer.out_features % 8 == 0:
        layer.__class__ = Int4Linear
        cast(Int4Linear, layer).prepare()
    else:
        layer.__class__ = CardLinear


@cache
def _fused_pays(width: int, out_features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a row is multiplied faster by the fused kernel, which in some versions of torch is a plain loop."""
    if torch.version.cuda is None:  # nothing to time: a card that tests pretend
        return True
    x_TI = torch.ones(1, width, dtype=dtype, device=device)
    weight_OI = torch.ones(out_features, width, dtype=torch.int8, device=device)
    scale_O = torch.ones(out_features, dtype=dtype, device=device)
    with torch.cuda.device(device):  # whose stream the events time
        fused = _milliseconds(lambda: torch.ops.aten._weight_int8pack_mm(x_TI, weight_OI, scale_O))
        return fused < _milliseconds(lambda: F.linear(x_TI, weight_OI.to(dtype) * scale_O.unsqueeze(1)))


def _milliseconds(function: Callable[[], torch.Tensor]) -> float:
    function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(TIMED_CALLS):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
