"""Preference training as a whole: packs, ranks, shards and kills do not change what comes of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ivl.checkpoint import load_model, save_model, save_processor
from ivl.config import LoraConfig
from ivl.errors import DataError, InputError
from ivl.formats.rows import write_jsonl
from ivl.parallel.launch import start_world, stop_world
from ivl.preference import reference
from ivl.preference.config import TERMS, PreferenceConfig
from ivl.preference.objective import PreferenceObjective
from ivl.preference.reference import frozen
from ivl.preference.replies import last_replies, reply_log_probs
from ivl.runs.config import RunConfig
from ivl.runs.run import run
from ivl.train.config import ObjectiveConfig, OptimConfig, Stage
from ivl.train.loop import train
from ivl.train.optim import Optimizer
from ivl.train.world import World
from ivl.types import Batch
from tests.helpers.mixtures import processor, turns
from tests.helpers.pairs import make_pairs, new_model, pair_batches, pair_data
from tests.helpers.ranks import on_ranks
from tests.helpers.training import BatchList, run_config, tiny_train

SETTLED = {"total": 0.03 * 1e12, "count": 1e12, "calls": 1, "moved": True}
"""A shift that a few more pairs do not move."""
EVERY = PreferenceConfig(**{name: 1.0 for name in TERMS if name != "kto"}, check_start=False, label_smoothing=0.1)
"""All terms but KTO, whose estimate of the divergence is the pack's."""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"), 12)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    save_model(new_model(), folder)
    save_processor(processor(), folder)
    return folder


def mpo(path: Path, start: Path, out: Path, **changes) -> RunConfig:
    options = {
        "name": "mpo", "out_dir": str(out), "model": str(start), "stage": Stage(trainable=("vision", "projector", "decoder")),
        "objective": PreferenceConfig(), "optim": OptimConfig(lr=1e-3), "data": pair_data(path, max_samples=2),
        "packs_per_step": 2, "precision": "fp32", "tensorboard": False, "log_every": 1000, "device": "cpu",
    }  # fmt: skip
    return run_config(**{**options, **changes})


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def figures(out: Path) -> list[dict]:
    """What must not depend on when a run was stopped."""
    clock = ("tokens_per_second", "samples_per_second", "seconds", "memory_gb")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows(out)]


# Packs and ranks


def of_the_loop(batches: list[Batch], world: World) -> dict[str, torch.Tensor]:
    """The gradients of one step over all of these packs, with a reference that is not the policy, as later in training."""
    given: dict[str, torch.Tensor] = {}

    def note(optimizer: Optimizer, factor: float) -> None:
        given.update({name: p.grad.clone() for name, p in optimizer.parameters.items()})

    objective = PreferenceObjective(EVERY, frozen(new_model(1)), world)
    objective.restore(SETTLED)
    config = tiny_train(num_steps=1, packs_per_step=len(batches), optim=OptimConfig(clip=0), log_every=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", note)
        data = BatchList(batches, epochs=1, rank=world.rank, world_size=world.size)
        train(new_model(), data, config, objective=objective, world=world)
    return given


def save_of_the_loop(rank: int, batches: list[Batch], out: Path) -> None:
    world = start_world("cpu")
    torch.save(of_the_loop(batches, world), out / f"{rank}.pt")
    stop_world(world)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of a parameter's gradients, relative to their size."""
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in b if b[n].any())


def test_updates_do_not_depend_on_packs_micro_batches_or_ranks(path, tmp_path):
    alone, packed = pair_batches(path, max_samples=1), pair_batches(path, max_samples=5, max_buffer=1)
    assert len(alone) == 12 and len({len(batch.ids) for batch in packed}) > 1 and len(packed) % 2 == 0, "ranks differ in pairs"
    expected = of_the_loop(alone, World())
    on_ranks(2, save_of_the_loop, packed, tmp_path)
    found = [of_the_loop(packed, World()), *(torch.load(tmp_path / f"{rank}.pt") for rank in range(2))]
    print("gradients differ by", *(f"{difference(one, expected):.1e}" for one in found))
    assert all(difference(one, expected) <= 1e-5 for one in found)


def train_on_rank(rank: int, config: RunConfig) -> None:
    run(config)


def train_in_packs_of_another_size(rank: int, config: RunConfig) -> None:
    run(replace(config, data=replace(config.data, max_samples=1 + 2 * rank)))


