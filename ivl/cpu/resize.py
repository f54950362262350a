"""Bicubic resizing straight into tiles, with the pixels of Pillow, several times as fast.

Pillow resizes 8-bit images in two passes, rows and then columns. A pixel is a weighted sum in integers: weights are
fractions of 2^22, the sum is rounded and clipped to 0..255 after each pass. Two kernels with vector instructions do the same
(kernels/pixels.py). Once per process their pixels are compared with Pillow's: the comparison tells the order of the passes,
which differs between versions; and where the pixels differ, or this process uses no kernels (IVL_CPU=any, no llvmlite),
Pillow resizes.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from ivl.cpu.kernels import features
from ivl.cpu.kernels.launch import NOW
from ivl.processing.image import Pixels, resize

SUPPORT = 2.0
"""Reach of the bicubic filter, in pixels of the smaller of both images."""
MAX_TAPS = 500
"""With more source pixels to a sum than this, its digits could leave the 24 bits of a float32."""
MIN_WIDTH = 6
"""Fewest pixels of a row: 16 bytes are read at a time."""
KEPT_BYTES = 64 << 20
"""Scratch memory above this is replaced at the next image."""

_memory = threading.local()


def fast_resize(image: Pixels, size: int, columns: int, rows: int, *, thumbnail: bool) -> np.ndarray:
    """Resize an RGB image to a grid of tiles: `ivl.processing.image.resize`, by kernels where they apply.

    Images of a few pixels, tiles of a few pixels and extreme reductions are left to Pillow.
    """
    image_YXC = np.asarray(image)
    if resizable(image_YXC.shape[1], image_YXC.shape[0], size):
        return tiles(image_YXC, size, columns, rows, thumbnail=thumbnail)
    return resize(image, size, columns, rows, thumbnail=thumbnail)


def resizable(width: int, height: int, size: int) -> bool:
    """Whether `tiles` takes an image of this size to tiles of this size."""
    longest = max(width, height)
    return width >= MIN_WIDTH and 3 * size >= 64 and 2 * SUPPORT * longest / size + 3 < MAX_TAPS and available()


def available() -> bool:
    """Whether kernels can be built here and give Pillow's pixels."""
    return _pass_order() is not None


def tiles(image_YXC: np.ndarray, size: int, columns: int, rows: int, *, thumbnail: bool) -> np.ndarray:
    """Resize uint8 RGB [height, width, 3] to tiles by kernels. Its rows must be contiguous, and `resizable` must be true."""
    grids = [(columns, rows), (1, 1)] if thumbnail else [(columns, rows)]
    out_GSSC = np.empty((sum(c * r for c, r in grids), size, size, 3), np.uint8)
    parts = [out_GSSC[: columns * rows], out_GSSC[columns * rows :]]
    height, width = image_YXC.shape[:2]
    columns_first = _pass_order()
    assert columns_first is not None
    upright = [columns_first(width, height, c * size, r * size) for c, r in grids]
    if not any(upright):
        _across_then_down(image_YXC, grids, parts)
        return out_GSSC
    for grid, part, first in zip(grids, parts, upright, strict=False):
        if first:
            _down_then_across(image_YXC, grid, part)
        else:
            _across_then_down(image_YXC, [grid], [part])
    return out_GSSC


PassOrder = Callable[[int, int, int, int], bool]
"""Whether Pillow resizes columns first, given the old and the new width and height."""
ORDERS: tuple[PassOrder, ...] = (
    lambda width, height, w, h: height > h and height - h > 2 * (width - w),  # where it saves work: Pillow 13 and later
    lambda width, height, _, h: height > 100 * width and height > h,  # of strips: before Pillow 13
)


def _across_then_down(image_YXC: np.ndarray, grids: list[tuple[int, int]], out: list[np.ndarray]) -> None:
    """Resize to one or two grids of tiles at once."""
    (height, width), size = image_YXC.shape[:2], out[0].shape[1]
    strides = [3 * size * c for c, _ in grids]
    wide = _rows_resized(image_YXC.ctypes.data, image_YXC.strides[0], width, height, [c * size for c, _ in grids])
    for (c, r), stride, source, tiles_GSSC in zip(grids, strides, wide, out, strict=False):
        table = weights(height, r * size)
        NOW.run("down", (), 0, source, stride, tiles_GSSC.ctypes.data, r * size, c, size, 3 * size, *table.pointers())


def _down_then_across(image_YXC: np.ndarray, grid: tuple[int, int], out_GSSC: np.ndarray) -> None:
    (height, width), size, (c, r) = image_YXC.shape[:2], out_GSSC.shape[1], grid
    # A segment of the kernel may be longer than a short row, so short rows get some room to the right.
    room = max(3 * width, 64)
    source_YB = np.ascontiguousarray(image_YXC).reshape(height, 3 * width)
    if room > 3 * width:
        source_YB = np.pad(source_YB, ((0, 0), (0, room - 3 * width)))
    low_YB = np.empty((r * size, room), np.uint8)
    table = weights(height, r * size)
    NOW.run("down", (), 0, source_YB.ctypes.data, room, low_YB.ctypes.data, r * size, 1, r * size, room, *table.pointers())
    (address,) = _rows_resized(low_YB.ctypes.data, room, width, r * size, [c * size])
    resized = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (r, size, c, size, 3))
    out_GSSC[:] = resized.swapaxes(1, 2).reshape(out_GSSC.shape)


