"""Images as tiles of one size (dynamic resolution: InternVL1.5, arXiv:2404.16821, section 3.3).

An image is resized to the grid of tiles nearest to its own shape and cut along it; the whole image is added as a thumbnail.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image, ImageOps

from ivl.config import TilingConfig
from ivl.errors import InputError, MediaError, short
from ivl.types import FramesBy, ImageRef, VideoRef
from ivl.utils.budgets import MAX_METADATA_BYTES, MAX_PIXELS, MAX_PIXELS_PER_REQUEST, MAX_TILES
from ivl.utils.files import regular
from ivl.utils.pictures import open_image, problem_of, to_rgb, upright

Pixels = Image.Image | np.ndarray
"""An RGB image of Pillow, or uint8 RGB [height, width, 3]."""
Opener = Callable[..., Pixels]
"""Opens an image as `load_image` does, with the same pixels and errors."""
Resizer = Callable[..., np.ndarray]
"""Resizes an image as `resize` does, with the same pixels."""


def load_image(ref: ImageRef, root: str = "", *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image as RGB, upright.

    A relative path starts at root. Decisions: EXIF orientation is applied, since users ask about the picture as they see it
    (the reference ignores the tag); transparency is laid over white (the reference shows the color hidden under it); deep gray
    is scaled to 8 bits by the range that its values take (see `to_rgb`); of an animation the first frame counts.

    Raises:
        MediaError: naming the file, if it is missing, of another format, truncated, or larger than max_pixels.
    """
    check_source(ref)
    source = ref.source
    if isinstance(source, Image.Image):
        check_size(source.size, "the given image", max_pixels)
        exif = source.info.get("exif") or b""
        try:
            return to_rgb(ImageOps.exif_transpose(source) if len(exif) <= MAX_METADATA_BYTES else source)
        except Exception as error:  # it or its file was closed, or the file is damaged
            raise MediaError("undecodable_media", f"the given image: not readable ({type(error).__name__}: {error})") from error
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else str(Path(root) / source)
    with io.BytesIO(source) if isinstance(source, bytes) else _open_file(name) as stream:
        head = stream.read(512)
        stream.seek(0)
        try:
            image, orientation = open_image(stream)
            check_size(image.size, name, max_pixels)
            return upright(to_rgb(image), orientation)
        except InputError:
            raise
        except Exception as error:  # Pillow's readers raise whatever their parsing meets
            problem = problem_of(error, head, quote=not isinstance(source, bytes))
            raise MediaError("undecodable_media", f"{name}: {problem}") from error


def check_source(ref: ImageRef | VideoRef) -> None:
    """Raise InputError for a reference whose source is nothing that a medium can be read from, or whose options are wrong."""
    is_image = isinstance(ref, ImageRef)
    kind, forms = ("an image", "a path, bytes or a PIL image") if is_image else ("a video", "a path or bytes")
    if not isinstance(ref.source, str | bytes | os.PathLike) and not (is_image and isinstance(ref.source, Image.Image)):
        got = f"{type(ref.source).__name__}{'; PIL.Image.fromarray makes an image of an array' if is_image else ''}"
        raise InputError(f"{kind} must be {forms}, got {got}")
    name, number = ("max_tiles", ref.max_tiles) if isinstance(ref, ImageRef) else ("num_frames", ref.num_frames)
    whole = isinstance(number, Integral) and not isinstance(number, bool) and 1 <= number <= MAX_TILES
    if number is not None and not whole:
        raise InputError(f"{name} of {kind} must be a whole number in 1..{MAX_TILES:,}, got {short(number)}")
    if isinstance(ref, VideoRef) and ref.frames_by not in get_args(FramesBy):
        raise InputError(f"frames_by of a video must be {' or '.join(get_args(FramesBy))}, got {short(ref.frames_by)}")
    if isinstance(ref, VideoRef) and ref.clip is not None:
        times: tuple[Any, ...] = tuple(ref.clip) if isinstance(ref.clip, tuple | list) and len(ref.clip) == 2 else ("",)
        if not (all(isinstance(time, Real) for time in times) and times[0] <= times[-1]):
            raise InputError(f"clip of a video must be (start, end) in seconds, start first, got {short(ref.clip)}")
    if isinstance(ref.source, str | bytes) and not ref.source:
        raise MediaError("missing_media", f"{kind} has an empty path or no bytes")


def _open_file(name: str) -> io.BufferedReader:
    try:
        regular(name)
        return Path(name).open("rb")
    except InputError as error:  # a pipe or a device
        raise MediaError("undecodable_media", str(error)) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        kind = "undecodable_media" if os.path.exists(name) else "missing_media"  # noqa: PTH110, never raises
        why = error.strerror if isinstance(error, OSError) else error
        raise MediaError(kind, f"{name}: cannot read the image ({why})") from error


