"""Linear layers with 8- and 4-bit integer weights, and how a matrix is quantized.

A weight is (q - z) * scale, where q is an unsigned integer. In 8 bits there is a scale per output row, and z = 128. In 4 bits
there is a scale per group of input elements, and z = 8 or a zero point per group. A byte holds one q, or two with the earlier
element in the lower half, as in the words of the compressed-tensors format: bytes of a file are used as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

Bits = Literal[4, 8]
GROUPS = (32, 64, 128)
PANEL = 1 << 20
"""Elements of a weight that are dequantized at a time: they stay in the caches until they are multiplied."""
SEARCH_ROWS = 1 << 22
"""Elements of a matrix that are quantized at a time."""


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the weight of a linear layer is stored.

    group: Input elements that share a scale; None means a whole row.
    symmetric: There are no zero points.
    activations: The layer's input is rounded to 8 bits per token, too (W8A8).
    """

    bits: Bits
    group: int | None = None
    symmetric: bool = True
    activations: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}, must be 4 or 8")
        if self.group is not None and (self.group < 1 or self.group % 8):
            raise ValueError(f"group is {self.group}, must be a multiple of 8")
        if self.bits == 8 and not self.symmetric:
            raise ValueError("8 bits with a zero point are not supported")
        if self.activations and (self.bits, self.group) != (8, None):
            raise ValueError("8-bit activations go with 8-bit weights of one scale a row")

    def groups(self, width: int) -> int:
        """Return the number of scales of a row.

        Raises:
            ValueError: if the row is not a whole number of groups.
        """
        if self.group is None:
            return 1
        if width % self.group:
            fitting = [group for group in GROUPS if width % group == 0] or "none"
            raise ValueError(f"input width {width} is no multiple of group {self.group}; of {GROUPS} fit {fitting}")
        return width // self.group

    @property
    def name(self) -> str:
        """The name of the format, such as "int4 g128"."""
        group = "" if self.group is None else f" g{self.group}"
        return f"{'W8A8' if self.activations else f'int{self.bits}'}{group}{'' if self.symmetric else ' zero point'}"


@dataclass(frozen=True, kw_only=True)
class QuantPlan:
    """How the linear layers of the decoder, its output head and the ViT are stored; None leaves them as they are."""

    language: QuantConfig | None = None
    head: QuantConfig | None = None
    vision: QuantConfig | None = None

    def for_layer(self, path: str) -> QuantConfig | None:
        """Return the configuration of the linear layer at a path of the model."""
        if path == "decoder.head":
            return self.head
        return {"decoder": self.language, "vision": self.vision}.get(path.partition(".")[0])

    def by_part(self) -> dict[str, QuantConfig]:
        """Return the configuration of each part that is quantized, by a name for people."""
        parts = {"language model": self.language, "output head": self.head, "ViT": self.vision}
        return {name: config for name, config in parts.items() if config}


class QuantLinear(nn.Module):
    """y_TO = x_TI @ weight_OI^T + bias_O with a quantized weight, for inference only. It has the interface of Linear.

    Buffers: weight uint8 [O, I * bits / 8]; scale [O, groups], whose dtype follows the model's; zero uint8 [O, groups] or
    None. parts are those of Linear. forward dequantizes and multiplies; `accelerate` of ivl.cpu and of
    ivl.gpu give the layer a faster product.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    panel = PANEL

    def __init__(
        self, in_features: int, out_features: int, config: QuantConfig, *, bias: bool, parts: tuple[tuple[str, int], ...] = ()
    ) -> None:
        super().__init__()
        groups = config.groups(in_features)
        self.in_features, self.out_features, self.config, self.parts = in_features, out_features, config, parts
        self.register_buffer("weight", torch.empty(out_features, in_features * config.bits // 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(out_features, groups))
        self.register_buffer("zero", None if config.symmetric else torch.empty(out_features, groups, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x_TI = input.reshape(-1, self.in_features)
        y_TO = self._round_inputs(x_TI) if self.config.activations else self.by_panels(x_TI, self.dequantized)
        return y_TO.view(*input.shape[:-1], self.out_features)

    def matrix(self) -> torch.Tensor:
        """Return the dequantized weight, [out, in], in the dtype of the scales."""
        return self.dequantized(slice(None))

    def dequantized(self, rows: slice) -> torch.Tensor:
        """Return rows of `matrix`."""
        return dequantize(self.weight[rows], self.scale[rows], None if self.zero is None else self.zero[rows], self.config)

    def by_panels(self, x_TI: torch.Tensor, dequantized: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """Dequantize and multiply a panel of rows at a time. dequantized: returns rows of the weight."""
        size, parts = max(self.panel // self.in_features, 1), []
        for first in range(0, self.out_features, size):
            rows = slice(first, first + size)
            parts.append(F.linear(x_TI, dequantized(rows).to(x_TI.dtype), None if self.bias is None else self.bias[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _round_inputs(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Round inputs to 8 bits with a scale per token, and multiply."""
        scale_T1 = (x_TI.float().abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-30)
        q_TI = (x_TI.float() / scale_T1).round_().to(torch.int8)
        y_TO = self.integer_sums(q_TI).float().mul_(scale_T1).mul_(self.scale.float().t())
        if self.bias is not None:
            y_TO += self.bias
        return y_TO.to(x_TI.dtype)

    def integer_sums(self, q_TI: torch.Tensor) -> torch.Tensor:
        """Return the product of rounded inputs with the weight, [T, O]."""
        return q_TI.float() @ (self.weight.float() - 128).t()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.config.name}"


