"""Every level that this machine has, or that IVL_CPU asks for, keeps the laws of the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ivl.cpu.kernels import features

HERE = Path(__file__).parents[1]
LAWS = ("cpu/test_kernels.py", "cpu/test_captured_step.py", "cpu/test_accelerate.py", "quant/test_layers.py")


def run(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "IVL_CPU": level}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("level", features.LEVELS[:-1])
def test_the_laws_hold_at_lower_levels(level: str) -> None:
    if features.LEVELS.index(level) >= features.LEVELS.index(features.level()):
        pytest.skip(f"the whole suite runs at {features.level()}")
    done = run(level, "-m", "pytest", "-q", "-p", "no:randomly", *(str(HERE / law) for law in LAWS))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "[100%]" in done.stdout and "." in done.stdout


@pytest.mark.parametrize(("wanted", "level", "kernels"), [("any", "any", "False"), ("", features.machine_level(), None)])
def test_the_environment_chooses_the_level(wanted: str, level: str, kernels: str | None) -> None:
    probe = "import torch; from ivl.cpu.kernels import features as f; print(f.level(), f.available())"
    done = run(wanted, "-c", probe)
    assert done.stdout.split() == [level, kernels or str(level != "any")]


@pytest.mark.parametrize("wanted", ["avx", "AVX2", "sse"])
def test_an_unknown_level_is_named(wanted: str) -> None:
    done = run(wanted, "-c", "import torch; from ivl.cpu.kernels import features as f; f.level()")
    assert f"IVL_CPU={wanted}: this machine has any" in done.stderr


def test_a_level_that_the_machine_lacks_is_refused() -> None:
    missing = [
        level
        for level in features.LEVELS
        if level not in features.LEVELS[: features.LEVELS.index(features.machine_level()) + 1]
    ]
    if not missing:
        pytest.skip("this machine has every level")
    done = run(missing[0], "-c", "import torch; from ivl.cpu.kernels import features as f; f.level()")
    assert done.returncode == 1 and f"IVL_CPU={missing[0]}: this machine has any" in done.stderr


def test_features_above_the_level_are_hidden_from_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "host_features", lambda: {"avx2": True, "avx512f": True, "amx-tile": True, "fma": True})
    monkeypatch.setattr(features, "level", lambda: "avx2")
    assert features.target_features() == "+avx2,-avx512f,-amx-tile,+fma"
    monkeypatch.setattr(features, "level", lambda: "avx512")
    assert features.target_features() == "+avx2,+avx512f,+amx-tile,+fma"
