"""Vision tokens of tiles, each distinct tile encoded once while it stays in memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch

from ivl.config import ModelConfig
from ivl.model.vlm import VLM

PATCHES_PER_CALL = 16 * 1024
"""Tiles encoded together have at most this many patches: 16 tiles of 448 px."""


def tile_key(tile_SSC: torch.Tensor) -> bytes:
    """A tile by its content."""
    return hashlib.blake2b(tile_SSC.contiguous().numpy().data, digest_size=16).digest()


def tile_cost(config: ModelConfig) -> int:
    """Prompt tokens that take about as much arithmetic as encoding a tile."""
    v, d = config.vision, config.decoder
    patch = v.num_layers * (4 * v.width**2 + 2 * v.width * v.mlp_width)
    token = d.num_layers * (2 * d.width * (d.num_heads + d.num_kv_heads) * d.head_dim + 3 * d.width * d.mlp_width)
    return max(1, round((1 + v.grid**2) * patch / token))


class VisionEncoder:
    """Encodes tiles in batches and keeps the newest encodings, up to max_bytes."""

    def __init__(self, model: VLM, *, max_bytes: int) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.tiles_per_call = max(1, PATCHES_PER_CALL // model.config.vision.grid**2)
        self.known: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.num_bytes = 0

    def find(self, key: bytes) -> torch.Tensor | None:
        """The vision tokens [U, D] of a tile if they are still known."""
        if key in self.known:
            self.known.move_to_end(key)
        return self.known.get(key)

    def encode(self, tiles: dict[bytes, torch.Tensor]) -> dict[bytes, torch.Tensor]:
        """uint8 tiles [size, size, 3] that are not known, to vision tokens [U, D]."""
        encoded: dict[bytes, torch.Tensor] = {}
        keys = list(tiles)
        for at in range(0, len(keys), self.tiles_per_call):
            some = keys[at : at + self.tiles_per_call]
            vision_GUD = self.model.encode_tiles(torch.stack([tiles[key] for key in some]))
            # Copies, as a view would keep its whole batch alive.
            encoded |= {key: vision_UD.clone() for key, vision_UD in zip(some, vision_GUD, strict=True)}
        for key, vision_UD in encoded.items():
            self._forget(self.max_bytes - vision_UD.nbytes)
            if vision_UD.nbytes <= self.max_bytes:
                self.known[key] = vision_UD
                self.num_bytes += vision_UD.nbytes
        return encoded

    def _forget(self, room: int) -> None:
        while self.known and self.num_bytes > room:
            self.num_bytes -= self.known.popitem(last=False)[1].nbytes
