"""Linear layers of 8- and 4-bit integer weights, and how such weights are found.

A weight is (q - z) * scale with q an unsigned integer: per output row in 8 bits (z = 128), per group of input elements in
4 bits (z = 8, or a zero point of its own). Bytes hold one q, or two with the earlier element in the lower half: what the
compressed-tensors format has in its words, so a file's bytes are used as they are.
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
"""Elements of a weight that are unpacked at a time: they stay in the caches until they are multiplied."""
SEARCH_ROWS = 1 << 22
"""Elements that are quantised at a time."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the weight of a layer is stored.

    group: input elements that share a scale; None is a whole row.
    symmetric: without zero points.
    activations: the layer's input is rounded to 8 bits per token, too (W8A8).
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
        """Scales of a row.

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
        group = "" if self.group is None else f" g{self.group}"
        return f"{'W8A8' if self.activations else f'int{self.bits}'}{group}{'' if self.symmetric else ' zero point'}"


@dataclass(frozen=True, kw_only=True)
class Schemes:
    """Of the linear layers of the decoder, of its output head and of the ViT; None leaves them as they are."""

    language: Scheme | None = None
    head: Scheme | None = None
    vision: Scheme | None = None

    def of(self, path: str) -> Scheme | None:
        """The scheme of the linear layer at a path of the model."""
        if path == "decoder.head":
            return self.head
        return {"decoder": self.language, "vision": self.vision}.get(path.partition(".")[0])

    def named(self) -> dict[str, Scheme]:
        """What is quantised, by its name for people."""
        parts = {"language model": self.language, "output head": self.head, "ViT": self.vision}
        return {name: scheme for name, scheme in parts.items() if scheme}


class QuantLinear(nn.Module):
    """y_TO = x_TI @ weight_OI^T + bias_O with a quantised weight; inference only. The interface of `linear.Linear`.

    Buffers: weight uint8 [O, I * bits / 8]; scale [O, groups], whose dtype follows the model's; zero uint8 [O, groups] or
    None. parts are those of Linear.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, *, bias: bool, parts: tuple[tuple[str, int], ...] = ()
    ) -> None:
        super().__init__()
        groups = scheme.groups(in_features)
        self.in_features, self.out_features, self.scheme, self.parts = in_features, out_features, scheme, parts
        self.register_buffer("weight", torch.empty(out_features, in_features * scheme.bits // 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(out_features, groups))
        self.register_buffer("zero", None if scheme.symmetric else torch.empty(out_features, groups, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x_TI = input.reshape(-1, self.in_features)
        y_TO = self._round_inputs(x_TI) if self.scheme.activations else self.by_panels(x_TI, self.dequantized)
        return y_TO.view(*input.shape[:-1], self.out_features)

    def matrix(self) -> torch.Tensor:
        """Return the dequantized weight, [out, in], in the dtype of the scales."""
        return self.dequantized(slice(None))

    def dequantized(self, rows: slice) -> torch.Tensor:
        """Return rows of `matrix`."""
        return unpacked(self.weight[rows], self.scale[rows], None if self.zero is None else self.zero[rows], self.scheme)

    def by_panels(self, x_TI: torch.Tensor, dequantized: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """Dequantize and multiply a panel of rows at a time. dequantized: returns rows of the weight."""
        size, parts = max(PANEL // self.in_features, 1), []
        for first in range(0, self.out_features, size):
            rows = slice(first, first + size)
            parts.append(F.linear(x_TI, dequantized(rows).to(x_TI.dtype), None if self.bias is None else self.bias[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _round_inputs(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Inputs in 8 bits with a scale per token; sums are exact integers."""
        scale_T1 = (x_TI.float().abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-30)
        q_TI = (x_TI.float() / scale_T1).round_().to(torch.int8)
        signed_OI = (self.weight ^ 128).view(torch.int8)
        sums_TO = torch.ops.aten._int_mm(q_TI, signed_OI.t()) if x_TI.is_cpu else q_TI.float() @ signed_OI.float().t()
        y_TO = sums_TO.float().mul_(scale_T1).mul_(self.scale.float().t())
        if self.bias is not None:
            y_TO += self.bias
        return y_TO.to(x_TI.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.name}"


def quantize(weight_OI: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """weight, scale and zero of a QuantLinear for a matrix, to the nearest; scales are rounded to bfloat16 before.

    In 4 bits a group's scale is the one of a few candidates with the least squared error: a range that cuts off the
    largest elements often serves the others better.

    Raises:
        ValueError: if a row is no whole number of groups, or the matrix has elements that are not finite.
    """
    width = weight_OI.shape[1]
    groups = scheme.groups(width)
    parts = []
    for some_OI in weight_OI.split(max(SEARCH_ROWS // width, 1)):
        if not some_OI.isfinite().all():
            raise ValueError("the matrix has elements that are infinite or no number")
        x_OGE = some_OI.float().unflatten(1, (groups, -1))
        parts.append(_search(x_OGE, scheme))
    q_OI, scale_OG, zero_OG = (torch.cat(column).flatten(1) for column in zip(*parts, strict=True))
    weight = q_OI if scheme.bits == 8 else q_OI[:, 0::2] | q_OI[:, 1::2] << 4
    return weight.contiguous(), scale_OG, None if scheme.symmetric else zero_OG


def _search(x_OGE: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [O, G, E], scale [O, G, 1] and zero [O, G, 1]."""
    top = 2**scheme.bits - 1
    if scheme.symmetric:
        reach_OG1, low = x_OGE.abs().amax(dim=2, keepdim=True), None
        divisors = [127.0] if scheme.bits == 8 else [7 + step / 3 for step in range(10)]
    else:
        low = x_OGE.amin(dim=2, keepdim=True).clamp_max(0)
        reach_OG1 = x_OGE.amax(dim=2, keepdim=True).clamp_min(0) - low
        divisors = [15 + step / 2 for step in range(10)]
    best: list[torch.Tensor] = []
    for divisor in divisors:
        # A group of zeros has the scale 1: nothing is divided by 0.
        scale = (reach_OG1 / divisor).bfloat16().float()
        scale = torch.where(scale > 0, scale, 1.0)
        middle = torch.full_like(scale, (top + 1) // 2) if low is None else (-low / scale).round_().clamp_(0, top)
        q = (x_OGE / scale).round_().add_(middle).clamp_(0, top)
        error = ((q - middle) * scale - x_OGE).square_().sum(dim=2, keepdim=True)
        found = [q, scale, middle, error]
        if best:
            better = error < best[3]
            found = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        best = found
    q, scale, middle, _ = best
    return q.to(torch.uint8), scale.bfloat16(), middle.to(torch.uint8)


def unpacked(weight: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """The matrix that a quantised weight stands for, [O, I], in the dtype of the scales."""
    q_OI = weight if scheme.bits == 8 else torch.stack([weight & 15, weight >> 4], dim=2).flatten(1)
    q_OGE = q_OI.to(scale_OG.dtype).unflatten(1, (scale_OG.shape[1], -1))
    middle = float(2 ** (scheme.bits - 1)) if zero_OG is None else zero_OG.to(scale_OG.dtype).unsqueeze(2)
    return ((q_OGE - middle) * scale_OG.unsqueeze(2)).flatten(1)


def quantize_layers(model: nn.Module, scheme_of: Callable[[str, nn.Linear], Scheme | None]) -> list[str]:
    """Put an unset QuantLinear in place of every linear layer for whose path and module there is a scheme, on the same
    device; biases stay. Returns the paths."""
    chosen = {
        path: (layer, scheme)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and (scheme := scheme_of(path, layer)) is not None
    }
    for path, (layer, scheme) in chosen.items():
        with layer.weight.device:
            new = QuantLinear(
                layer.in_features, layer.out_features, scheme, bias=layer.bias is not None, parts=getattr(layer, "parts", ())
            )
        new.scale = new.scale.to(layer.weight.dtype)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        model.set_submodule(path, new)
    return list(chosen)


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantised layers of a model by path; empty for an ordinary model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
