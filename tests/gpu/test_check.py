"""`make gpu-check` runs to its end on any machine, and says what it left out and why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import pretend
from tests.helpers.card_check import TIMED

ROOT = Path(__file__).parent.parent.parent
REAL = ("limits", "inference", "training", "transformers", "compile")


def run(folder: Path, *command: str) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert (folder / "gpu.json").exists(), done.stderr[-2000:]
    return done.returncode


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows = json.loads(out.read_text())["rows"]
    assert len(out.with_suffix(".txt").read_text().splitlines()) == len(rows)
    return rows


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> tuple[int, Path]:
    """Exit code and folder of both reports on the pretended card."""
    if shutil.which("g++") is None:
        pytest.skip("the pretended card is compiled by g++, which is not here")
    cache, folder = getattr(pytestconfig, "cache", None), tmp_path_factory.mktemp("reports")
    library = pretend.build(cache.mkdir("pretend") if cache else tmp_path_factory.mktemp("card"))
    return run(folder, "tests.helpers.card_check", str(library), str(folder)), folder


def test_without_a_card_every_section_says_so(tmp_path: Path) -> None:
    assert run(tmp_path, "benchmarks.gpu", "--size", "tiny", "--out", str(tmp_path / "gpu.json")) == 0
    rows = rows_of(tmp_path / "gpu.json")
    assert len(rows) == 12
    assert {(row["name"], row["value"]) for row in rows} == {("left out", "this machine has no card")}


def test_a_pretended_card_is_compared_with_the_cpu(found: tuple[int, Path]) -> None:
    code, folder = found
    rows = rows_of(folder / "gpu.json")
    assert code == 0 and not [row for row in rows if row["good"] is False], rows
    left_out = {row["section"] for row in rows if row["name"] == "left out"}
    assert left_out == {*REAL, "cards"}
    assert {row["section"] for row in rows if row["good"]} == {"correctness", "attention", "products", "graphs", "serving plan"}


def test_what_is_timed_on_a_real_card_runs(found: tuple[int, Path]) -> None:
    rows = rows_of(found[1] / "timed.json")
    assert not [row for row in rows if row["name"] == "failed"], rows
    assert {row["section"] for row in rows} == set(TIMED)
    assert [row["value"] for row in rows if row["name"] == "left out"] == ["it needs several cards, and this machine has one"]