@pytest.mark.parametrize("shard", [False, True], ids=["replicas", "shards"])
def test_no_pair_is_lost_where_the_data_of_ranks_end_apart(path, start, tmp_path, shard):
    """Six pairs a rank: one by one and three a pack, so that one rank is idle at the last step and shares the shift. Of shards
    it takes part in the other's pack, whose pairs count once."""
    config = mpo(path, start, tmp_path / "run", save_every=100, shard=shard)
    on_ranks(2, train_in_packs_of_another_size, config)
    last = rows(tmp_path / "run")[-1]
    assert last["total_samples"] == 12 and last["packs"] == 1 < rows(tmp_path / "run")[0]["packs"]
    state = json.loads((tmp_path / "run" / f"checkpoint-{last['step']}" / "trainer" / "state.json").read_text())
    assert state["objective"]["count"] == 12


@pytest.mark.parametrize(("kind", "parts"), [("file", ("vision", "projector", "decoder")), ("model", ("decoder",))])
def test_shards_equal_replicas(start, tmp_path, kind, parts):
    """Eleven packs of one pair: the second rank has one fewer to ask the reference about, and at times one has no picture."""
    preference, path = PreferenceConfig(reference=kind), make_pairs(tmp_path / "pairs", 11)
    changes = {"objective": preference, "num_steps": 4, "data": pair_data(path, max_samples=1, epochs=4)}
    changes["stage"] = Stage(trainable=parts)
    changes["optim"] = OptimConfig(lr=1e-3, eps=1e-3)
    on_ranks(2, train_on_rank, mpo(path, start, tmp_path / "replicas", **changes))
    on_ranks(2, train_on_rank, mpo(path, start, tmp_path / "shards", shard=True, **changes))
    replicas, shards = (load_model(tmp_path / name / "model").state_dict() for name in ("replicas", "shards"))
    assert max(float((replicas[n] - shards[n]).abs().max()) for n in replicas) <= 1e-5
    assert rows(tmp_path / "shards")[0]["loss/sigmoid"] == pytest.approx(0.6931, abs=1e-4)


# Kills


def child(config: RunConfig, done: Path) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    reference.PAIRS_A_CHUNK = 1
    run(config, resume=True)
    done.touch()


