"""What is random follows from the generator; qualities are uniform; what is off draws nothing."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.processing.augment import CORRUPTIONS, Augmentation, compress_, corrupt
from ivl.processing.image import tile_image
from tests.helpers import mixtures as world

SMOOTH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)).resize((160, 120))


def test_qualities_are_uniform():
    drawn = Augmentation().qualities(26_000, random.Random(0))
    counts = np.bincount(drawn, minlength=101)[75:]
    assert min(drawn) == 75 and max(drawn) == 100 and len(counts) == 26
    assert ((counts - 1000) ** 2 / 1000).sum() < 52.6  # chi square of 25 degrees of freedom: 0.1 % lie above
    assert set(Augmentation(jpeg_quality=(30, 31)).qualities(100, random.Random(0))) == {30, 31}
    generator = random.Random(0)
    assert Augmentation(jpeg_quality=None).qualities(5, generator) == []
    assert Augmentation().drawn(generator) is None and generator.random() == random.Random(0).random(), "nothing was drawn"


def test_compressed_tiles_are_what_pillow_writes_and_reads():
    for n, size in enumerate((28, 32, 448)):
        for quality in (1, 50, 75, 90, 100):
            tiles_GSSC = torch.from_numpy(np.random.default_rng(n).integers(0, 256, (2, size, size, 3), np.uint8))
            before = tiles_GSSC.clone()
            compress_(tiles_GSSC, [quality, 100])
            for tile_SSC, wanted_SSC, q in zip(tiles_GSSC, before, (quality, 100), strict=True):
                file = io.BytesIO()
                Image.fromarray(wanted_SSC.numpy()).save(file, "JPEG", quality=q)
                assert np.array_equal(tile_SSC.numpy(), np.asarray(Image.open(file).convert("RGB"))), (size, q)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        compress_(tiles_GSSC, [75])


def test_corruptions():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)).resize((640, 480))
    clean = np.asarray(picture, np.float64)
    for kind in CORRUPTIONS:
        assert corrupt(picture, kind, 0.0, 1) is picture
        errors = []
        for strength in (0.2, 1.0):
            found, again = (np.asarray(corrupt(picture, kind, strength, 3), np.float64) for _ in range(2))
            assert found.shape == clean.shape and np.array_equal(found, again)
            errors.append(np.abs(found - clean).mean())
        assert 0 < errors[0] < errors[1] < 64, kind


def test_corruptions_are_drawn():
    augment = Augmentation(corruptions=("blur", "noise"), corruption_share=0.5, corruption_strength=0.3)
    generator = random.Random(0)
    drawn = [augment.drawn(generator) for _ in range(2000)]
    happened = [what for what in drawn if what]
    assert 900 < len(happened) < 1100
    assert {kind for kind, _, _ in happened} == {"blur", "noise"}
    assert 0.25 < max(strength for _, strength, _ in happened) <= 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jpeg_quality": (0, 50)}, "got 0 and 50"), ({"jpeg_quality": (90, 80)}, "got 90 and 80"),
        ({"corruptions": ("rain",)}, "got 'rain'"), ({"corruption_share": 1.5}, "got 1.5"),
        ({"corruption_strength": -1}, "got -1"),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


@pytest.fixture
def mixture(tmp_path):
    """Pictures twice, once to be augmented, and a video that wrongly is."""
    rows = []
    for n in range(6):
        SMOOTH.rotate(15 * n).resize((60 + 9 * n, 50)).save(tmp_path / f"{n}.png")
        rows.append({"id": str(n), "image": f"{n}.png", "conversations": world.turns("<image>\nwhat is this", "a red circle")})
    (tmp_path / "frames").mkdir()
    for n in range(4):
        SMOOTH.rotate(n).save(tmp_path / "frames" / f"{n}.png")
    film = [{"id": "v", "video": "frames/", "conversations": world.turns("<video>\nwhat is this", "a red circle")}]
    for name, lines in (("rows", rows), ("film", film)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sets = {"damaged": ("rows", True), "clean": ("rows", False), "film": ("film", True)}
    meta = {
        name: {"annotation": f"{tmp_path}/{file}.jsonl", "root": str(tmp_path), "data_augment": on}
        for name, (file, on) in sets.items()
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path / "meta.json"


def tiles(mixture, workers: int, **augmentation) -> dict[tuple[int, str, str], np.ndarray]:
    """By time seen, data set and id."""
    config = DataConfig(
        mixture=str(mixture), num_workers=workers, epochs=2, max_samples=1, min_frames=4, max_frames=4,
        augmentation=Augmentation(**augmentation),
    )  # fmt: skip
    found: dict[tuple[int, str, str], np.ndarray] = {}
    for batch in Loader(config, world.processor(), seed=3):
        name = (batch.datasets[0], batch.ids[0])
        found[(0, *name) if (0, *name) not in found else (1, *name)] = batch.tiles_GSSC.numpy().copy()
    return found


def test_the_same_for_any_number_of_workers(mixture):
    options = {"corruptions": CORRUPTIONS, "corruption_share": 0.5}
    alone = tiles(mixture, 0, **options)
    assert len(alone) == 2 * (6 + 6 + 1)
    for workers in (1, 3):
        found = tiles(mixture, workers, **options)
        assert found.keys() == alone.keys() and all(np.array_equal(found[key], alone[key]) for key in alone)


def test_only_where_asked_for(mixture):
    found, processor = tiles(mixture, 0), world.processor()
    for n in range(6):
        one = tile_image(Image.open(mixture.parent / f"{n}.png"), processor.tiling).numpy()
        for epoch in (0, 1):
            assert np.array_equal(found[epoch, "clean", str(n)], one)
            assert not np.array_equal(found[epoch, "damaged", str(n)], one)
        assert not np.array_equal(found[0, "damaged", str(n)], found[1, "damaged", str(n)]), "anew in every epoch"
    frames = [tile_image(Image.open(mixture.parent / "frames" / f"{n}.png"), processor.tiling, 1)[0].numpy() for n in range(4)]
    assert np.array_equal(found[0, "film", "v"], np.stack(frames)), "video frames are never touched"
