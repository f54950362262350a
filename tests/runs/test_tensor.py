"""Runs whose ranks share a model as tensor ranks: they end where one process ends, and go on from their checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ivl.checkpoint import load_model
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.preference.config import PreferenceConfig
from ivl.runs.config import RunConfig
from ivl.runs.run import run
from ivl.train.config import OptimConfig, Stage
from ivl.utils.jsonl import read_journal
from tests.helpers.pairs import make_pairs, pair_data
from tests.helpers.ranks import on_ranks
from tests.helpers.training import changed, crash_at
from tests.runs.helpers import rows, same_weights, steps


def short(config: RunConfig, out: Path, **changes) -> RunConfig:
    optim = OptimConfig(lr=1e-3, warmup_ratio=0.1, eps=1e-3)
    stage = replace(config.stage, drop_path=0.0)
    options = {"out_dir": str(out), "num_steps": 6, "save_every": 2, "optim": optim, "stage": stage}
    return changed(config, **options | {"val_data": replace(config.data, epochs=1), "val_every": 3} | changes)


def go_on(rank: int, config: RunConfig, crash: bool = False) -> None:
    run(config, resume=True, evaluators=crash_at(5, config.run_dir, saved=4) if crash else None)


def difference(a: RunConfig, b: RunConfig) -> float:
    one, other = (load_model(Path(config.run_dir) / "model").state_dict() for config in (a, b))
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_tensor_ranks_end_where_one_process_ends_and_go_on_exactly(config, tmp_path):
    one = short(config, tmp_path / "one")
    run(one)
    two, broken = (short(config, tmp_path / name, tensor_parallel=2) for name in ("two", "broken"))
    on_ranks(2, go_on, two)
    assert difference(one, two) <= 1e-5
    assert [ids for _, _, ids in steps(one)] == [ids for _, _, ids in steps(two)]
    on_ranks(2, go_on, broken, True, exitcode=3)
    checkpoint = Path(broken.run_dir) / "checkpoint-4"
    names = sorted(path.name for path in (checkpoint / "trainer").iterdir())
    assert names == ["rank-0.json", "run.json", "state.json"]
    assert load_model(checkpoint).decoder.layers[0].qkv.weight.shape == (128, 48)
    on_ranks(2, go_on, broken)
    assert same_weights(Path(broken.run_dir) / "model", Path(two.run_dir) / "model") and steps(broken) == steps(two)


def test_shards_of_tensor_ranks_end_where_replicas_end_and_go_on_without_tensor_ranks(config, tmp_path):
    replicas, shards = short(config, tmp_path / "replicas"), short(config, tmp_path / "shards", shard=True, tensor_parallel=2)
    on_ranks(2, go_on, replicas)
    on_ranks(4, go_on, shards, True, exitcode=3)  # of the fifth step
    on_ranks(2, go_on, replace(shards, tensor_parallel=1))
    assert difference(replicas, shards) <= 1e-5
    losses = ([row["loss"] for row in rows(each) if "evaluation" in row] for each in (replicas, shards))
    assert next(losses) == pytest.approx(next(losses), rel=1e-5)


def test_preference_training_with_a_file_on_tensor_ranks(config, tmp_path):
    options = {
        "data": pair_data(make_pairs(tmp_path / "pairs", 8), epochs=None, shuffle=True), "val_data": None, "num_steps": 2,
        "objective": PreferenceConfig(bco=0.0),
    }  # fmt: skip
    one = short(config, tmp_path / "one", **options)
    run(one)
    two = short(config, tmp_path / "two", tensor_parallel=2, **options)
    on_ranks(2, go_on, two)
    journals = [list((tmp_path / name / "reference").iterdir()) for name in ("one", "two")]
    assert [[path.name for path in paths] for paths in journals] == [["rank-0.jsonl"]] * 2
    assert len({read_journal(path)[0]["weights"] for (path,) in journals}) == 1
    assert difference(one, two) <= 1e-5


def test_what_needs_whole_layers_is_refused(config):
    remedies = {
        r"muon .*: take adamw, or tensor_parallel = 1 without shard": {"optim": OptimConfig(name="muon")},
        r"LoRA .*: take tensor_parallel = 1, with shard = True": {"lora": LoraConfig(rank=2), "stage": Stage(trainable=())},
        r"compile .*: take compile = False, or tensor_parallel = 1": {"compile": True},
    }
    for message, options in remedies.items():
        changed(config, **options)
        with pytest.raises(InputError, match=message):
            changed(config, tensor_parallel=2, **options)
    with pytest.raises(InputError, match="replicate 2 makes copies of a sharded model: give shard = True"):
        changed(config, replicate=2)