def test_killed_ten_times_ends_as_if_it_never_was(path, start, tmp_path):
    """kill -9 at random moments of the reference pass and of training: same file, figures and weights."""
    torch.set_num_threads(1)
    options = {"num_steps": 16, "save_every": 2, "keep_last": 2, "data": pair_data(path, max_samples=2, epochs=None)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PAIRS_A_CHUNK", 1)
        run(mpo(path, start, tmp_path / "whole", **options))
    draw, kills, in_reference, number = random.Random(0), 0, 0, 0
    while kills < 10:
        out, done, number = tmp_path / f"killed{number}", tmp_path / f"done{number}", number + 1
        while not done.exists():
            process = multiprocessing.get_context("fork").Process(target=child, args=(mpo(path, start, out, **options), done))
            process.start()
            if kills < 10:
                while process.is_alive() and not (out / "reference").exists():
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.03) if not list(out.glob("checkpoint-*")) and kills < 5 else draw.uniform(0, 0.5))
                if process.is_alive():
                    os.kill(process.pid or 0, signal.SIGKILL)
            process.join(60)
            if process.exitcode == -signal.SIGKILL:
                kills += 1
                in_reference += '"done"' not in (out / "reference" / "rank-0.jsonl").read_text()
            else:
                assert process.exitcode == 0
        assert figures(out) == figures(tmp_path / "whole")
        for name in ("model/model.safetensors", "reference/rank-0.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    print(f"{kills} kills in {number} runs, {in_reference} in the reference pass")
    assert in_reference > 0


# What is asked of the reference


def test_runs_share_a_finished_file(path, start, tmp_path, monkeypatch):
    shared = PreferenceConfig(reference_dir=str(tmp_path / "shared"))
    run(mpo(path, start, tmp_path / "one", objective=shared, num_steps=1))
    monkeypatch.setattr(reference, "reply_log_probs", None)  # nobody is asked again
    run(mpo(path, start, tmp_path / "two", objective=shared, num_steps=1, seed=1))
    other = tmp_path / "other"
    save_model(new_model(1), other)
    save_processor(processor(), other)
    with pytest.raises(InputError, match=r"rank-0.jsonl: belongs to another run \(weights was '\w+', is '\w+'\)"):
        run(mpo(path, other, tmp_path / "three", objective=shared, num_steps=1))


def test_validation_pairs_are_asked_about_too(path, start, tmp_path):
    val = make_pairs(tmp_path / "val", 4, seed=5)
    run(mpo(path, start, tmp_path / "run", num_steps=2, val_data=pair_data(val)))
    losses = [row["loss"] for row in rows(tmp_path / "run") if row.get("evaluation") == "validation"]
    assert len(losses) == 1 and losses[0] > 0


def test_without_a_reference_none_is_asked(path, start, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "reply_log_probs", None)
    weights = {"sigmoid": 0.0, "bco": 0.0, "orpo": 1.0}
    run(mpo(path, start, tmp_path / "run", objective=PreferenceConfig(**weights), num_steps=2))
    assert not (tmp_path / "run" / "reference").exists() and "loss/orpo" in rows(tmp_path / "run")[-1]


def test_a_resumed_lora_run_goes_on_exactly(path, start, tmp_path):
    options = {"num_steps": 4, "save_every": 2, "stage": Stage(trainable=()), "data": pair_data(path, epochs=None)}
    options["lora"] = LoraConfig(rank=2, dropout=0.0, targets=("decoder.layers",))
    for kind in ("model", "adapters"):
        options["objective"] = PreferenceConfig(reference=kind)
        whole = run(mpo(path, start, tmp_path / f"{kind}-whole", **options))
        stopped = mpo(path, start, tmp_path / f"{kind}-stopped", **options)
        calls, step = [], Optimizer.step

        def stop(self, factor, calls=calls, step=step):
            calls.append(factor)
            if len(calls) == 4:
                raise KeyboardInterrupt
            step(self, factor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Optimizer, "step", stop)
            with pytest.raises(KeyboardInterrupt):
                run(stopped)
        resumed = run(stopped, resume=True)
        assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


# Which tokens count, and which rows


def test_only_the_last_reply_of_a_conversation_counts(tmp_path):
    history = turns("what is this", "a red circle")
    question = {"from": "human", "value": "what is this"}
    chosen, rejected = "white circle", "red"
    several = {"prompt": [*history, question], "chosen": chosen, "rejected": rejected}
    one = {"question": "what is this", "chosen": chosen, "rejected": rejected}
    for row, earlier in ((several, True), (one, False)):
        [batch] = pair_batches(write_jsonl([row], tmp_path / "rows.jsonl"))
        at_M, seq_M = last_replies(batch)
        tokenizer = processor().tokenizer
        said = [tokenizer.decode(batch.labels_T[at_M[seq_M == s]].tolist()) for s in range(2)]
        assert [text.replace("<|im_end|>", "").strip() for text in said] == [chosen, rejected]
        assert (len(at_M) < int((batch.weights_T != 0).sum())) == earlier
    lens = reply_log_probs(new_model(), batch).lens_S
    assert lens.tolist() == [int((seq_M == s).sum()) for s in range(2)]


def test_supervised_training_refuses_pairs_and_preference_refuses_others(path, start, tmp_path):
    with pytest.raises(DataError, match=r"pairs.jsonl:\d+: a preference pair"):
        run(mpo(path, start, tmp_path / "sft", objective=ObjectiveConfig()))
    talk = write_jsonl([{"conversations": turns("what is this", "a circle")}], tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows.jsonl:1: not a preference pair"):
        run(mpo(talk, start, tmp_path / "mpo", data=pair_data(talk)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data": pair_data(Path("x"), over_budget="truncate")}, "over_budget truncate would cut one reply"),
        ({"objective": PreferenceConfig(reference="adapters")}, "adapters needs `lora`"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        mpo(Path("x"), Path("y"), Path("z"), **changes)


def test_the_same_command_works_once_a_pair_is_mended(path, start, tmp_path, monkeypatch):
    """An attempt that failed while the reference was asked leaves log-probabilities of other rows."""
    monkeypatch.setattr(reference, "PAIRS_A_CHUNK", 2)
    pairs, good = path.with_name("mended.jsonl"), path.read_text().splitlines()
    broken = json.dumps(json.loads(good[5]) | {"rejected": ""})
    pairs.write_text("\n".join([*good[:5], broken, *good[6:]]) + "\n")
    config = mpo(pairs, start, tmp_path / "run", data=pair_data(pairs, max_samples=1))
    with pytest.raises(DataError, match=r"mended\.jsonl:6: the rejected reply is empty"):
        run(config)
    assert (tmp_path / "run" / "reference" / "rank-0.jsonl").exists()
    pairs.write_text(path.read_text())
    run(config)
    assert len(rows(tmp_path / "run")) == 6
    shared = PreferenceConfig(reference_dir=str(tmp_path / "run" / "reference"))
    with pytest.raises(InputError, match="belongs to another run"):
        run(mpo(path, start, tmp_path / "other", objective=shared))