def check_size(size: tuple[int, int], name: object, max_pixels: int) -> None:
    """Raise MediaError for an image or a frame of more pixels than may be decoded."""
    if size[0] * size[1] > max_pixels:
        sizes = f"{size[0]} x {size[1]} pixels, the limit is {max_pixels:,}"
        raise MediaError("undecodable_media", f"{name}: {sizes}; scale it down")


class PixelBudget:
    """Pixels that may still be decoded for one prompt or sample."""

    def __init__(self, limit: int = MAX_PIXELS_PER_REQUEST) -> None:
        self.limit = self.left = limit

    def spend(self, pixels: int, name: object) -> None:
        """Take off what is about to be decoded; raises MediaError if that is too much."""
        if pixels > self.left:
            limit = f"the limit of all media of a request is {self.limit:,} (max_pixels_per_request)"
            raise MediaError(
                "undecodable_media", f"{name}: {pixels:,} pixels to decode, of which {self.left:,} are left; {limit}"
            )
        self.left -= pixels

    def load(self, load: Opener, ref: ImageRef, root: str, max_pixels: int) -> Any:
        """Open an image within the budget."""
        try:
            pixels = load(ref, root, max_pixels=min(max_pixels, self.left))
        except MediaError as error:
            if self.left >= max_pixels:
                raise
            limit = f"all media of a request may have {self.limit:,} pixels (max_pixels_per_request)"
            raise MediaError(error.kind, f"{error}; {limit}") from error
        width, height = pixels.size if isinstance(pixels, Image.Image) else pixels.shape[1::-1]
        self.left -= width * height
        return pixels


@lru_cache(maxsize=128)
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns * rows <= max_tiles, smallest area first."""
    sizes = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1) if c * r >= min_tiles]
    return tuple(sorted(sizes, key=lambda grid: (grid[0] * grid[1], grid)))


def grid_for(width: int, height: int, tiling: TilingConfig, max_tiles: int | None = None) -> tuple[int, int]:
    """The (columns, rows) whose shape is nearest to width / height.

    Of two grids equally near, the larger wins if the image has more than half of its pixels. Ratios are compared in
    float64, as the reference does, so that ties are the same ones. max_tiles replaces tiling.max_tiles.
    """
    if width < 1 or height < 1:
        raise InputError(f"an image of {width} x {height} pixels has no content")
    if not tiling.dynamic:
        return 1, 1
    most = tiling.max_tiles if max_tiles is None else max_tiles
    if not 1 <= most <= MAX_TILES:
        raise InputError(f"max_tiles must be in 1..{MAX_TILES:,}, got {most}")
    ratio, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in grids(min(tiling.min_tiles, most), most):
        distance = abs(ratio - columns / rows)
        large_enough = 2 * area > tiling.tile_size**2 * columns * rows
        if distance < best_distance or (distance == best_distance and large_enough):
            best, best_distance = (columns, rows), distance
    return best


def num_tiles(width: int, height: int, tiling: TilingConfig, max_tiles: int | None = None) -> int:
    """Tiles of an image, its thumbnail included."""
    columns, rows = grid_for(width, height, tiling, max_tiles)
    count = columns * rows
    return count + (tiling.thumbnail and count > 1)


def resize(image: Pixels, size: int, columns: int, rows: int, *, thumbnail: bool) -> np.ndarray:
    """Resize an image to a grid of tiles by Pillow's bicubic filter.

    Returns:
        uint8 RGB tiles [columns * rows (+ 1), size, size, 3], row by row, the thumbnail last.
    """
    rgb = image if isinstance(image, Image.Image) else Image.fromarray(image)
    whole = np.asarray(rgb.resize((columns * size, rows * size), Image.Resampling.BICUBIC))
    tiles_GSSC = whole.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if thumbnail:
        small = np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC))
        return np.concatenate([tiles_GSSC, small[None]])
    return tiles_GSSC.copy()  # a single tile is a view of Pillow's memory, which cannot be written


def tile_image(image: Pixels, tiling: TilingConfig, max_tiles: int | None = None, *, resize: Resizer = resize) -> torch.Tensor:
    """Cut an image into uint8 RGB tiles [G, size, size, 3].

    Args:
        max_tiles: replaces tiling.max_tiles.
        resize: the function that resizes; another one than Pillow's changes the speed, not the pixels.

    Returns:
        The tiles row by row, the thumbnail last.
    """
    if isinstance(image, Image.Image) and image.mode != "RGB":
        image = to_rgb(image)
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    columns, rows = grid_for(width, height, tiling, max_tiles)
    thumbnail = tiling.thumbnail and columns * rows > 1
    return torch.from_numpy(resize(image, tiling.tile_size, columns, rows, thumbnail=thumbnail))
