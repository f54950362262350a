"""An image becomes tiles (spec 2.1): resize to the grid nearest in shape, cut it, and add the whole as a thumbnail."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ivl.config import TilingConfig
from ivl.cpu import resize
from ivl.errors import InputError
from ivl.types import ImageRef

MAX_PIXELS = 178_956_970
"""Largest image that is decoded, in pixels (512 MiB of RGB); a header announcing more is refused before decoding."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""What may be opened; the decoders of other formats are never started."""
KEPT_BYTES = 64 << 20
"""Largest image whose memory is kept for the next one."""
_memory = threading.local()
ORIENTATION = 0x0112
"""The EXIF tag that says how an image was held."""
TURNED = (b"Exif\0\0", b"Orientation")
"""One of these is in a JPEG file that says so."""


def load_image(ref: ImageRef, root: str = "", *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as RGB, upright.

    A relative path starts at root. Decisions: EXIF orientation is applied, since users ask about the picture as they see it
    (the reference ignores the tag); transparency is laid over white (the reference shows what lies hidden under it); integer
    grey is taken as 16 bit and scaled to 8, float grey as 0 to 1 if it stays within, else as 0 to 255; of an animation the
    first frame counts.

    Raises:
        InputError: naming the file, if it is missing, of another format, truncated, or larger than max_pixels.
    """
    if isinstance(ref.source, Image.Image):
        name, image = "the given image", ref.source
        _check_size(image, name, max_pixels)
        return _upright_rgb(image, name)
    if isinstance(ref.source, bytes):
        name, stream = f"image of {len(ref.source)} bytes", io.BytesIO(ref.source)
    else:
        path = Path(root) / ref.source
        name = str(path)
        try:
            stream = path.open("rb")
        except OSError as error:
            raise InputError(f"{name}: cannot read the image ({error.strerror})") from error
    with stream:
        return _decode(stream, name, max_pixels, quote=isinstance(ref.source, str))


def load_pixels(ref: ImageRef, root: str = "", *, max_pixels: int = MAX_PIXELS, reuse: bool = False) -> np.ndarray:
    """`load_image` as uint8 RGB [height, width, 3]: the same pixels and errors. A usual JPEG is decoded by simplejpeg if that
    is installed: the same library as Pillow's, without two copies on the way. With `reuse` the pixels may lie in memory that
    the next such call of this thread overwrites; fresh memory costs a quarter of the decoding."""
    pixels_YXC = None if isinstance(ref.source, Image.Image) else _usual_jpeg(ref.source, root, max_pixels, reuse)
    return np.asarray(load_image(ref, root, max_pixels=max_pixels)) if pixels_YXC is None else pixels_YXC


def _usual_jpeg(source: str | bytes, root: str, max_pixels: int, reuse: bool) -> np.ndarray | None:
    """Pixels of a colour JPEG without damage that is upright; None for anything else, which takes the usual way."""
    if not (decoder := _jpeg_decoder()):
        return None
    header, decode = decoder
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else (Path(root) / source).open("rb") as stream:
            if stream.read(3) != b"\xff\xd8\xff":
                return None
            stream.seek(0)
            data = stream.read()
        height, width, colours, _ = header(data)
        if colours not in ("YCbCr", "RGB") or width * height > max_pixels:
            return None
        # A tag or an XMP property may say that it is to be turned; looking for either costs less than parsing.
        if any(mark in data for mark in TURNED) and _open(io.BytesIO(data), ("JPEG",)).getexif().get(ORIENTATION, 1) != 1:
            return None
        memory = _kept_memory(3 * width * height) if reuse else None
        return decode(data, "RGB", buffer=memory)  # strict: what the library warns of is a ValueError
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _kept_memory(num_bytes: int) -> np.ndarray | None:
    """This thread's memory for pixels, grown as needed; None for more than is worth keeping."""
    if num_bytes > KEPT_BYTES:
        return None
    if len(getattr(_memory, "pixels", ())) < num_bytes:
        _memory.pixels = np.empty(num_bytes, np.uint8)
    return _memory.pixels


@cache
def _jpeg_decoder() -> tuple[Callable[..., tuple], Callable[..., np.ndarray]] | None:
    """simplejpeg's readers of headers and of pixels, if it is installed and its library gives Pillow's pixels."""
    try:
        from simplejpeg import decode_jpeg, decode_jpeg_header
    except ImportError:
        return None
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8))
    for subsampling in (0, 1, 2):
        buffer = io.BytesIO()
        noise.save(buffer, "JPEG", subsampling=subsampling)
        if not np.array_equal(decode_jpeg(buffer.getvalue(), "RGB"), np.asarray(Image.open(buffer))):
            return None
    return decode_jpeg_header, decode_jpeg


