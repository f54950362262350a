"""Objectives are named by import path; the settings must be the objective's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivl.errors import InputError
from ivl.preference.config import PreferenceConfig
from ivl.preference.objective import PreferenceObjective
from ivl.runs.build import build_objective
from ivl.train.config import ObjectiveConfig
from ivl.train.objectives import ObjectiveContext, next_token
from ivl.train.world import World


@pytest.fixture
def context(tmp_path: Path) -> ObjectiveContext:
    def start_model():
        raise AssertionError("nobody needs the start")

    return ObjectiveContext(
        world=World(),
        directory=tmp_path,
        precision="fp32",
        packs_per_rank=2,
        resumed=False,
        loaders={},
        start_model=start_model,
    )


def test_a_path_opens_a_module_or_a_file(tmp_path: Path, context: ObjectiveContext) -> None:
    assert build_objective(ObjectiveConfig(), context) is next_token
    (tmp_path / "own.py").write_text("def loss(model, batch):\n    return 'own'\n")
    own = build_objective(ObjectiveConfig(path=f"{tmp_path}/own.py:loss"), context)
    assert own(None, None) == "own"  # type: ignore[arg-type]


def test_an_objective_with_settings_is_built_from_them(context: ObjectiveContext) -> None:
    objective = build_objective(PreferenceConfig(beta=0.3), context)
    assert isinstance(objective, PreferenceObjective)
    assert objective.config.beta == 0.3 and objective.max_stalled_calls == 100


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ObjectiveConfig(path="ivl.train.nothing:f"), "ivl.train.nothing: no such module"),
        (ObjectiveConfig(path="ivl.train.objectives:f"), "ivl.train.objectives has no objective 'f'; it has .*next_token"),
        (ObjectiveConfig(path="next_token"), "'next_token' names no objective"),
        (ObjectiveConfig(path="nowhere.py:f"), "nowhere.py: no such objective file"),
        (ObjectiveConfig(path="ivl.preference.objective:MOVED"), "is float, not a function"),
        (ObjectiveConfig(path=PreferenceConfig().path), "takes settings of PreferenceConfig, got ObjectiveConfig"),
        (PreferenceConfig(path="ivl.train.objectives:next_token"), "takes settings of ObjectiveConfig, got PreferenceConfig"),
    ],
)
def test_wrong_paths_and_settings_are_named(config: ObjectiveConfig, message: str, context: ObjectiveContext) -> None:
    with pytest.raises(InputError, match=message):
        build_objective(config, context)
