"""Fast linear layers, plain and quantized, and the RMS norm; `fused_linear` joins them for few tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ivl.cpu.kernels import features, ops
from ivl.cpu.kernels.launch import NOW, Launch
from ivl.cpu.kernels.ops import Fusion, NormArgs, QuantizedWeight
from ivl.lora.layers import LoraLinear
from ivl.model.decoder import DecoderLayer
from ivl.model.linear import Linear, swiglu
from ivl.quant.layers import QuantLinear

PANEL = 1 << 20
"""Elements of a weight that are widened to float32 at a time."""


def onednn_linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight^T + bias by oneDNN, which adds the bias within the product. F.linear writes it over the whole result
    first, and takes another library in float32, which is slower on processors of AMD."""
    if not torch.backends.mkldnn.is_available():
        return F.linear(x, weight_OI, bias_O)
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")


def widened_linear(
    x: torch.Tensor, panel: Callable[[slice], torch.Tensor], out_features: int, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """Multiply in float32 where torch has no product in bfloat16: inputs and a panel of the weight at a time are widened.

    panel: returns rows of the weight, [rows, I].
    """
    wide, y = x.float(), x.new_empty(*x.shape[:-1], out_features)
    size = max(PANEL // x.shape[-1], 1)
    for rows in (slice(first, first + size) for first in range(0, out_features, size)):
        y[..., rows] = onednn_linear(wide, panel(rows).float(), None if bias_O is None else bias_O[rows].float())
    return y


def bfloat16_linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight^T + bias of bfloat16 tensors, by the best that torch has for many rows."""
    if features.multiplies_bfloat16():
        return onednn_linear(x, weight_OI, bias_O)
    return widened_linear(x, weight_OI.__getitem__, len(weight_OI), bias_O)


class FastLinear(Linear):
    """A Linear with a bfloat16 weight: few rows by our kernel, more by torch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight_OI, bias_O = self.weight, self.bias
        if not ops.takes(input) or weight_OI.dtype is not torch.bfloat16:
            return super().forward(input)
        if input.numel() <= ops.MAX_ROWS * self.in_features:
            return ops.linear(input, weight_OI, bias_O)
        return bfloat16_linear(input, weight_OI, bias_O)

    def few_rows(self, x_TI: torch.Tensor, fusion: Fusion, launch: Launch = NOW) -> torch.Tensor | None:
        """Return the fused product of at most MAX_ROWS rows; None if kernels cannot fuse it."""
        if len(x_TI) > 1 and not features.at_least("amx"):
            return None
        return ops.linear(x_TI, self.weight, self.bias, fusion, launch)


class FastLoraLinear(LoraLinear, FastLinear):
    """A LoraLinear whose frozen product is a FastLinear's, which comes after LoraLinear in the order of base classes."""

    def few_rows(self, *args: object, **kwargs: object) -> None:
        """Refuse to be fused or captured: adapters come after the product, and may be switched off and on."""


class Float32Linear(Linear):
    """A Linear with a float32 weight whose product is oneDNN's where no gradient is wanted."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        float32 = input.dtype is self.weight.dtype is torch.float32
        if torch.is_grad_enabled() or not (float32 and input.is_cpu and self.weight.is_cpu):
            return super().forward(input)
        return onednn_linear(input, self.weight, self.bias)


class FastRMSNorm(nn.RMSNorm):
    """An nn.RMSNorm with a bfloat16 weight, in one pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not ops.takes(x) or self.weight.dtype is not torch.bfloat16:
            return super().forward(x)
        return ops.rms_norm(x, *self.args())

    def args(self) -> NormArgs:
        """Return weight and eps as kernels take them."""
        assert self.eps is not None
        return self.weight, self.eps


def norm_heads_(layer: DecoderLayer, qkv_TXH: torch.Tensor, launch: Launch = NOW) -> bool:
    """Normalize query and key heads in place if the layer does so. Returns False, with nothing changed, if kernels cannot."""
    q_norm, k_norm = layer.q_norm, layer.k_norm
    if q_norm is None:
        return True
    if not isinstance(q_norm, FastRMSNorm) or not isinstance(k_norm, FastRMSNorm):
        return False
    ops.norm_heads_(qkv_TXH, q_norm.args(), k_norm.args(), layer.num_heads, layer.num_kv_heads, launch)
    return True


class VectorQuantLinear(QuantLinear):
    """A QuantLinear of 8 or 4 bits on vectors: few rows by a GEMV, more by dequantizing and torch's product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not ops.takes(input) or self.scale.dtype is not torch.bfloat16:
            return super().forward(input)
        x_TI = input.reshape(-1, self.in_features)
        return self.product(x_TI).view(*input.shape[:-1], self.out_features)

    def stored(self) -> QuantizedWeight:
        """Return the tensors as kernels take them."""
        return QuantizedWeight(self.weight, self.scale, self.zero, self.bias)

    def product(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for rows that kernels take."""
        if len(x_TI) <= ops.MAX_ROWS:
            return ops.quant_gemv(x_TI, self.stored())
        if features.multiplies_bfloat16():
            return self.by_panels(x_TI, self._panel)
        return widened_linear(x_TI, self._panel, self.out_features, self.bias)

    def _panel(self, rows: slice) -> torch.Tensor:
        zero = None if self.zero is None else self.zero[rows]
        return ops.dequantize(self.weight[rows], self.scale[rows], zero, self.in_features)

    def few_rows(self, x_TI: torch.Tensor, fusion: Fusion, launch: Launch = NOW) -> torch.Tensor | None:
        """Return the fused product of at most MAX_ROWS rows; None if kernels cannot fuse it."""
        return ops.quant_gemv(x_TI, self.stored(), fusion, launch) if len(x_TI) == 1 else None


class AmxQuantLinear(VectorQuantLinear):
    """A QuantLinear of 8 or 4 bits with AMX: one row by a GEMV, few by a small-batch GEMM, more by dequantizing GEMM."""

    def product(self, x_TI: torch.Tensor) -> torch.Tensor:
        if len(x_TI) == 1:
            return ops.quant_gemv(x_TI, self.stored())
        if len(x_TI) <= ops.MAX_ROWS and ops.small_batch_fits(self.in_features, self.config.bits):
            return ops.quant_small_batch(x_TI, self.stored())
        return ops.quant_gemm(x_TI, self.stored())

    def few_rows(self, x_TI: torch.Tensor, fusion: Fusion, launch: Launch = NOW) -> torch.Tensor | None:
        if len(x_TI) == 1 or not ops.small_batch_fits(self.in_features, self.config.bits):
            return super().few_rows(x_TI, fusion, launch)
        return ops.quant_small_batch(x_TI, self.stored(), fusion, launch)


class VnniW8A8Linear(QuantLinear):
    """A W8A8 QuantLinear whose integers torch multiplies with VNNI. Without VNNI its product takes tens of times as long."""

    def integer_sums(self, q_TI: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._int_mm(q_TI, (self.weight ^ 128).view(torch.int8).t())


class AmxW8A8Linear(QuantLinear):
    """A W8A8 QuantLinear with AMX: inputs are rounded to 8 bits and multiplied as integers."""

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the kernel takes these inputs."""
        return ops.takes(x) and self.scale.dtype is torch.bfloat16

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.fused(input) if self.takes(input) else super().forward(input)

    def fused(
        self, x: torch.Tensor, *, gelu: bool = False, residual: torch.Tensor | None = None, factor_O: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the layer's output y: gelu(y), or residual + factor * y."""
        x_TI = x.reshape(-1, self.in_features)
        residual_TO = None if residual is None else residual.reshape(-1, self.out_features)
        q = QuantizedWeight(self.weight, self.scale, None, self.bias)
        y_TO = ops.w8a8_linear(x_TI, q, gelu=gelu, residual_TO=residual_TO, factor_O=factor_O)
        return y_TO.view(*x.shape[:-1], self.out_features)


def fused_linear(
    layer: nn.Module, x_TI: torch.Tensor, *, norm: nn.RMSNorm | None = None, gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return layer(norm(x)) + residual, or layer(swiglu(x)) + residual.

    Few tokens take one or two kernels: norm, gate and residual would cost more in calls than in work.
    """
    if len(x_TI) <= ops.MAX_ROWS and ops.takes(x_TI):
        y_TO = few_rows(layer, x_TI, norm=norm, gated=gated, residual=residual)
        if y_TO is not None:
            return y_TO
    if norm is not None:
        x_TI = norm(x_TI)
    elif gated:
        x_TI = ops.swiglu(x_TI) if ops.takes(x_TI) and x_TI.shape[-1] % 64 == 0 else swiglu(x_TI)
    y_TO = layer(x_TI)
    return y_TO if residual is None else residual + y_TO


def few_rows(
    layer: nn.Module, x_TI: torch.Tensor, *, norm: nn.RMSNorm | None = None, gated: bool = False,
    residual: torch.Tensor | None = None, launch: Launch = NOW,
) -> torch.Tensor | None:  # fmt: skip
    """Return the product of `fused_linear` for at most MAX_ROWS rows, from kernels alone; None if kernels do not suffice."""
    if not isinstance(layer, FastLinear | VectorQuantLinear) or not (norm is None or isinstance(norm, FastRMSNorm)):
        return None
    return layer.few_rows(x_TI, Fusion(None if norm is None else norm.args(), gated, residual), launch)
