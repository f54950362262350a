"""InternViT: the 300M (LayerNorm) and 6B (RMSNorm, QK norm) vision transformers by configuration (arXiv:2412.05271)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from ivl.config import VisionConfig
from ivl.model.attention import Sdpa, backend_for
from ivl.model.linear import Linear

POSITION_STD = 0.1
"""Of class token and positions. InternVL draws them from N(0, 1), which drowns the patches of a small, untrained ViT."""


def make_norm(config: VisionConfig) -> nn.Module:
    """Return the norm that the configuration names."""
    return (nn.LayerNorm if config.norm == "layer_norm" else nn.RMSNorm)(config.width, eps=config.norm_eps)


class VisionEmbeddings(nn.Module):
    """Embeds patches, puts the class token in front, and adds learned positions interpolated to the grid."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.class_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.positions = nn.Parameter(torch.empty(1 + config.grid**2, config.width))
        self.patch = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, pixels_GCYX: torch.Tensor) -> torch.Tensor:
        """Pixels [G, 3, height, width] to embeddings [G, 1 + P, D]."""
        size = self.config.patch_size
        rows, cols = pixels_GCYX.shape[-2] // size, pixels_GCYX.shape[-1] // size
        # The patch convolution does not overlap, so it is one matrix product over flattened patches.
        blocks = pixels_GCYX.view(len(pixels_GCYX), 3, rows, size, cols, size)
        patches_GPE = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        class_G1D = self.class_token.expand(len(pixels_GCYX), -1, -1)
        return torch.cat([class_G1D, self.project(patches_GPE)], dim=1) + self.positions_for(rows, cols)

    def project(self, patches_GPE: torch.Tensor) -> torch.Tensor:
        """Multiply flattened patches by the convolution's weight, [G, P, D]."""
        return F.linear(patches_GPE, self.patch.weight.flatten(1), self.patch.bias)

    def positions_for(self, rows: int, cols: int) -> torch.Tensor:
        """Return the position table [1 + rows * cols, D], bicubically interpolated unless the grid is the stored one."""
        grid = self.config.grid
        if (rows, cols) == (grid, grid):
            return self.positions
        table = self.positions[1:].float().view(1, grid, grid, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, cols), mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:1], table[0].flatten(1).T.to(self.positions.dtype)])


class VisionAttention(nn.Module):
    """Full attention among the patches of a tile and its class token, which P counts in the layers."""

    backend: Sdpa | None = None
    """The attention backend; None takes the backend of the table in attention.py."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        width = config.width
        parts = (("q_proj", width), ("k_proj", width), ("v_proj", width))
        self.qkv = Linear(width, 3 * width, bias=config.qkv_bias, parts=parts)
        self.q_norm = nn.RMSNorm(width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.out = Linear(width, width, bias=True)

    def forward(self, x_GPD: torch.Tensor) -> torch.Tensor:
        """Patches in, patches out, [G, P, D] each."""
        return self.out(self.heads(x_GPD))

    def heads(self, x_GPD: torch.Tensor) -> torch.Tensor:
        """Return the output of all heads side by side, [G, P, D], before the output projection."""
        q, k, v = self.qkv(x_GPD).chunk(3, dim=-1)
        q, k, v = (x.view(*x.shape[:2], self.num_heads, -1) for x in (self.q_norm(q), self.k_norm(k), v))
        return (self.backend or backend_for(q)).tiles(q, k, v).flatten(2)


class VisionLayer(nn.Module):
    """One layer: attention and an MLP, each with a norm before, a learned scale after, and a residual around it."""

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
        """Residual stream in, residual stream out, [G, P, D] each."""
        x_GPD = torch.addcmul(x_GPD, self.drop(self.attention(self.norm1(x_GPD))), self.scale1)
        return torch.addcmul(x_GPD, self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x_GPD))))), self.scale2)

    def drop(self, branch_GPD: torch.Tensor) -> torch.Tensor:
        """Apply drop path: zero the whole branch of a tile with probability drop_path and rescale the others."""
        if not self.training or self.drop_path == 0:
            return branch_GPD
        keep = 1 - self.drop_path
        mask = torch.rand(len(branch_GPD), 1, 1, device=branch_GPD.device) < keep
        return branch_GPD * mask.to(branch_GPD.dtype) / keep


class VisionTransformer(nn.Module):
    """InternViT. It has no final norm and no pooling: the projector takes the patches of the selected layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embeddings = VisionEmbeddings(config)
        last = max(config.num_layers - 1, 1)
        rates = [config.drop_path * i / last for i in range(config.num_layers)]
        self.layers = nn.ModuleList(VisionLayer(config, rate) for rate in rates)

    def forward(self, pixels_GCYX: torch.Tensor, select_layer: int = -1) -> torch.Tensor:
        """Turn normalized pixels [G, 3, height, width] into hidden states [G, 1 + P, D], class token first.

        select_layer counts hidden states from the embeddings (0), or backwards from the last layer's output (-1).
        """
        depth = select_layer % (self.config.num_layers + 1)
        x_GPD = self.embeddings(pixels_GCYX)
        for layer in self.layers[:depth]:
            if self.checkpointing and torch.is_grad_enabled():
                x_GPD = checkpoint(layer, x_GPD, use_reentrant=False)  # pyright: ignore
            else:
                x_GPD = layer(x_GPD)
        return x_GPD  # pyright: ignore[reportUnknownVariableType]

    def init_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Initialize a tensor randomly as the parameter of this name, for training from nothing."""
        if name.endswith("bias"):
            nn.init.zeros_(tensor)
        elif "norm" in name:
            nn.init.ones_(tensor)
        elif "scale" in name:
            nn.init.constant_(tensor, self.config.layer_scale_init)
        elif name in ("embeddings.class_token", "embeddings.positions"):
            nn.init.normal_(tensor, std=POSITION_STD)
        else:
            nn.init.trunc_normal_(tensor, std=0.02)
