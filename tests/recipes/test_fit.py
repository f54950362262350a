"""Rows that fit the memory at hand: the longest that do, and a plain word where none does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ivl.checkpoint.config_json import to_json
from ivl.config import published_config
from ivl.recipes import fit as fitting
from ivl.recipes.fit import GIB, fit, memory_at_hand
from ivl.recipes.published import RECIPES
from ivl.runs.config import RunConfig
from ivl.utils.files import write_json


@pytest.fixture
def large(tmp_path: Path) -> RunConfig:
    """Fine-tuning of the 1B."""
    config = published_config("1B")
    write_json(tmp_path / "config.json", to_json(config, "internvl_chat", "bfloat16"))
    return replace(RECIPES["1B-finetune"](), model=str(tmp_path), architecture=None)


def at_hand(gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "memory_at_hand", lambda: (gib * GIB + fitting.BESIDE, "this machine"))


def test_rows_are_made_shorter_until_they_fit(large: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = large
    at_hand(1000, monkeypatch)
    assert fit(config)[0] is config
    peaks = {8192: 40.0, 4096: 30.0, 2048: 25.0}
    asked: list[int] = []

    class Plan:
        def __init__(self, run: RunConfig) -> None:
            asked.append(run.data.max_tokens)
            self.peak = peaks.get(run.data.max_tokens, 22.0) * GIB

    monkeypatch.setattr(fitting, "plan_ranks", lambda run, _: Plan(run))
    at_hand(41, monkeypatch)
    same, said = fit(config)
    assert (
        said == "rows of at most 8,192 tokens take 40.0 of the 41.0 GiB of this machine" and same is config and asked == [8192]
    )
    at_hand(26, monkeypatch)
    smaller, said = fit(config)
    assert (smaller.data.max_tokens, smaller.data.max_tiles, smaller.data.max_tiles_per_image) == (2048, 9, 6)
    assert said.startswith("rows of at most 2,048 tokens and pictures of 6 tiles take 25.0 of the 26.0 GiB")
    assert "(published: 40.0)" in said
    at_hand(10, monkeypatch)
    same, said = fit(config)
    assert same is config and said.startswith("DOES NOT FIT: 22.0 GiB for the shortest rows, this machine has 10.0")
    assert asked[-1] == 512
    asked.clear()
    same, said = fit(config, keep=True)
    assert same is config and said.startswith("DOES NOT FIT: 40.0 GiB for rows of at most 8,192 tokens, this machine has 10.0")
    assert "a smaller --data.max-tokens" in said and asked == [8192]


def test_the_real_plan_shrinks_with_the_rows(large: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    at_hand(24, monkeypatch)
    smaller, said = fit(large)
    assert smaller.data.max_tokens < 8192 or " take " in said


def test_memory_is_measured() -> None:
    size, place = memory_at_hand()
    assert 2**28 < size < 2**45 and place in ("the card", "this machine")
