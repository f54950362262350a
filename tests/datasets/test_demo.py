"""The documentation's files are whole, the same at every call, and never replace somebody's own."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivl.cli import main
from ivl.data.config import DataConfig
from ivl.data.mixture import load_mixture
from ivl.datasets.demo import NUM_FRAMES, ROWS, write_demo
from ivl.datasets.inspect import inspect
from ivl.datasets.stats import DatasetStats
from ivl.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("demo")
    write_demo(place)
    return place


@pytest.mark.parametrize(
    ("name", "rows"), [("train.jsonl", 400), ("val.jsonl", 100), ("val.parquet", 100), ("pairs.jsonl", 24)]
)
def test_rows_are_sound(folder: Path, name: str, rows: int) -> None:
    (found,) = [
        each for each in inspect(DataConfig(mixture=str(folder / "data" / name)), None) if isinstance(each, DatasetStats)
    ]
    assert (found.rows, found.bad, found.images) == (rows, 0, rows)


def test_answers_are_those_of_the_pictures(folder: Path) -> None:
    """Shapes are the connected areas that differ from the background: each lies in a quarter of its own."""
    counted = Counter()
    for line in (folder / "data/val.jsonl").read_text().splitlines():
        row = json.loads(line)
        pixels = np.asarray(Image.open(folder / "data" / row["image"]), dtype=int)
        light = np.median(pixels.reshape(-1, 3), axis=0)
        drawn = np.abs(pixels - light).max(2) > 60
        shapes = sum(bool(drawn[y : y + 32, x : x + 32].sum() > 40) for y in (0, 32) for x in (0, 32))
        assert row["conversations"][1]["value"] == str(shapes), row
        counted[shapes] += 1
    assert counted == {1: 25, 2: 25, 3: 25, 4: 25}


def test_same_at_every_call_and_own_files_stay(folder: Path, tmp_path: Path) -> None:
    write_demo(tmp_path)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".parquet")
    assert len(names) == 2 + NUM_FRAMES + sum(ROWS.values()) + 4
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names)
    (tmp_path / "data/train.jsonl").write_text("mine\n")
    (tmp_path / "picture.png").unlink()
    with pytest.raises(InputError, match=r"data/train.jsonl: exists and is another file"):
        write_demo(tmp_path)
    assert (tmp_path / "data/train.jsonl").read_text() == "mine\n" and not (tmp_path / "picture.png").exists()
    (tmp_path / "data/train.jsonl").write_bytes((folder / "data/train.jsonl").read_bytes())
    (tmp_path / "picture.png").symlink_to("elsewhere.png")
    with pytest.raises(InputError, match=r"picture.png: exists and is another file"):
        write_demo(tmp_path)
    assert not (tmp_path / "elsewhere.png").exists()
    (tmp_path / "picture.png").unlink()
    os.mkfifo(tmp_path / "picture.png")
    with pytest.raises(InputError, match=r"picture.png: exists and is another file"):
        write_demo(tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ivl", "demo-data", str(tmp_path)])
    main()
    out = capsys.readouterr().out
    assert f"{tmp_path}/data/questions.jsonl" in out and "next: ivl data validate" in out
    assert load_mixture(str(tmp_path / "data/train.jsonl"))