def _rows_resized(address: int, stride: int, width: int, num_rows: int, new_widths: list[int]) -> list[int]:
    """Addresses of the rows at each new width, one after another in this thread's scratch memory."""
    needed = [64 * 3 * width, *(3 * w * num_rows for w in new_widths), *(3 * w * 16 for w in new_widths)]
    turned, *buffers = scratch(needed)
    wide, laid = buffers[: len(new_widths)], buffers[len(new_widths) :]
    arguments = [address, stride, 3 * width, num_rows, turned]
    tables = [weights(width, w) for w in new_widths]  # kept here: the kernel has bare addresses
    for w, table, to, by in zip(new_widths, tables, wide, laid, strict=True):
        arguments += [to, 3 * w, w, by, *table.pointers()]
    NOW.run("across", (len(new_widths),), 0, *arguments)
    return wide


class Weights(NamedTuple):
    """For each of n places out, where its source pixels start, how many they are, and their weights in two digits [n, taps]."""

    starts: np.ndarray
    counts: np.ndarray
    high: np.ndarray
    low: np.ndarray

    def pointers(self) -> tuple[int, int, int, int, int]:
        return (
            self.starts.ctypes.data, self.counts.ctypes.data, self.high.shape[1], self.high.ctypes.data, self.low.ctypes.data,
        )  # fmt: skip


@lru_cache(maxsize=256)
def weights(length: int, new_length: int) -> Weights:
    """Bicubic weights (a = -0.5), wider than the filter's own reach when shrinking; computed in float64 as Pillow does."""
    from ivl.cpu.kernels.pixels import DIGIT, SHIFT

    scale = length / new_length
    wide = max(scale, 1.0)
    reach = SUPPORT * wide
    centres = (np.arange(new_length) + 0.5) * scale
    starts = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    counts = np.minimum((centres + reach + 0.5).astype(np.int64), length) - starts
    taps_KN = np.arange(counts.max())[:, None]
    weights_KN = np.where(taps_KN < counts, _bicubic((taps_KN + starts - centres + 0.5) * (1 / wide)), 0.0)
    total_N = np.zeros(new_length)
    for row in weights_KN:  # one after another: the order decides the last bit
        total_N += row
    weights_KN /= np.where(total_N == 0, 1.0, total_N)
    whole_NK = np.trunc(weights_KN * (1 << SHIFT) + np.copysign(0.5, weights_KN)).astype(np.int64).T
    high_NK = (whole_NK + (1 << DIGIT - 1)) >> DIGIT
    low_NK = whole_NK - (high_NK << DIGIT)
    return Weights(starts, counts, *(np.ascontiguousarray(digit, np.float32) for digit in (high_NK, low_NK)))


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def scratch(sizes: list[int]) -> list[int]:
    """Addresses of this thread's scratch memory, 64-byte aligned; valid until the next call."""
    room = sum(-(-size // 64) * 64 for size in sizes) + 64
    memory = getattr(_memory, "kept", None)
    if memory is None or len(memory) < room or len(memory) > KEPT_BYTES:
        memory = _memory.kept = np.empty(room, np.uint8)
    at, addresses = -(-memory.ctypes.data // 64) * 64, []
    for size in sizes:
        addresses.append(at)
        at += -(-size // 64) * 64
    return addresses


@cache
def _pass_order() -> PassOrder | None:
    """Find the order of Pillow's passes by its pixels: sums are rounded between the passes, so the order shows.

    None if kernels cannot be built, or the pixels follow neither order.
    """
    if not features.at_least("avx2"):
        return None
    orders = [*ORDERS]
    # Width, height, grid: enlarged, shrunk, and on both sides of the lines where columns begin to go first.
    shapes = ((61, 75, 1, 1), (20, 25, 2, 2), (61, 75, 3, 1), (84, 57, 2, 1), (84, 86, 2, 1), (84, 84, 2, 1))
    for width, height, c, r in (*shapes, (6, 600, 1, 1), (6, 601, 1, 1)):
        noise_YXC = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        grid, shape = (c, r), (c * r, 28, 28, 3)
        resized = np.asarray(Image.fromarray(noise_YXC).resize((28 * c, 28 * r), Image.Resampling.BICUBIC))
        wanted = resized.reshape(r, 28, c, 28, 3).swapaxes(1, 2).reshape(shape)
        found, turned = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
        _across_then_down(noise_YXC, [grid], [found])
        _down_then_across(noise_YXC, grid, turned)
        given = (width, height, 28 * c, 28 * r)
        orders = [order for order in orders if np.array_equal(turned if order(*given) else found, wanted)]
    return orders[0] if orders else None
