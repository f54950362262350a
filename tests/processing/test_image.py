"""Tiling equals the rule; every kind of image arrives as RGB or is refused by name."""

from __future__ import annotations

import io
import random
import re
import struct
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ivl
from ivl.config import TilingConfig
from ivl.errors import InputError, MediaError
from ivl.processing.image import check_source, grid_for, grids, load_image, num_tiles, tile_image
from ivl.types import ImageRef, VideoRef
from ivl.utils import pictures
from ivl.utils.pictures import to_rgb
from tests.helpers import media


@cache
def candidates(most: int) -> list[tuple[int, int]]:
    found = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j == n}
    return sorted(found, key=lambda ij: ij[0] * ij[1])


def oracle(width: int, height: int, most: int, size: int = 448) -> tuple[int, int]:
    """The rule as the spec words it: scan by area, keep the nearest ratio, a tie goes to a larger grid if it is half filled."""
    nearest, gap = (0, 0), 1e9
    for i, j in candidates(most):
        difference = abs(width / height - i / j)
        if difference < gap:
            nearest, gap = (i, j), difference
        elif difference == gap and width * height > 0.5 * size * size * i * j:
            nearest = (i, j)
    return nearest


def test_grid_equals_brute_force():
    draw = random.Random(0)
    tiling = TilingConfig()
    for n in range(10_000):
        edge = 6000 if n % 2 else 900  # small ones tie more often
        width, height, most = draw.randint(1, edge), draw.randint(1, edge), draw.randint(1, 40)
        if n % 5 == 0:  # exact ratios, where ties happen
            height = max(1, width * draw.randint(1, 6) // draw.randint(1, 6))
        assert grid_for(width, height, tiling, most) == oracle(width, height, most), (width, height, most)


GOLDEN = [
    (448, 448, (1, 1), 1, (1, 1), 1), (336, 336, (1, 1), 1, (1, 1), 1), (634, 634, (2, 2), 5, (2, 2), 5),
    (1000, 1000, (2, 2), 5, (3, 3), 10), (800, 600, (3, 2), 7, (4, 3), 13), (1920, 1080, (2, 1), 3, (4, 2), 9),
    (1080, 1920, (1, 2), 3, (2, 4), 9), (896, 448, (2, 1), 3, (2, 1), 3), (2000, 1000, (2, 1), 3, (4, 2), 9),
    (4000, 500, (6, 1), 7, (8, 1), 9), (224, 1344, (1, 6), 7, (1, 6), 7), (633, 633, (1, 1), 1, (1, 1), 1),
]  # fmt: skip


@pytest.mark.parametrize(("width", "height", "grid6", "tiles6", "grid12", "tiles12"), GOLDEN)
def test_golden_table(width, height, grid6, tiles6, grid12, tiles12):
    tiling = TilingConfig()
    assert grid_for(width, height, tiling, 6) == grid6 and num_tiles(width, height, tiling, 6) == tiles6
    assert grid_for(width, height, tiling, 12) == grid12 and num_tiles(width, height, tiling) == tiles12


def test_number_of_grids():
    assert [len(grids(1, most)) for most in (6, 12, 24, 36)] == [14, 35, 84, 140]


def test_min_tiles_and_static():
    assert grid_for(100, 100, TilingConfig(min_tiles=4)) == (2, 2)
    assert grid_for(4000, 500, TilingConfig(dynamic=False)) == (1, 1)
    assert grid_for(4000, 500, TilingConfig(min_tiles=4), 1) == (1, 1)  # a budget of one tile is stronger
    with pytest.raises(InputError, match="0 x 5"):
        grid_for(0, 5, TilingConfig())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_tiles_are_crops_row_by_row_then_the_thumbnail():
    image = picture(90, 60)
    tiles = tile_image(image, TilingConfig(tile_size=28, max_tiles=6))
    assert tiles.dtype == torch.uint8 and tiles.shape == (7, 28, 28, 3)
    whole = image.resize((84, 56), Image.Resampling.BICUBIC)
    boxes = [(x, y, x + 28, y + 28) for y in (0, 28) for x in (0, 28, 56)]
    for tile, box in zip(tiles, boxes, strict=False):
        assert np.array_equal(tile.numpy(), np.asarray(whole.crop(box)))
    assert np.array_equal(tiles[-1].numpy(), np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC)))


