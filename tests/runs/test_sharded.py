"""Sharded runs: a start that reads slices, checkpoints written beside training, and evaluations of the gathered model."""

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
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ivl.checkpoint import save_model, save_processor
from ivl.checkpoint.convert import convert
from ivl.checkpoint.shards import FOLDER, ShardedWeights
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.parallel import saving
from ivl.parallel.launch import start_world, stop_world
from ivl.parallel.shard import whole_parameters
from ivl.preference.reference import weights_hash
from ivl.runs import gathered
from ivl.runs.build import adapt, build_model, start_whole
from ivl.runs.config import RunConfig
from ivl.runs.directory import checkpoint_writer, latest_checkpoint, read_trainer
from ivl.runs.run import run
from ivl.train.config import OptimConfig, Stage
from ivl.train.optim import Optimizer
from ivl.train.shards import own_part, own_rows
from ivl.train.stage import trainable
from ivl.train.state import checkpoints, step_of
from ivl.train.world import World
from tests.helpers.checkpoints import random_model, tiny_like
from tests.helpers.mixtures import make_file, processor
from tests.helpers.ranks import free_port, on_ranks
from tests.helpers.training import changed, crash_at
from tests.runs.helpers import redirect_errors, rows, same_weights, steps
from tests.runs.test_curves import TASK

KILLS = int(os.environ.get("IVL_TEST_KILLS", "3"))
"""How often a run is killed inside a save; 20 takes two minutes."""


@pytest.fixture
def sharded(config) -> RunConfig:
    return changed(config, shard=True, device="cpu", num_steps=4, save_every=2)


def compare_starts(rank: int, configs: list[RunConfig]) -> None:
    world = start_world("cpu")
    for config in configs:
        model, whole = build_model(config, None, world), start_whole(config)
        adapt(whole, config)
        for (name, part), (other, parameter) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            first, last = own_rows(part)
            assert name == other and part.requires_grad == parameter.requires_grad
            assert own_part(part).equal(parameter[first:last]), (config.model, name)
        assert [module.training for module in model.modules()] == [module.training for module in whole.modules()]
        assert weights_hash(model, world) == weights_hash(whole, World())
    stop_world(world)


def test_a_sharded_start_has_the_weights_of_a_whole_one(sharded, tmp_path):
    """InternLM2's fused matrix is interleaved in the original dialect; transformers' has a tensor for each projection."""
    configs = [sharded]
    for name, size, dialect in (("8B", "8B", "internvl_chat"), ("HF", "8B", "transformers"), ("lora", "1B", "internvl_chat")):
        save_model(random_model(tiny_like(size)), tmp_path / name, dialect=dialect, max_shard_bytes=100_000)
        configs.append(replace(sharded, model=str(tmp_path / name), architecture=None))
    lora = LoraConfig(rank=2, targets=("projector", "decoder.layers"))
    configs[-1] = replace(configs[-1], lora=lora, stage=Stage(trainable=()))
    on_ranks(3, compare_starts, configs)


def start_within_budget(rank: int, config: RunConfig, budget: int) -> None:
    world = start_world("cpu")
    build_model(changed(config, model="", architecture=processor().config), None, world)  # what is made once for any model
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    build_model(config, None, world)
    assert memory("VmHWM") - before < budget
    stop_world(world)


def memory(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peaks of Linux")
def test_a_rank_starts_within_its_share_and_a_tensor(sharded, tmp_path):
    """38 M parameters on four ranks, from random weights and from a directory."""
    tiny = processor().config
    decoder = replace(tiny.decoder, width=512, num_layers=9, mlp_width=2048, num_heads=8, num_kv_heads=8, head_dim=64)
    config = replace(sharded, architecture=replace(tiny, decoder=decoder))
    model = start_whole(config)
    weights = sum(p.nbytes for p in model.parameters())
    budget = weights // 4 + max(p.nbytes for p in model.parameters()) + 25_000_000
    assert weights > 2 * budget
    save_model(model, tmp_path / "model")
    save_processor(processor(), tmp_path / "model")
    for start in (config, replace(config, model=str(tmp_path / "model"), architecture=None)):
        on_ranks(4, start_within_budget, start, budget)


def load_and_save(rank: int, config: RunConfig, checkpoint: Path, step: int) -> None:
    """Go on from a checkpoint as a run does, and write another one."""
    world = start_world("cpu")
    model = build_model(config, checkpoint, world)
    optimizer = Optimizer(trainable(model), config.train.optim)
    optimizer.restore(read_trainer(checkpoint).optimizer)
    with checkpoint_writer(model, processor(), config, world) as writer:
        writer.save(step, optimizer=optimizer.state(), state={"counters": {"step": step}}, data={})
    stop_world(world)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights, moments = ShardedWeights(checkpoint), ShardedWeights(checkpoint, state=True)
    return {name: stored.get(name) for stored in (weights, moments) for name in stored.shapes}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_four_ranks_write_and_two_and_three_read(sharded, tmp_path, lora):
    config = changed(sharded, num_steps=2, packs_per_step=4, replicate=1 if lora else 2)
    if lora:
        save_model(start_whole(config), tmp_path / "base")
        save_processor(processor(), tmp_path / "base")
        config = replace(config, model=str(tmp_path / "base"), lora=LoraConfig(rank=2), stage=Stage(trainable=("projector",)))
    on_ranks(4, train, config)
    run_dir = Path(config.run_dir)
    for number, ranks in enumerate((2, 3), 3):
        on_ranks(ranks, load_and_save, replace(config, replicate=1), run_dir / f"checkpoint-{number - 1}", number)
        assert len(list((run_dir / f"checkpoint-{number}" / FOLDER).iterdir())) == ranks
    first, *others = (tensors_of(run_dir / f"checkpoint-{step}") for step in (2, 3, 4))
    assert any(name.endswith("|exp_avg_sq") and tensor.any() for name, tensor in first.items())
    for other in others:
        assert first.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in first.items())
    read = {name: torch.empty_like(tensor) for name, tensor in first.items() if tensor.ndim}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(run_dir / "checkpoint-2" / FOLDER)), no_dist=True)
    assert all(tensor.equal(first[name]) for name, tensor in read.items())
    if not lora:
        assert same_weights(run_dir / "checkpoint-4", run_dir / "model")
        convert(run_dir / "checkpoint-4", tmp_path / "converted", to="transformers")
        assert same_weights(tmp_path / "converted", run_dir / "model")


