"""The linear layer and the RMS norm of the whole model, so that kernels are chosen in one place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ivl.cpu import kernels
from ivl.quant.layers import QuantLinear


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

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)

    def matrix(self) -> torch.Tensor:
        """What forward multiplies by, [out, in]: for losses that run a wide head in chunks."""
        return self.weight


def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ weight^T + bias: a few rows of bfloat16 at inference on a CPU by our kernel, everything else by torch."""
    if kernels.usable(x, weight_OI):
        if x.numel() <= kernels.MAX_ROWS * x.shape[-1] and len(weight_OI) >= kernels.MIN_OUT:
            return kernels.linear(x, weight_OI, bias_O)
        if bias_O is not None and torch.backends.mkldnn.is_available():
            # F.linear writes the bias over the whole outcome first; this adds it within the product.
            return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return F.linear(x, weight_OI, bias_O)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.eps is not None
        if kernels.usable(x, self.weight):
            return kernels.rms_norm(x, self.weight, self.eps)
        return super().forward(x)


def swiglu(gate_up_TM: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where the rows of gate_up_TM hold gate and up side by side."""
    if kernels.usable(gate_up_TM) and gate_up_TM.shape[-1] % 64 == 0:
        return kernels.swiglu(gate_up_TM)
    gate, up = gate_up_TM.chunk(2, dim=-1)
    return F.silu(gate) * up


def product(
    layer: nn.Module,
    x_TI: torch.Tensor,
    *,
    before: Callable[[torch.Tensor], torch.Tensor] | None = None,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """layer(before(x)) + plus, where `before` is an RMSNorm or swiglu. A few tokens of bfloat16 at inference on a CPU take
    one or two kernels: what is done around the product would cost more in calls than in work."""
    norm = (before.weight, before.eps) if isinstance(before, RMSNorm) and before.eps is not None else None
    if len(x_TI) <= kernels.MAX_ROWS and (norm or before in (None, swiglu)):
        if isinstance(layer, QuantLinear) and len(x_TI) == 1 and layer.has_kernel(x_TI):
            return layer.product(x_TI, norm=norm, gated=before is swiglu, plus=plus)
        if isinstance(layer, QuantLinear) and layer.takes_few(x_TI):
            return layer.few(x_TI if before is None else before(x_TI), plus=plus)
        if (
            type(layer) is Linear
            and layer.in_features % 32 == 0
            and layer.out_features >= kernels.MIN_OUT
            and kernels.usable(x_TI, layer.weight)
            and (len(x_TI) == 1 or kernels.has_tiles())
        ):
            return kernels.linear(x_TI, layer.weight, layer.bias, norm=norm, gated=before is swiglu, plus=plus)
    y_TO = layer(x_TI if before is None else before(x_TI))
    return y_TO if plus is None else plus + y_TO


def in_chunks(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, size: int) -> torch.Tensor:
    """function(x), at inference on a CPU by chunks of the first dimension: what is wide inside it then stays in the
    caches and is allocated from memory at hand; fresh pages from the system cost more than the products."""
    if torch.is_grad_enabled() or not x.is_cpu or len(x) <= size:
        return function(x)
    return torch.cat([function(part) for part in x.split(size)])
