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


def report_of(out: Path, *command: str) -> tuple[int, list[dict[str, Any]]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    rows = json.loads(out.read_text())["rows"]
    assert len(out.with_suffix(".txt").read_text().splitlines()) == len(rows), done.stderr[-2000:]
    return done.returncode, rows


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> str:
    if shutil.which("g++") is None:
        pytest.skip("the pretended card is compiled by g++, which is not here")
    cache = getattr(pytestconfig, "cache", None)
    return str(pretend.build(cache.mkdir("pretend") if cache else tmp_path_factory.mktemp("card")))


def test_without_a_card_every_section_says_so(tmp_path: Path) -> None:
    code, rows = report_of(tmp_path / "gpu.json", "benchmarks.gpu", "--size", "tiny", "--out", str(tmp_path / "gpu.json"))
    assert code == 0 and len(rows) == 12
    assert {(row["name"], row["value"]) for row in rows} == {("left out", "this machine has no card")}


def test_a_pretended_card_is_compared_with_the_cpu(tmp_path: Path, library: str) -> None:
    code, rows = report_of(tmp_path / "gpu.json", "tests.helpers.card_check", library, str(tmp_path / "gpu.json"))
    assert code == 0 and not [row for row in rows if row["good"] is False], rows
    left_out = {row["section"] for row in rows if row["name"] == "left out"}
    assert left_out == {*REAL, "cards"}
    assert {row["section"] for row in rows if row["good"]} == {"correctness", "attention", "products", "graphs", "serving plan"}


def test_what_is_timed_on_a_real_card_runs(tmp_path: Path, library: str) -> None:
    _, rows = report_of(tmp_path / "gpu.json", "tests.helpers.card_check", library, str(tmp_path / "gpu.json"), "timed")
    assert not [row for row in rows if row["name"] == "failed"], rows
    assert {row["section"] for row in rows} == set(TIMED)
    assert [row["value"] for row in rows if row["name"] == "left out"] == ["it needs several cards, and this machine has one"]