def _decode(stream, name: str, max_pixels: int, *, quote: bool) -> Image.Image:
    """quote: the library's words may be shown. Not for bytes, which come from anywhere: nothing of them goes back there."""
    try:
        image = _open(stream, FORMATS)
        _check_size(image, name, max_pixels)
        return _upright_rgb(image, name)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise whatever their parsing meets
        # Pillow's own words would print an object with its address.
        words = f"{type(error).__name__}: {error}" if quote else "damaged or cut short"
        why = "unknown format" if isinstance(error, UnidentifiedImageError) else words
        raise InputError(f"{name}: not a readable image ({why})") from error


def _open(stream, formats: tuple[str, ...]) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked instead
        return Image.open(stream, formats=formats)


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise InputError(f"{name}: {image.width} x {image.height} pixels, the limit is {max_pixels:,}; scale it down")


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":  # PIL's own conversion clips at 255 instead of scaling
        values = np.asarray(image, dtype=np.float64)
        unit = image.mode == "F" and values.size and values.min() >= 0 and values.max() <= 1
        scale = 255 if unit else 1 if image.mode == "F" else 1 / 257
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@lru_cache(maxsize=128)
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns * rows <= max_tiles, smallest area first."""
    found = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1) if c * r >= min_tiles]
    return tuple(sorted(found, key=lambda grid: (grid[0] * grid[1], grid)))


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
    if most < 1:
        raise InputError(f"max_tiles must be >= 1, got {most}")
    ratio, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in grids(min(tiling.min_tiles, most), most):
        distance = abs(ratio - columns / rows)
        enough = 2 * area > tiling.tile_size**2 * columns * rows
        if distance < best_distance or (distance == best_distance and enough):
            best, best_distance = (columns, rows), distance
    return best


def num_tiles(width: int, height: int, tiling: TilingConfig, max_tiles: int | None = None) -> int:
    """Tiles of an image, its thumbnail included."""
    columns, rows = grid_for(width, height, tiling, max_tiles)
    count = columns * rows
    return count + (tiling.thumbnail and count > 1)


def tile_image(image: Image.Image | np.ndarray, tiling: TilingConfig, max_tiles: int | None = None) -> torch.Tensor:
    """uint8 RGB tiles [G, size, size, 3], row by row, the thumbnail last, of an image or of uint8 RGB [height, width, 3].
    Pixels are those of Pillow's bicubic resize."""
    if isinstance(image, Image.Image) and image.mode != "RGB":
        image = to_rgb(image)
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    size = tiling.tile_size
    columns, rows = grid_for(width, height, tiling, max_tiles)
    thumbnail = tiling.thumbnail and columns * rows > 1
    if resize.resizable(width, height, size):
        return torch.from_numpy(resize.tiles(np.asarray(image), size, columns, rows, thumbnail=thumbnail))
    rgb = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    whole = _resized(rgb, columns * size, rows * size)
    tiles_GSSC = whole.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if thumbnail:
        tiles_GSSC = np.concatenate([tiles_GSSC, _resized(rgb, size, size)[None]])
    return torch.from_numpy(np.ascontiguousarray(tiles_GSSC))


def _resized(rgb: Image.Image, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3], bicubic; a fresh array."""
    return np.array(rgb.resize((width, height), Image.Resampling.BICUBIC))
