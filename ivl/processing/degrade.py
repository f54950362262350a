"""Tiles through JPEG: Pillow's pixels, from a kernel where there is one (jpeg_kernel.py)."""

from __future__ import annotations

import io
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from ivl.cpu import resize

_STEP = 32


def jpeg_(tiles_GSSC: np.ndarray, qualities: list[int]) -> np.ndarray:
    """Each uint8 RGB tile as it looks after being saved as JPEG at its quality and opened again; overwrites and returns them.

    Tiles must be contiguous. Chroma is halved both ways (4:2:0), Pillow's default.
    """
    if len(tiles_GSSC) != len(qualities):
        raise ValueError(f"{len(tiles_GSSC)} tiles but {len(qualities)} qualities")
    fast = len(tiles_GSSC) > 0 and tiles_GSSC.shape[1] % _STEP == 0 and available()
    for tile_SSC, quality in zip(tiles_GSSC, qualities, strict=True):
        if fast:
            _by_kernel(tile_SSC, quality)
        else:
            tile_SSC[:] = _by_pillow(tile_SSC, quality)
    return tiles_GSSC


@cache
def available() -> bool:
    """Whether the kernel can be built here and gives the pixels of Pillow's JPEG library."""
    if not resize.kernels_wanted():
        return False
    try:
        _kernel()
    except ImportError:  # no llvmlite for this platform
        return False
    noise_SSC = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    smooth_SSC = np.asarray(Image.fromarray(noise_SSC[:9, :9]).resize((96, 96), Image.Resampling.BICUBIC))
    for quality in (75, 85, 95, 100):
        for tile_SSC in (noise_SSC, smooth_SSC):
            found = tile_SSC.copy()
            _by_kernel(found, quality)
            if not np.array_equal(found, _by_pillow(tile_SSC, quality)):
                return False
    return True


def _by_pillow(tile_SSC: np.ndarray, quality: int) -> np.ndarray:
    return np.asarray(_opened(tile_SSC, quality).convert("RGB"))


def _opened(tile_SSC: np.ndarray, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    Image.fromarray(tile_SSC).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def _by_kernel(tile_SSC: np.ndarray, quality: int) -> None:
    side = len(tile_SSC)
    half = side // 2
    luma, blue, red, sums = resize.scratch([side * side, half * half, half * half, 8 * (half + 2)])
    for_luma, for_chroma = _tables(quality)
    arguments = [tile_SSC.ctypes.data, side, sums]
    for plane, width, table in ((luma, side, for_luma), (blue, half, for_chroma), (red, half, for_chroma)):
        arguments += [plane, width, width, *(part.ctypes.data for part in table)]
    resize.call(_kernel(), *arguments)


@lru_cache(maxsize=128)
def _tables(quality: int) -> list[np.ndarray]:
    """For luma and for chroma: 1/divisor, half a divisor and a half, and multiplier, each for two blocks side by side.
    What is rounded has 8 times the scale of what is written."""
    blank = np.zeros((8, 8, 3), np.uint8)
    quantization = _opened(blank, quality).quantization  # type: ignore[attr-defined]
    out = []
    for n in (0, 1):
        steps = np.tile(np.array(quantization[n], np.float64).reshape(8, 8), (1, 2))
        out.append(np.stack([1 / (8 * steps), 4 * steps + 0.5, steps]).astype(np.float32))
    return out


@cache
def _kernel() -> int:
    from ivl.cpu import jpeg_kernel, pixel_kernels

    assert jpeg_kernel.STEP == _STEP
    return pixel_kernels.build("jpeg", jpeg_kernel.degraded)
