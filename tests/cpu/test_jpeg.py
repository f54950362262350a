"""The fast loader gives Pillow's pixels and errors."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivl.config import TilingConfig
from ivl.cpu.jpeg import FastLoader
from ivl.errors import InputError
from ivl.processing.image import load_image, tile_image
from ivl.types import ImageRef
from tests.processing.test_image import picture, png


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_pixels_are_those_of_the_image(tmp_path: Path):
    """The loader, whoever decodes, gives what load_image gives: usual JPEG, unusual ones, other formats, and errors."""
    noise, exif, kept = picture(47, 33), Image.Exif(), FastLoader()
    exif[0x0112] = 6
    whole = jpeg(noise, quality=90)
    files = {
        "444": jpeg(noise, subsampling=0), "420": whole, "progressive": jpeg(noise, progressive=True),
        "grey": jpeg(noise.convert("L")),
        "cmyk": jpeg(noise.convert("CMYK")), "turned": jpeg(noise, exif=exif), "png": png(noise), "tail": whole + b"tail",
        "xmp": jpeg(noise, xmp=b"<rdf:Description tiff:Orientation=\"3\"/>"), "upright": jpeg(noise, exif=Image.Exif()),
    }  # fmt: skip
    for name, data in files.items():
        wanted = np.asarray(load_image(ImageRef(data)))
        (tmp_path / name).write_bytes(data)
        for ref in (ImageRef(data), ImageRef(name)):
            for load in (FastLoader(), kept, pickle.loads(pickle.dumps(kept))):
                assert np.array_equal(load(ref, str(tmp_path)), wanted), name
    assert np.array_equal(kept(ImageRef(noise)), np.asarray(noise))
    for name, data in {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "head.jpg": whole[:3]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            kept(ImageRef(name), str(tmp_path))
    with pytest.raises(InputError, match=r"gone\.jpg"):
        kept(ImageRef("gone.jpg"), str(tmp_path))
    with pytest.raises(InputError, match="47 x 33 pixels, the limit is 1,550"):
        kept(ImageRef(whole), max_pixels=1550)
    assert tile_image(kept(ImageRef(whole)), TilingConfig()).equal(tile_image(load_image(ImageRef(whole)), TilingConfig()))
