"""Tokens and pixels, the same for every peer."""

from __future__ import annotations

import numpy as np


def tokens(seed: int, number: int) -> np.ndarray:
    """int64 [number]."""
    return np.random.default_rng(seed).integers(0, 150_000, number)


def tiles(count: int) -> np.ndarray:
    """uint8 [count, 448, 448, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, 448, 448, 3), dtype=np.uint8)
