"""Kernels give Pillow's pixels; without them Pillow does the work, and nobody can tell."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ivl.config import TilingConfig
from ivl.cpu import accelerate, resize
from ivl.processing.chat import user
from ivl.processing.image import tile_image
from ivl.processing.processor import Processor
from ivl.types import ImageRef
from tests.helpers.mixtures import processor

kernels = pytest.mark.skipif(not resize.available(), reason="no kernels here")


def by_pillow(image_YXC: np.ndarray, size: int, columns: int, rows: int) -> np.ndarray:
    whole = Image.fromarray(image_YXC).resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    boxes = [(x * size, y * size, x * size + size, y * size + size) for y in range(rows) for x in range(columns)]
    return np.stack([np.asarray(whole.crop(box)) for box in boxes])


def picture(rng: np.random.Generator, width: int, height: int, kind: int) -> np.ndarray:
    """Noise, black and white blocks (which overshoot most), or a smooth picture."""
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == 1:
        return np.kron(rng.integers(0, 2, (-(-height // 3), -(-width // 5), 3), np.uint8) * 255, np.ones((3, 5, 1), np.uint8))[
            :height, :width
        ]
    return np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height)))


@kernels
def test_pixels_are_pillows():
    rng = np.random.default_rng(0)
    for n in range(300):
        width, height = np.exp(rng.uniform(np.log([resize.MIN_WIDTH, 1]), np.log([700, 700]))).astype(int).tolist()
        image_YXC = np.ascontiguousarray(picture(rng, width, height, n % 3))
        size, columns, rows = int(rng.integers(22, 70)), *rng.integers(1, 5, 2).tolist()
        assert resize.resizable(width, height, size)
        found = resize.tiles(image_YXC, size, columns, rows, thumbnail=n % 2 == 0)
        wanted = by_pillow(image_YXC, size, columns, rows)
        if n % 2 == 0:
            wanted = np.concatenate([wanted, by_pillow(image_YXC, size, 1, 1)])
        assert np.array_equal(found, wanted), (width, height, size, columns, rows)


@kernels
@pytest.mark.parametrize(
    ("width", "height"), [(448, 448), (1792, 1344), (3000, 40), (40, 3000), (6, 900), (900, 1), (1301, 977)]
)
def test_pixels_of_whole_tiles(width, height):
    image_YXC = picture(np.random.default_rng(width), width, height, 0)
    found = resize.tiles(image_YXC, 448, 2, 3, thumbnail=True)
    assert np.array_equal(found[:6], by_pillow(image_YXC, 448, 2, 3))
    assert np.array_equal(found[6:], by_pillow(image_YXC, 448, 1, 1))


@kernels
def test_rows_may_lie_apart():
    image_YXC = picture(np.random.default_rng(1), 99, 50, 0)[::2]
    assert np.array_equal(
        resize.tiles(image_YXC, 28, 2, 1, thumbnail=False), by_pillow(np.ascontiguousarray(image_YXC), 28, 2, 1)
    )


def test_what_kernels_do_not_take_goes_to_pillow():
    for width, height, size in ((1, 1, 28), (5, 5, 28), (40, 30, 14), (9000, 2, 28)):
        image_YXC = picture(np.random.default_rng(0), width, height, 0)
        assert not resize.resizable(width, height, size)
        one = tile_image(image_YXC, TilingConfig(tile_size=size, dynamic=False), resize=resize.fast_resize)
        assert np.array_equal(one.numpy(), by_pillow(image_YXC, size, 1, 1))


PROBE = """
import numpy as np, hashlib
from ivl.config import TilingConfig
from ivl.cpu import resize
from ivl.processing import image
pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
tiles = image.tile_image(pixels, TilingConfig(tile_size=96), resize=resize.fast_resize)
print(resize.available(), hashlib.sha256(tiles.numpy().tobytes()).hexdigest())
"""


def test_the_same_without_kernels():
    """IVL_CPU=any, and llvmlite not installed: Pillow's way, the same tiles."""
    hidden = "import sys; sys.modules['llvmlite'] = None\n"
    runs = [("", ""), ("", "any"), (hidden, "")]
    results = [
        subprocess.run(
            [sys.executable, "-c", start + PROBE],
            env={**os.environ, "IVL_CPU": level},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for start, level in runs
    ]
    assert [result[0] for result in results[1:]] == ["False"] * 2
    assert len({result[1] for result in results}) == 1


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_an_accelerated_processor_gives_the_same_samples_in_workers(start, tmp_path):
    Image.fromarray(picture(np.random.default_rng(0), 300, 200, 0)).save(tmp_path / "a.png")
    conversation = (user("Q", ImageRef(str(tmp_path / "a.png"))),)
    plain = processor().prompt(conversation)
    fast = accelerate(Processor(processor().config, processor().tokenizer))
    assert processor().resize is not resize.fast_resize and fast.resize is resize.fast_resize
    with ProcessPoolExecutor(1, multiprocessing.get_context(start)) as pool:
        there = pool.submit(fast.prompt, conversation).result()
    assert there.tiles_GSSC.equal(plain.tiles_GSSC) and there.tokens_T.equal(plain.tokens_T)
