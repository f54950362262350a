"""JPEG files as pixels, without the two copies that Pillow makes on the way."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ivl.processing.image import check_source, load_image
from ivl.types import ImageRef
from ivl.utils.budgets import MAX_FILE_BYTES, MAX_PIXELS
from ivl.utils.files import regular
from ivl.utils.pictures import open_image

KEPT_BYTES = 64 << 20
"""Pixels of a larger image get memory of their own."""
ORIENTATION_MARKS = (b"Exif\0\0", b"Orientation")
"""A JPEG file that states an orientation, in EXIF or XMP, contains one of these."""


class FastLoader:
    """Opens images as uint8 RGB [height, width, 3], with the pixels and errors of `load_image`.

    An ordinary JPEG is decoded by simplejpeg if that is installed, which uses the same library as Pillow. The pixels may lie
    in memory that the next call by the same thread overwrites: fresh memory costs a quarter of the decoding, since the system
    clears each page when it is first touched.
    """

    def __init__(self) -> None:
        self._kept = threading.local()

    def __reduce__(self) -> tuple[type[FastLoader], tuple[()]]:
        return FastLoader, ()  # a worker process starts with no memory

    def __call__(self, ref: ImageRef, root: str = "", *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        check_source(ref)
        pixels_YXC = None if isinstance(ref.source, Image.Image) else self._decode(ref.source, root, max_pixels)
        return np.asarray(load_image(ref, root, max_pixels=max_pixels)) if pixels_YXC is None else pixels_YXC

    def _decode(self, source: str | bytes, root: str, max_pixels: int) -> np.ndarray | None:
        """Pixels of an undamaged, upright color JPEG; None for any other image, which Pillow opens."""
        if not (decoder := _decoder()):
            return None
        read_header, decode = decoder
        try:
            if not isinstance(source, bytes) and regular(Path(root) / source).st_size > MAX_FILE_BYTES:
                return None
            with io.BytesIO(source) if isinstance(source, bytes) else (Path(root) / source).open("rb") as stream:
                if stream.read(3) != b"\xff\xd8\xff":
                    return None
                stream.seek(0)
                data = stream.read()
            height, width, color_space, _ = read_header(data)
            if color_space not in ("YCbCr", "RGB") or width * height > max_pixels:
                return None
            # Searching for the marks of an orientation costs less than parsing for one.
            marked = any(mark in data for mark in ORIENTATION_MARKS)
            if marked and open_image(io.BytesIO(data), ("JPEG",))[1] != 1:
                return None
            return decode(data, "RGB", buffer=self._memory(3 * width * height))  # strict: its warnings are ValueErrors
        except (OSError, ValueError, IndexError, SyntaxError, Image.DecompressionBombError):
            return None

    def _memory(self, num_bytes: int) -> np.ndarray | None:
        if num_bytes > KEPT_BYTES:
            return None
        if len(getattr(self._kept, "memory", ())) < num_bytes:
            self._kept.memory = np.empty(num_bytes, np.uint8)
        return self._kept.memory


@cache
def _decoder() -> tuple[Callable[..., Any], Callable[..., np.ndarray]] | None:
    """simplejpeg's readers of headers and of pixels, if it is installed and gives Pillow's pixels."""
    try:
        from simplejpeg import decode_jpeg, decode_jpeg_header
    except ImportError:
        return None
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8))
    for subsampling in (0, 1, 2):
        file = io.BytesIO()
        noise.save(file, "JPEG", subsampling=subsampling)
        if not np.array_equal(decode_jpeg(file.getvalue(), "RGB"), np.asarray(Image.open(file))):
            return None
    return decode_jpeg_header, decode_jpeg
