"""Encodes tiles to vision tokens; each distinct tile is encoded once while its encoding stays in memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch

from ivl.config import ModelConfig
from ivl.model.vlm import VLM

PATCHES_PER_CALL = 16 * 1024
"""Tiles encoded together have at most this many patches: 16 tiles of 448 px."""


def tile_hash(tile_SSC: torch.Tensor, salt: bytes = b"") -> bytes:
    """Return the hash of a tile's content."""
    return hashlib.blake2b(tile_SSC.contiguous().numpy().data, digest_size=16, key=salt).digest()


def tile_cost(config: ModelConfig) -> int:
    """Return how many prompt tokens take about as much arithmetic as encoding a tile."""
    v, d = config.vision, config.decoder
    patch = v.num_layers * (4 * v.width**2 + 2 * v.width * v.mlp_width)
    token = d.num_layers * (2 * d.width * (d.num_heads + d.num_kv_heads) * d.head_dim + 3 * d.width * d.mlp_width)
    return max(1, round((1 + v.grid**2) * patch / token))


class VisionEncoder:
    """Encodes tiles in batches and keeps the newest encodings, up to max_bytes."""

    def __init__(self, config: ModelConfig, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.tiles_per_call = max(1, PATCHES_PER_CALL // config.vision.grid**2)
        self.cached: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.num_bytes = 0

    def find(self, tile: bytes) -> torch.Tensor | None:
        """Return the vision tokens [U, D] of a tile, by its hash, if they are still in memory."""
        if tile in self.cached:
            self.cached.move_to_end(tile)
        return self.cached.get(tile)

    def encode(self, tiles: dict[bytes, torch.Tensor], model: VLM) -> dict[bytes, torch.Tensor]:
        """Encode uint8 tiles [size, size, 3] to vision tokens [U, D], both by hash, which says the model, too."""
        encoded: dict[bytes, torch.Tensor] = {}
        hashes = list(tiles)
        for at in range(0, len(hashes), self.tiles_per_call):
            batch = hashes[at : at + self.tiles_per_call]
            vision_GUD = model.encode_tiles(torch.stack([tiles[tile] for tile in batch]))
            # Copies, as a view would keep its whole batch alive.
            encoded |= {tile: vision_UD.clone() for tile, vision_UD in zip(batch, vision_GUD, strict=True)}
        for tile, vision_UD in encoded.items():
            self._evict(self.max_bytes - vision_UD.nbytes)
            if vision_UD.nbytes <= self.max_bytes:
                self.cached[tile] = vision_UD
                self.num_bytes += vision_UD.nbytes
        return encoded

    def _evict(self, room: int) -> None:
        while self.cached and self.num_bytes > room:
            self.num_bytes -= self.cached.popitem(last=False)[1].nbytes