def train(rank: int, config: RunConfig) -> None:
    run(config, resume=True)


def train_until(rank: int, config: RunConfig, step: int) -> None:
    """Train, and end without a word after a step."""
    run(config, resume=True, evaluators=crash_at(step, config.run_dir, saved=step - 1))


def test_runs_go_on_sharded_and_whole(sharded, tmp_path):
    """A whole run goes on as shards, these on other ranks, and these as a whole run; the losses are those of one whole run."""
    config = changed(sharded, num_steps=7, packs_per_step=6, save_every=1)
    whole = changed(config, shard=False, out_dir=str(tmp_path / "whole"))
    run(whole)
    for ranks, shard, step in ((1, False, 3), (2, True, 4), (3, True, 6)):
        on_ranks(ranks, train_until, changed(config, shard=shard), step, exitcode=3)
    run(changed(config, shard=False), resume=True)
    found, expected = steps(config), steps(whole)
    assert [step for step, *_ in found] == [step for step, *_ in expected] == list(range(1, 8))
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in expected], abs=0.2)
    assert found[1][1] == pytest.approx(expected[1][1], abs=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_shards_have_the_losses_and_the_model_of_a_whole_run(sharded, tmp_path, lora):
    config = changed(sharded, num_steps=2, save_every=0)
    if lora:
        config = replace(config, lora=LoraConfig(rank=2, dropout=0.0), stage=Stage(trainable=("projector",)))
    whole = changed(config, shard=False, out_dir=str(tmp_path / "whole"))
    on_ranks(2, train, whole)
    if lora:
        config = changed(config, save_every=1)
        on_ranks(2, train_until, config, 2, exitcode=3)
    on_ranks(2, train, config)
    for (_, loss, ids), (_, expected, others) in zip(steps(config), steps(whole), strict=True):
        assert loss == pytest.approx(expected, abs=1e-5) and ids == others
    for name in ("model/model", "adapter/adapter_model") if lora else ("model/model",):
        a, b = (load_file(f"{each.run_dir}/{name}.safetensors") for each in (config, whole))
        assert a.keys() == b.keys() and max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4


def with_slow_files(rank: int, config: RunConfig) -> None:
    original = saving.save_file

    def slow(tensors, path, metadata):
        original(tensors, path, metadata=metadata)
        time.sleep(random.Random(time.time_ns()).uniform(0, 0.05))

    saving.save_file = slow
    redirect_errors(Path(f"{config.run_dir}-log-{rank}"))
    run(config, resume=True)


def test_a_kill_inside_a_save_loses_nothing(sharded, tmp_path):
    config = changed(sharded, num_steps=10, save_every=1, keep_last=2)
    whole = changed(config, out_dir=str(tmp_path / "whole"))
    on_ranks(2, train, whole)
    kills, runs, newest, draw = 0, 1, 0, random.Random(0)
    while kills < KILLS:
        killed = start_and_kill(config, draw)
        found = latest_checkpoint(Path(config.run_dir))  # compares every hash
        kills += killed
        assert newest <= (newest := step_of(found) if found else 0), "a checkpoint was lost"
        if not killed:  # it ended before it could be killed so often
            assert same_weights(f"{config.run_dir}/model", f"{whole.run_dir}/model")
            config, runs, newest = changed(config, out_dir=str(tmp_path / f"run-{runs}")), runs + 1, 0
    start_and_kill(config, None)
    assert steps(config) == steps(whole) and same_weights(f"{config.run_dir}/model", f"{whole.run_dir}/model")
    assert [step_of(path) for path in checkpoints(Path(config.run_dir))] == [9, 10]


def start_and_kill(config: RunConfig, draw: random.Random | None) -> bool:
    """Train on two ranks and kill both inside a save, in any order; whether they were there to be killed."""
    port, context = free_port(), multiprocessing.get_context("fork")
    ranks = [context.Process(target=_join, args=(rank, port, config)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    run_dir, before = Path(config.run_dir), time.monotonic()
    while draw and all(rank.is_alive() for rank in ranks) and time.monotonic() < before + 60:
        if list(run_dir.glob(f".tmp-checkpoint-*/{FOLDER}/*")):
            time.sleep(draw.uniform(0, 0.1))
            break
        time.sleep(0.001)
    for rank in draw.sample(ranks, 2) if draw else ():
        rank.kill()
        time.sleep(draw.choice((0, 0.02)))
    for rank in ranks:
        rank.join(120)
    return any(rank.exitcode == -signal.SIGKILL for rank in ranks)


def _join(rank: int, port: int, config: RunConfig) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    with_slow_files(rank, config)


def full_disk(rank: int, config: RunConfig) -> None:
    original, calls = saving.save_file, []

    def save(tensors, path, metadata):
        calls.append(path)
        if rank == 1 and len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata=metadata)

    saving.save_file = save
    redirect_errors(Path(f"{config.run_dir}-log-{rank}"))
    with pytest.raises(InputError, match=r"checkpoint-4: rank 1 could not write its part: .*No space left on device"):
        run(config)


def test_a_full_disk_of_one_rank_ends_all_with_one_line(sharded):
    on_ranks(2, full_disk, changed(sharded, num_steps=5))
    run_dir = Path(sharded.run_dir)
    assert [path.name for path in checkpoints(run_dir)] == ["checkpoint-2"] and not list(run_dir.glob(".tmp-*"))
    words = Path(f"{run_dir}-log-0").read_text()
    assert f"stopped at step 2; go on with: ivl train --resume {run_dir}" in words
    assert not Path(run_dir, "model").exists()


def test_the_first_rank_asks_the_gathered_model(sharded, tmp_path):
    (tmp_path / "short.py").write_text(TASK)
    asked = changed(sharded, num_steps=2, save_every=0, eval_tasks=(f"{tmp_path}/short.py:Short",), eval_limit=3)
    for shard in (False, True):
        config = changed(asked, shard=shard, out_dir=str(tmp_path / f"shard-{shard}"))
        on_ranks(2, train, config)
    found = [
        [row for row in map(json.loads, (tmp_path / f"shard-{shard}" / "metrics.jsonl").open()) if "evaluation" in row]
        for shard in (False, True)
    ]
    assert found[0] == found[1] and found[0][0]["all"] == 1.0


def test_the_validation_loss_counts_every_pack(sharded, tmp_path):
    """Three ranks share out packs that three does not divide, and have the loss of one process."""
    data = replace(sharded.data, mixture=str(make_file(tmp_path / "more", 13, seed=1)), max_tokens=200)
    still = OptimConfig(lr=1e-12)  # their packs of training data differ
    config = changed(sharded, num_steps=1, save_every=0, val_data=data, packs_per_step=3, optim=still)
    whole = changed(config, shard=False, out_dir=str(tmp_path / "whole"))
    run(whole)
    on_ranks(3, train, config)
    found, expected = ([row["loss"] for row in rows(each) if "evaluation" in row] for each in (config, whole))
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 1


def without_room(rank: int, config: RunConfig) -> None:
    gathered.free_memory = lambda device: 50_000
    with pytest.raises(InputError, match=r"eval_tasks gather .* and 0.0 GiB will be left there: train without eval_tasks"):
        run(config)
    assert not Path(config.run_dir, "metrics.jsonl").exists()


def test_without_room_for_the_gathered_model_the_run_is_refused(sharded, tmp_path):
    (tmp_path / "short.py").write_text(TASK)
    on_ranks(2, without_room, changed(sharded, eval_tasks=(f"{tmp_path}/short.py:Short",)))


def gather_and_fail(rank: int, config: RunConfig) -> None:
    world = start_world("cpu")
    model = build_model(config, None, world)
    whole = start_whole(config).state_dict()
    with whole_parameters(model, world) as get:
        assert (get is None) == (rank > 0)
        for name in reversed(whole) if get else ():
            assert get(name).equal(whole[name])
    with pytest.raises(ValueError if rank == 0 else InputError, match="no room"), whole_parameters(model, world) as get:
        if get:
            get("decoder.norm.weight")
            raise ValueError("no room")
    stop_world(world)


def test_parameters_are_gathered_on_demand_and_an_error_reaches_all_ranks(sharded):
    on_ranks(3, gather_and_fail, sharded)
