"""A small image takes no more than its pixels: metadata that Pillow would unpack are never read."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from ivl.config import TilingConfig
from ivl.cpu.jpeg import FastLoader
from ivl.errors import InputError, MediaError
from ivl.processing.image import grid_for, load_image
from ivl.types import ImageRef
from tests.processing.test_image import picture

LOAD = """
import io, resource, sys
from pathlib import Path
from PIL import Image
from ivl.errors import InputError
from ivl.cpu.jpeg import FastLoader
from ivl.processing.image import load_image
from ivl.types import ImageRef
from ivl.utils.html import picture
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    for load in (load_image, FastLoader(), lambda ref: picture(ref.source)):
        for source in (path, Path(path).read_bytes()):
            try:
                load(ImageRef(source))
            except InputError as error:
                pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used >> 10)
"""


def bomb(num_tags: int, size: int, *, big: bool = False, first: bytes = b"") -> bytes:
    """A TIFF whose tags all name the same `size` bytes."""
    tags = first + b"".join(struct.pack("<HHII", 0x9000 + n % 4000, 1, size, 8) for n in range(num_tags))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", num_tags + len(first) // 12) + tags + b"\0" * (size + 8)


def jpeg_bytes(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def with_exif(data: bytes, exif: bytes) -> bytes:
    """A JPEG with a block in as many segments as it needs."""
    pieces = [exif[at : at + 65_000] for at in range(0, len(exif), 65_000)]
    segments = [b"\xff\xe1" + struct.pack(">H", len(piece) + 8) + b"Exif\0\0" + piece for piece in pieces]
    return data[:2] + b"".join(segments) + data[2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    out = io.BytesIO()
    picture(8, 6).save(out, "PNG")
    data = out.getvalue()
    return data[:33] + b"".join(chunks) + data[33:]


def test_metadata_that_unpack_to_gigabytes_are_not_read(tmp_path: Path) -> None:
    exif = bomb(4000, 1 << 20)
    webp = io.BytesIO()
    picture(8, 6).save(webp, "WEBP", exif=exif)
    hexed = b"\nexif\n     %d\n" % len(exif) + exif.hex().encode()
    text = zlib.compress(bytes(60 << 20))
    files = {
        "many.jpg": with_exif(jpeg_bytes(picture(8, 6)), exif),
        "exif.png": png_with(chunk(b"eXIf", exif)),
        "profile.png": png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(hexed))),
        "texts.png": png_with(*[chunk(b"zTXt", b"a\0\0" + text)] * 50, *[chunk(b"iCCP", b"a\0\0" + text)] * 2),
        "exif.webp": webp.getvalue(),
        "tags.tif": bomb(4000, 1 << 20),
        "sub.tif": bomb(4000, 1 << 20, first=struct.pack("<HHII", 0x8769, 4, 1, 8)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in files]
    done = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=True, timeout=100)
    assert int(done.stdout) < 80
    for name in ("many.jpg", "exif.png", "profile.png", "texts.png", "exif.webp"):
        assert load_image(ImageRef(str(tmp_path / name))).size == (8, 6)
    with pytest.raises(MediaError, match=r"tags\.tif: .*tags name more bytes than it has"):
        load_image(ImageRef(str(tmp_path / "tags.tif")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_right_wherever_it_stands(orientation: int) -> None:
    image = picture(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a picture" * 30
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    big_endian = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    hexed = b"\nexif\n     %d\n" % len(block) + block.hex().encode()
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp, zip=True)
    files = []
    for kind, options in [
        ("PNG", {"exif": exif}), ("PNG", {"pnginfo": info}), ("WEBP", {"exif": exif, "lossless": True}),
        ("TIFF", {"exif": exif}),
        ("TIFF", {"exif": exif, "compression": "tiff_lzw"}), ("JPEG", {"exif": exif}), ("JPEG", {"xmp": xmp.encode()}),
    ]:  # fmt: skip
        out = io.BytesIO()
        image.save(out, kind, **options)
        files.append(out.getvalue())
    files += [with_exif(jpeg_bytes(image), big_endian), with_exif(with_exif(jpeg_bytes(image), b"II*\0"), block)]
    plain = io.BytesIO()
    image.save(plain, "PNG")
    for kind, text in ((b"zTXt", b"\0" + zlib.compress(hexed)), (b"tEXt", hexed)):
        extra = chunk(kind, b"Raw profile type exif\0" + text)
        files += [
            plain.getvalue()[:33] + extra + plain.getvalue()[33:],
            plain.getvalue()[:-12] + extra + plain.getvalue()[-12:],
        ]
    for data in files:
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert expected.shape == ((6, 4, 3) if orientation > 4 else (4, 6, 3))
        for load in (load_image, FastLoader()):
            assert np.array_equal(np.asarray(load(ImageRef(data))), expected), data[:4]


def test_special_files_are_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.jpg").symlink_to("/dev/zero")
    for load in (load_image, FastLoader()):
        for name, kind in (("a.png", "a pipe"), ("b.jpg", "a device")):
            with pytest.raises(MediaError, match=f"{name}: is {kind}, not a regular file"):
                load(ImageRef(name), str(tmp_path))


@pytest.mark.parametrize("source", [None, 5, np.zeros((4, 4, 3), np.uint8), b"", "", [], object()])
def test_what_is_no_image_is_one_line(source: object) -> None:
    for load in (load_image, FastLoader()):
        with pytest.raises(InputError, match=r"an image must be a path, bytes or a PIL image, got|empty path or no bytes"):
            load(ImageRef(source))  # type: ignore[arg-type]


def test_so_many_tiles_that_counting_them_takes_long_are_refused() -> None:
    with pytest.raises(InputError, match=r"max_tiles must be in 1\.\.1,000, got 1000000"):
        grid_for(800, 600, TilingConfig(), 10**6)
    assert grid_for(800, 600, TilingConfig(), 1000)
