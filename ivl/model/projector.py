"""Pixel unshuffle and the two-layer projector between InternViT and the decoder (arXiv:2412.05271, section 2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ivl.model.linear import Linear


def pixel_unshuffle(patches_GPD: torch.Tensor, version: Literal["v1", "v2"] = "v2") -> torch.Tensor:
    """Merge each 2 x 2 block of patches: [G, P, D] to [G, P / 4, 4 D], row-major.

    The channels of a token are in the order upper left, upper right, lower left, lower right. Version v1 (ps_version of
    config.json) gives the same vectors with the grid of tokens transposed.

    Raises:
        ValueError: if the patches are not a square grid of even side.
    """
    num_tiles, num_patches, width = patches_GPD.shape
    side = int(num_patches**0.5)
    if side * side != num_patches or side % 2:
        raise ValueError(f"{num_patches} patches are not a square grid of even side")
    half = side // 2
    blocks = patches_GPD.view(num_tiles, half, 2, half, 2, width)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return blocks.permute(order).reshape(num_tiles, half * half, 4 * width)


class Projector(nn.Module):
    """Projects unshuffled patches [G, U, 4 * vision width] to vision tokens [G, U, decoder width]."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * vision_width)
        self.fc1 = Linear(4 * vision_width, width, bias=True)
        self.fc2 = Linear(width, width, bias=True)

    def forward(self, tokens_GUC: torch.Tensor) -> torch.Tensor:
        """Project unshuffled patches [G, U, 4 * vision width] to the decoder's width."""
        return self.fc2(F.gelu(self.fc1(self.norm(tokens_GUC))))

    def init_weights(self) -> None:
        """Initialize randomly, for training from nothing."""
        for name, parameter in self.named_parameters():
            self.init_weight(name, parameter)

    def init_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Initialize a tensor randomly as the parameter of this name."""
        if name.endswith("bias"):
            nn.init.zeros_(tensor)
        elif name == "norm.weight":
            nn.init.ones_(tensor)
        else:
            nn.init.normal_(tensor, std=tensor.shape[1] ** -0.5)