def test_one_tile_has_no_thumbnail():
    assert len(tile_image(picture(28, 28), TilingConfig(tile_size=28))) == 1
    assert len(tile_image(picture(90, 60), TilingConfig(tile_size=28, max_tiles=6, thumbnail=False))) == 6


def test_extreme_shapes():
    for size in ((1, 1), (1, 3000), (3000, 1)):
        assert tile_image(picture(*size), TilingConfig(tile_size=28)).shape[1:] == (28, 28, 3)


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_modes():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    expected = np.asarray(grey.convert("RGB"))
    sixteen = Image.fromarray((np.arange(256, dtype=np.uint16) * 257)[None])
    for image in (grey, sixteen, sixteen.convert("I"), Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32)[None])):
        assert np.array_equal(np.asarray(load_image(ImageRef(image))), expected), image.mode
    assert np.array_equal(np.asarray(load_image(ImageRef(png(sixteen)))), expected)
    red = Image.new("RGB", (2, 2), "red")
    for mode in ("P", "CMYK", "RGBA", "YCbCr", "HSV", "RGBX"):
        assert np.abs(np.asarray(load_image(ImageRef(red.convert(mode)))).astype(int) - np.asarray(red)).max() <= 1, mode
    assert load_image(ImageRef(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert load_image(ImageRef(half)).getpixel((0, 0)) == (255, 127, 127)
    clear = Image.new("P", (1, 1))
    clear.info["transparency"] = 0
    assert load_image(ImageRef(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(ImageRef(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied():
    image = picture(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left: show it turned to the right
    upright = load_image(ImageRef(png(image, exif=exif)))
    assert upright.size == (4, 6)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


def test_bad_files_are_named(tmp_path: Path):
    whole = png(picture(64, 64))
    cases = {"cut.png": whole[: len(whole) // 2], "text.jpg": b"not an image", "empty.png": b"", "page.svg": b"<svg/>"}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            load_image(ImageRef(name), str(tmp_path))
    with pytest.raises(InputError, match=r"gone\.png"):
        load_image(ImageRef("gone.png"), str(tmp_path))
    with pytest.raises(InputError, match="Is a directory"):
        load_image(ImageRef("."), str(tmp_path))
    with pytest.raises(InputError, match="image of 3 bytes"):
        load_image(ImageRef(b"abc"))
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    with pytest.raises(InputError):
        load_image(ImageRef(bytes(damaged)))


def test_large_images_are_refused_before_decoding():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (19_000, 2_000_000_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        with pytest.raises(InputError):
            load_image(ImageRef(bomb))
    with pytest.raises(InputError, match="20 x 20 pixels, the limit is 399"):
        load_image(ImageRef(png(picture(20, 20))), max_pixels=399)
    assert load_image(ImageRef(png(picture(20, 20))), max_pixels=400).size == (20, 20)


def whole_to_rgb(image: Image.Image) -> Image.Image:
    """What `to_rgb` computes, without strips."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        low, high = min(0, values.min()), values.max()
        if low == 0:
            high = min([1] * (image.mode == "F") + [255, 1023, 4095, 16383, 65535], key=lambda most: (most < high, most))
        return Image.fromarray(((values - low) * (255 / (high - low))).round().astype(np.uint8)).convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@pytest.mark.parametrize("size", [(37, 29), (300, 2), (1, 97)])
def test_strips_have_the_pixels_of_the_whole(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    monkeypatch.setattr(pictures, "STRIP_PIXELS", 100)
    rng = np.random.default_rng(0)
    shape = size[::-1]
    noise = Image.fromarray(rng.integers(0, 256, (*shape, 4), dtype=np.uint8), "RGBA")
    wide = rng.integers(0, 65536, shape)
    indexed = noise.convert("RGB").quantize(16)
    indexed.info["transparency"] = 3
    gray = noise.convert("L")
    gray.info["transparency"] = 100
    late = np.zeros(shape, np.float32)
    late[-1, -1] = 200.0  # only the last strip shows that the values are not 0 to 1
    images = [noise, noise.convert("LA"), noise.convert("PA"), noise.convert("RGBa"), indexed, gray]
    images += [Image.fromarray(wide.astype(kind)) for kind in (np.uint16, ">u2", np.int32)]
    images += [Image.fromarray(values.astype(np.float32)) for values in (wide / 65535, wide / 257 - 9, late)]
    for image in images:
        rgb = to_rgb(image)
        assert rgb.mode == "RGB" and rgb.size == size
        assert np.array_equal(np.asarray(rgb), np.asarray(whole_to_rgb(image))), image.mode


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "F"])
def test_a_large_image_takes_little_memory_beside_its_pixels(mode: str) -> None:
    code = f"""
from PIL import Image
import numpy as np, resource
from ivl.utils.pictures import to_rgb
image = Image.new({mode!r}, (7000, 7000), 1)
to_rgb(image.resize((300, 300)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
to_rgb(image)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 260 << 10  # KiB: 196 MB are the result


def refused_refs() -> list[ImageRef | VideoRef]:
    image, closed = picture(40, 30), Image.open(io.BytesIO(png(picture(40, 30))))
    closed.close()
    wrong: list[Any] = [ImageRef(image, tiles) for tiles in (2.5, "x", 0, -1, True, 1001)] + [ImageRef(closed), ImageRef(5)]
    wrong += [VideoRef(b"GIF89a", frames) for frames in ("x", True, 0, 2.5, 1001)] + [VideoRef(image), VideoRef(None)]
    return wrong + [VideoRef(b"GIF89a", 2, clip) for clip in (5, (1,), (1, 2, 3), (2, 1), ("a", "b"), (0, float("nan")), "ab")]


@pytest.mark.parametrize("ref", refused_refs(), ids=lambda ref: re.sub(r" at 0x\w+", "", repr(ref)))
def test_wrong_references_are_input_errors(ref: ImageRef | VideoRef) -> None:
    words = "max_tiles|image" if isinstance(ref, ImageRef) else "num_frames|clip|a video must be a path or bytes"
    with pytest.raises(InputError, match=words):
        check_source(ref)
        load_image(ref)  # a closed image


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 2048, 4095], np.uint16, [0, 128, 255]),  # 12 bits, as X-rays have
        ([0, 512, 1000], np.uint16, [0, 128, 249]),
        ([0, 8192, 16383], np.uint16, [0, 128, 255]),
        ([0, 32768, 65535], np.uint16, [0, 128, 255]),
        ([0, 100, 255], np.uint16, [0, 100, 255]),
        ([0, 0, 0], np.uint16, [0, 0, 0]),
        ([0, 2048, 4095], np.int32, [0, 128, 255]),
        ([0, 100_000, 200_000], np.int32, [0, 128, 255]),
        ([-1024, 1024, 3072], np.int32, [0, 128, 255]),  # Hounsfield units
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.0, 128.0, 255.0], np.float32, [0, 128, 255]),
        ([0.0, 2048.0, 4095.0], np.float32, [0, 128, 255]),
        ([-1.0, 0.0, 1.0], np.float32, [0, 128, 255]),
        ([np.nan, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.5, 1.0, np.inf], np.float32, [128, 255, 255]),
    ],
)
def test_deep_gray_keeps_its_contrast(values, kind, expected):
    shown = np.asarray(load_image(ImageRef(Image.fromarray(np.array([values], kind)))))
    assert shown[0, :, 0].tolist() == expected and (shown[..., :1] == shown).all()


def test_deep_gray_of_files(tmp_path):
    scan = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(scan).save(tmp_path / name)
        shown = np.asarray(load_image(ImageRef(str(tmp_path / name))))
        assert (shown.min(), shown.max()) == (0, 255) and abs(shown.mean() - 127.5) < 1


FOREIGN = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n": "is a git-LFS pointer, .*; run 'git lfs pull'",
    b"<!DOCTYPE html><html><body>404</body></html>": "it is a web page, .*; download it again",
    b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>': "it is a web page, .*; download it again",
    b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "">': "it is a web page, .*; download it again",
    b"\0\0\0\x1cftypheic\0\0\0\0mif1heic": "it is AVIF or HEIF; save it as PNG or JPEG",
    b"\0\0\0\x1cftypavif\0\0\0\0mif1avif": "it is AVIF or HEIF; save it as PNG or JPEG",
    b"<svg xmlns='http://www.w3.org/2000/svg'></svg>": "it is SVG; save it as PNG or JPEG",
    b"%PDF-1.7\n": "it is PDF; save it as PNG or JPEG",
    b"\0\0\0\x1cftyphevx\0\0\0\0": "it is AVIF or HEIF; save it as PNG or JPEG",
    bytes(128) + b"DICM\2\0": "it is DICOM; save it as PNG or JPEG",
    b"II*\0\x10\0\0\0CR\2\0" + bytes(60): "it is the raw file of a camera; save it as PNG or JPEG",
    b"\0\0\0\x18ftypcrx \0\0\0\1crx isom": "it is the raw file of a camera; save it as PNG or JPEG",
    b"v/1\x01\2\0\0\0": "it is a picture of high dynamic range; save it as PNG or JPEG",
    b"\0\0\1\0\1\0": "it is an icon; save it as PNG or JPEG",
    b"\0\0\2\0\0\0\0\0": "unknown format",  # TGA
    b"PK\3\4\x14\0\6\0": "it is an archive, not the file itself; unpack it",
    b"/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgIC": "it is base64, not the file itself; decode it",
    b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41": "it is a video; name it .mp4",
    b"": "it is empty",
    b"some words": "unknown format",
}


@pytest.mark.parametrize("content", FOREIGN)
def test_what_is_no_image_is_named_with_its_remedy(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(MediaError, match=FOREIGN[content]) as caught:
        load_image(ImageRef("a.jpg"), str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path / "a.jpg"))
    with pytest.raises(InputError, match=FOREIGN[content]):
        ivl.ask("what?", tmp_path / "a.jpg")


def test_an_image_of_too_many_pixels_is_refused_in_our_words(tmp_path):
    (tmp_path / "a.png").write_bytes(media.png(20_000, 12_000))
    for call in (lambda: load_image(ImageRef(str(tmp_path / "a.png"))), lambda: ivl.ask("what?", tmp_path / "a.png")):
        with pytest.raises(InputError, match=r"a\.png: 240,000,000 pixels, the limit is 178,956,970; scale it down$"):
            call()


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_large_texts_and_profiles_of_a_png_are_not_unpacked(kind):
    body = b"name\0\0" + zlib.compress(bytes(70_000_000), 1)
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "PNG")
    data = stream.getvalue()
    assert load_image(ImageRef(data[:33] + media.chunk(kind, body) + data[33:])).getpixel((5, 5)) == (255, 0, 0)


def deep_png(colors: np.ndarray) -> bytes:
    """A PNG of 16 bits a color, which Pillow does not write."""
    height, width, channels = colors.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in colors)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def deep_tiff(colors: np.ndarray, order: str) -> bytes:
    """A TIFF of 16 bits a color, which Pillow does not write: width, height, three times 16 bits, RGB, one strip."""
    height, width, _ = colors.shape
    tags = (
        (256, width),
        (257, height),
        (258, 128),
        (259, 1),
        (262, 2),
        (273, 134),
        (277, 3),
        (278, height),
        (279, colors.size * 2),
    )
    lines = [struct.pack(f"{order}HHII", tag, 4 - (tag == 258), 1 + 2 * (tag == 258), value) for tag, value in tags]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags)) + b"".join(lines) + bytes(4)
    return head.ljust(128, b"\0") + struct.pack(f"{order}HHH", 16, 16, 16) + colors.astype(f"{order}u2").tobytes()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_scans_of_deep_colors_keep_their_contrast(bits, monkeypatch):
    monkeypatch.setattr(pictures, "STRIP_PIXELS", 100)
    most = 2**bits - 1
    colors = np.random.default_rng(0).integers(0, most + 1, (30, 40, 3))
    colors[0, 0] = [0, most, most // 2 + 1]
    shown = np.asarray(load_image(ImageRef(deep_png(colors)))).astype(int)
    assert abs(shown - colors * 255 / most).max() <= (1 if bits == 16 else 0.5)  # of 16 bits Pillow keeps the upper byte
    for order in "<>":
        assert (np.asarray(load_image(ImageRef(deep_tiff(colors, order)))) == shown).all()
    clear = np.concatenate([colors, np.full((30, 40, 1), 65535)], axis=2)
    assert (np.asarray(load_image(ImageRef(deep_png(clear)))) == shown).all()
