"""Every level that this machine has, or that IVL_CPU asks for, keeps the laws of the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ivl.cpu.kernels import features
from ivl.errors import InputError

HERE = Path(__file__).parents[1]
LAWS = ("cpu/test_kernels.py", "cpu/test_captured_step.py", "cpu/test_accelerate.py", "quant/test_layers.py")


@pytest.mark.parametrize("level", features.LEVELS[:-1])
def test_the_laws_hold_at_lower_levels(level: str) -> None:
    if features.LEVELS.index(level) >= features.LEVELS.index(features.level()):
        pytest.skip(f"the whole suite runs at {features.level()}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", *(str(HERE / law) for law in LAWS)],
        env={**os.environ, "IVL_CPU": level}, cwd=HERE.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "[100%]" in done.stdout and "." in done.stdout


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Set IVL_CPU as for a new process."""

    def ask(wanted: str) -> None:
        monkeypatch.setenv("IVL_CPU", wanted)
        features.level.cache_clear()

    yield ask
    features.level.cache_clear()


@pytest.mark.parametrize(("wanted", "level"), [("any", "any"), ("", features.machine_level())])
def test_the_environment_chooses_the_level(asked: Callable[[str], None], wanted: str, level: str) -> None:
    asked(wanted)
    assert (features.level(), features.at_least("avx2")) == (level, level != "any")


@pytest.mark.parametrize("wanted", ["avx", "AVX2", "sse"])
def test_an_unknown_level_is_named(asked: Callable[[str], None], wanted: str) -> None:
    asked(wanted)
    with pytest.raises(InputError, match=f"IVL_CPU={wanted}: this machine has any"):
        features.level()


def test_a_level_that_the_machine_lacks_is_refused(asked: Callable[[str], None]) -> None:
    missing = features.LEVELS[features.LEVELS.index(features.machine_level()) + 1 :]
    if not missing:
        pytest.skip("this machine has every level")
    asked(missing[0])
    with pytest.raises(InputError, match=f"IVL_CPU={missing[0]}: this machine has any"):
        features.level()


def test_features_above_the_level_are_hidden_from_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "host_features", lambda: {"avx2": True, "avx512f": True, "amx-tile": True, "fma": True})
    monkeypatch.setattr(features, "level", lambda: "avx2")
    assert features.target_features() == "+avx2,-avx512f,-amx-tile,+fma"
    monkeypatch.setattr(features, "level", lambda: "avx512")
    assert features.target_features() == "+avx2,+avx512f,+amx-tile,+fma"
