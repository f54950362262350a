"""Vision tokens of tiles, each distinct tile encoded once while it stays in memory."""

from __future__ import annotations

import hashlib

import torch

from ivl.model.vlm import VLM

PATCHES_PER_CALL = 16 * 1024
"""Tiles encoded together have at most this many patches: 16 tiles of 448 px."""


class VisionEncoder:
    """Encodes tiles in batches and keeps the newest encodings, found again by the content of the tile."""

    def __init__(self, model: VLM, *, max_bytes: int) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.tiles_per_call = max(1, PATCHES_PER_CALL // model.config.vision.grid**2)
        self.known: dict[bytes, torch.Tensor] = {}

    def encode(self, tiles_GSSC: torch.Tensor) -> torch.Tensor:
        """uint8 tiles [G, size, size, 3] to vision tokens [G, U, D]; equal tiles are computed once."""
        keys = [hashlib.blake2b(tile.numpy().data, digest_size=16).digest() for tile in tiles_GSSC.contiguous()]
        new = {key: g for g, key in enumerate(keys) if key not in self.known}
        for chunk in torch.tensor(list(new.values()), dtype=torch.long).split(self.tiles_per_call):
            if len(chunk):
                for g, vision_UD in zip(chunk.tolist(), self.model.encode_tiles(tiles_GSSC[chunk]), strict=True):
                    self.known[keys[g]] = vision_UD.clone()  # a view would keep its whole batch alive
        for key in dict.fromkeys(keys):  # most recently used last
            self.known[key] = self.known.pop(key)
        out_GUD = torch.stack([self.known[key] for key in keys])
        self._forget()
        return out_GUD

    def _forget(self) -> None:
        used = sum(vision.nbytes for vision in self.known.values())
        while used > self.max_bytes:
            used -= self.known.pop(next(iter(self.known))).nbytes