def quantize(weight_OI: torch.Tensor, config: QuantConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round a matrix to the nearest quantized weight. Returns weight, scale and zero of a QuantLinear.

    Scales are rounded to bfloat16 first. In 4 bits the scale of a group is the one of a few candidates with the least
    squared error: a range that cuts off the largest elements often serves the others better.

    Raises:
        ValueError: if a row is no whole number of groups, or the matrix has elements that are not finite.
    """
    width = weight_OI.shape[1]
    groups = config.groups(width)
    parts = []
    for some_OI in weight_OI.split(max(SEARCH_ROWS // width, 1)):
        if not some_OI.isfinite().all():
            raise ValueError("the matrix has elements that are infinite or NaN")
        x_OGE = some_OI.float().unflatten(1, (groups, -1))
        parts.append(_search(x_OGE, config))
    q_OI, scale_OG, zero_OG = (torch.cat(column).flatten(1) for column in zip(*parts, strict=True))
    weight = q_OI if config.bits == 8 else q_OI[:, 0::2] | q_OI[:, 1::2] << 4
    return weight.contiguous(), scale_OG, None if config.symmetric else zero_OG


def _search(x_OGE: torch.Tensor, config: QuantConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q [O, G, E], scale [O, G, 1] and zero [O, G, 1]."""
    top = 2**config.bits - 1
    if config.symmetric:
        reach_OG1, low = x_OGE.abs().amax(dim=2, keepdim=True), None
        divisors = [127.0] if config.bits == 8 else [7 + step / 3 for step in range(10)]
    else:
        low = x_OGE.amin(dim=2, keepdim=True).clamp_max(0)
        reach_OG1 = x_OGE.amax(dim=2, keepdim=True).clamp_min(0) - low
        divisors = [15 + step / 2 for step in range(10)]
    best: list[torch.Tensor] = []  # q, scale, middle, error
    for divisor in divisors:
        # A group of zeros has the scale 1: nothing is divided by 0.
        scale = (reach_OG1 / divisor).bfloat16().float()
        scale = torch.where(scale > 0, scale, 1.0)
        middle = torch.full_like(scale, (top + 1) // 2) if low is None else (-low / scale).round_().clamp_(0, top)
        q = (x_OGE / scale).round_().add_(middle).clamp_(0, top)
        error = ((q - middle) * scale - x_OGE).square_().sum(dim=2, keepdim=True)
        candidate = [q, scale, middle, error]
        if best:
            better = error < best[3]
            candidate = [torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)]
        best = candidate
    q, scale, middle, _ = best
    return q.to(torch.uint8), scale.bfloat16(), middle.to(torch.uint8)


def dequantize(weight: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None, config: QuantConfig) -> torch.Tensor:
    """Return the matrix that a quantized weight stands for, [O, I], in the dtype of the scales."""
    q_OI = weight if config.bits == 8 else torch.stack([weight & 15, weight >> 4], dim=2).flatten(1)
    q_OGE = q_OI.to(scale_OG.dtype).unflatten(1, (scale_OG.shape[1], -1))
    middle = float(2 ** (config.bits - 1)) if zero_OG is None else zero_OG.to(scale_OG.dtype).unsqueeze(2)
    return ((q_OGE - middle) * scale_OG.unsqueeze(2)).flatten(1)


def quantize_layers(model: nn.Module, config_of: Callable[[str, nn.Linear], QuantConfig | None]) -> list[str]:
    """Replace linear layers by unset QuantLinears on the same device; biases stay. Returns the paths of the layers.

    config_of: The configuration for a path and its layer; None leaves the layer as it is.
    """
    chosen = {
        path: (layer, config)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and (config := config_of(path, layer)) is not None
    }
    for path, (layer, config) in chosen.items():
        with layer.weight.device:
            new = QuantLinear(
                layer.in_features, layer.out_features, config, bias=layer.bias is not None, parts=getattr(layer, "parts", ())
            )
        new.scale = new.scale.to(layer.weight.dtype)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        model.set_submodule(path, new)
    return list(chosen)


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized layers of a model by path; empty for an ordinary model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
