"""Random augmentation of images in training.

Every tile is compressed as JPEG (InternVL2.5, arXiv:2412.05271, section 3.4); other damage is optional.
"""

from __future__ import annotations

import io
import random
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

if TYPE_CHECKING:  # a configuration of training holds an Augmentation, and imports no torch
    import torch

Corruption = Literal["blur", "noise", "rescale", "brightness", "contrast"]
CORRUPTIONS: tuple[Corruption, ...] = typing.get_args(Corruption)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Changes to the images of data sets with `data_augment`; video frames are never changed."""

    jpeg_quality: tuple[int, int] | None = (75, 100)
    """Range, both ends included, from which the JPEG quality of every tile is drawn uniformly; None compresses nothing."""
    corruptions: tuple[Corruption, ...] = ()
    """One of these damages an image before it is cut: blur, noise, rescale (down and up again), brightness, contrast."""
    corruption_share: float = 0.25
    """Share of images that are damaged."""
    corruption_strength: float = 0.5
    """Upper end of the strength, which is drawn uniformly from 0. Strength 1 is a blur of 1 % of the shorter side, noise of 32
    levels, a quarter of the size, or brightness or contrast changed by half."""

    def __post_init__(self) -> None:
        if self.jpeg_quality is not None:
            low, high = self.jpeg_quality
            if not 1 <= low <= high <= 100:
                raise ValueError(f"jpeg_quality must be two whole numbers with 1 <= low <= high <= 100, got {low} and {high}")
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise ValueError(f"corruptions must be of {', '.join(CORRUPTIONS)}, got {name!r}")
        for name in ("corruption_share", "corruption_strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def qualities(self, num_tiles: int, generator: random.Random) -> list[int]:
        """Draw a JPEG quality for each tile; none if tiles are not compressed."""
        return [generator.randint(*self.jpeg_quality) for _ in range(num_tiles)] if self.jpeg_quality else []

    def drawn(self, generator: random.Random) -> tuple[Corruption, float, int] | None:
        """Draw the damage of an image: its kind, strength, and a seed for noise. Without corruptions nothing is drawn."""
        if not self.corruptions or generator.random() >= self.corruption_share:
            return None
        return generator.choice(self.corruptions), generator.random() * self.corruption_strength, generator.getrandbits(32)


def corrupt(image: Image.Image, kind: Corruption, strength: float, seed: int) -> Image.Image:
    """Damage an RGB image. Strength 0 changes nothing; an even seed raises brightness or contrast, an odd one lowers it."""
    if strength == 0:
        return image
    match kind:
        case "blur":
            return image.filter(ImageFilter.GaussianBlur(strength * 0.01 * min(image.size)))
        case "noise":
            noise = np.random.default_rng(seed).standard_normal((image.height, image.width, 3), np.float32)
            return Image.fromarray((np.asarray(image) + 32 * strength * noise).round().clip(0, 255).astype(np.uint8))
        case "rescale":
            small = [max(1, round(side / (1 + 3 * strength))) for side in image.size]
            return image.resize((small[0], small[1]), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
        case "brightness" | "contrast":
            enhance = ImageEnhance.Brightness if kind == "brightness" else ImageEnhance.Contrast
            return enhance(image).enhance(1 + (0.5 if seed % 2 == 0 else -0.5) * strength)


def compress_(tiles_GSSC: torch.Tensor, qualities: list[int]) -> None:
    """Overwrite each uint8 RGB tile with what saving it as JPEG at its quality and opening it again gives.

    Chroma has half the width and height (4:2:0), Pillow's default.
    """
    for tile_SSC, quality in zip(tiles_GSSC.numpy(), qualities, strict=True):
        file = io.BytesIO()
        Image.fromarray(tile_SSC).save(file, "JPEG", quality=quality)
        tile_SSC[:] = np.asarray(Image.open(file))
