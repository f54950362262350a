"""InternViT: the 300M (LayerNorm) and 6B (RMSNorm, QK norm) vision transformers by configuration (spec 1.1)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ivl.config import VisionConfig
from ivl.model.attention import attend_all
from ivl.model.linear import Linear, RMSNorm
from ivl.quant.layers import QuantLinear

POSITION_STD = 0.1
"""The reference draws class token and positions from N(0, 1), which drowns the patches of a ViT that is small or untrained."""


def make_norm(config: VisionConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer_norm" else RMSNorm
    return kind(config.width, eps=config.norm_eps)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Exact GELU; overwrites x when no gradient is wanted."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


def activated(layer: nn.Module, x_GPD: torch.Tensor) -> torch.Tensor:
    """gelu(layer(x)), [G, P, M]."""
    if isinstance(layer, QuantLinear) and layer.takes_rounded(x_GPD):
        return layer.rounded(x_GPD, gelu=True)
    return gelu(layer(x_GPD))


class VisionEmbeddings(nn.Module):
    """Patches to vectors, a class token in front, learned positions interpolated to the grid at hand."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.class_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.positions = nn.Parameter(torch.empty(1, 1 + config.grid**2, config.width))
        self.patch = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, pixels_GCYX: torch.Tensor) -> torch.Tensor:
        size = self.config.patch_size
        rows, cols = pixels_GCYX.shape[-2] // size, pixels_GCYX.shape[-1] // size
        # The patch convolution does not overlap, so it is one matrix product over flattened patches.
        blocks = pixels_GCYX.unflatten(-1, (cols, size)).unflatten(-3, (rows, size))
        patches_GPE = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches_GPD = F.linear(patches_GPE, self.patch.weight.flatten(1), self.patch.bias)
        class_G1D = self.class_token.expand(len(pixels_GCYX), -1, -1)
        return torch.cat([class_G1D, patches_GPD], dim=1) + self.positions_for(rows, cols)

    def positions_for(self, rows: int, cols: int) -> torch.Tensor:
        """Position table [1, 1 + rows * cols, D], bicubically interpolated when the grid is not the stored one."""
        grid = self.config.grid
        if (rows, cols) == (grid, grid):
            return self.positions
        table = self.positions[:, 1:].float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, cols), mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:, :1], table.flatten(2).transpose(1, 2).to(self.positions.dtype)], dim=1)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        width = config.width
        parts = (("q_proj", width), ("k_proj", width), ("v_proj", width))
        self.qkv = Linear(width, 3 * width, bias=config.qkv_bias, parts=parts)
        self.q_norm = RMSNorm(width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.out = Linear(width, width, bias=True)

    def forward(self, x_GPD: torch.Tensor) -> torch.Tensor:
        """What the heads see, [G, P, D]; `out` is left to the layer, which adds it."""
        q, k, v = self.qkv(x_GPD).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        heads = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        return attend_all(*heads).flatten(2)


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = make_norm(config)
        self.attention = VisionAttention(config)
        self.scale1 = nn.Parameter(torch.empty(config.width))
        self.norm2 = make_norm(config)
        self.fc1 = Linear(config.width, config.mlp_width, bias=True)
        self.fc2 = Linear(config.mlp_width, config.width, bias=True)
        self.scale2 = nn.Parameter(torch.empty(config.width))

    def forward(self, x_GPD: torch.Tensor) -> torch.Tensor:
        x_GPD = self.residual(x_GPD, self.attention.out, self.attention(self.norm1(x_GPD)), self.scale1)
        return self.residual(x_GPD, self.fc2, activated(self.fc1, self.norm2(x_GPD)), self.scale2)

    def residual(self, x_GPD: torch.Tensor, layer: nn.Module, y_GPI: torch.Tensor, scale_D: torch.Tensor) -> torch.Tensor:
        """x + scale * layer(y), in training with drop path."""
        if isinstance(layer, QuantLinear) and layer.takes_rounded(y_GPI):
            return layer.rounded(y_GPI, plus=x_GPD, factor_O=scale_D)
        return torch.addcmul(x_GPD, self.drop(layer(y_GPI)), scale_D)

    def drop(self, branch_GPD: torch.Tensor) -> torch.Tensor:
        """Drop path: zero the whole branch of a tile with probability drop_path, rescale the rest."""
        if not self.training or self.drop_path == 0:
            return branch_GPD
        keep = 1 - self.drop_path
        mask = torch.rand(len(branch_GPD), 1, 1, device=branch_GPD.device) < keep
        return branch_GPD * mask.to(branch_GPD.dtype) / keep


class VisionTransformer(nn.Module):
    """InternViT. No final norm and no pooling: the projector takes the patch rows of the selected layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embeddings = VisionEmbeddings(config)
        last = max(config.num_layers - 1, 1)
        rates = [config.drop_path * i / last for i in range(config.num_layers)]
        self.layers = nn.ModuleList(VisionLayer(config, rate) for rate in rates)

    def forward(self, pixels_GCYX: torch.Tensor, select_layer: int = -1) -> torch.Tensor:
        """Normalised pixels [G, 3, height, width] to hidden states [G, 1 + P, D], class token first.

        select_layer counts hidden states from the embedding output (0); negative from the last layer's output (-1).
        """
        depth = select_layer % (self.config.num_layers + 1)
        x_GPD = self.embeddings(pixels_GCYX)
        for layer in self.layers[:depth]:
            if self.checkpointing and torch.is_grad_enabled():
                x_GPD = checkpoint(layer, x_GPD, use_reentrant=False)
            else:
                x_GPD = layer(x_GPD)
        return x_GPD

    def init_weights(self) -> None:
        """Random initialisation for training from nothing."""
        nn.init.normal_(self.embeddings.class_token, std=POSITION_STD)
        nn.init.normal_(self.embeddings.positions, std=POSITION_STD)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, VisionLayer):
                nn.init.constant_(module.scale1, self.config.layer_scale_init)
                nn.init.constant_(module.scale2, self.config.layer_scale_init)
