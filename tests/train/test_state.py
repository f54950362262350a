"""Checkpoints: killed at any moment, a run goes on as if nothing had happened."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from contextlib import closing
from pathlib import Path

import torch

from ivl.checkpoint import load_model, save_model
from ivl.runs import directory
from ivl.train import state
from ivl.train.config import OptimConfig, Stage
from ivl.train.loop import train
from ivl.train.recorder import Recorder
from ivl.train.stage import apply_stage
from ivl.train.world import World
from tests.helpers.training import BatchList, staged, tiny_batch, tiny_train

STEPS, KILLS = 40, 20


def session(run_dir: Path, slow_save: float = 0.0, **changes) -> None:
    """What a process does from its start: resume if it can, train, write the final weights."""
    config = tiny_train(
        num_steps=STEPS, packs_per_step=2, save_every=3, keep_last=2, log_samples=True, log_every=1000,
        optim=OptimConfig(name="muon", lr=1e-3, warmup_ratio=0.1), **changes,
    )  # fmt: skip
    run_dir.mkdir(exist_ok=True)
    checkpoint = directory.latest_checkpoint(run_dir)
    stage = Stage(trainable=("vision", "projector", "decoder"), drop_path=0.5)
    model = staged(stage, seed=0) if checkpoint is None else load_model(checkpoint)
    apply_stage(model, stage)
    saved = directory.read_trainer(checkpoint) if checkpoint else None

    def write_model(folder: Path) -> None:
        save_model(model, folder)
        time.sleep(slow_save)

    batches = BatchList([tiny_batch(i) for i in range(7)])
    train(
        model, batches, config, resume=saved,
        recorder=Recorder("test", config, directory=run_dir, step=saved.step if saved else 0),
        checkpoints=state.CheckpointWriter(run_dir, write_model, World(), config.keep_last),
    )  # fmt: skip
    save_model(model, run_dir / "model")
    (run_dir / "done").touch()


def weights_hash(model_dir: Path) -> str:
    parts = load_model(model_dir).state_dict()
    return hashlib.sha256(b"".join(n.encode() + p.numpy().tobytes() for n, p in sorted(parts.items()))).hexdigest()


def rows(run_dir: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], tuple(r["ids"]), r["total_tokens"]) for r in lines]


def child(run_dir: Path) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    session(run_dir, slow_save=0.01)


def test_killed_twenty_times_is_bit_identical(tmp_path):
    torch.set_num_threads(1)
    session(tmp_path / "whole")
    draw, runs, kills, inside_save = random.Random(0), [], 0, 0
    while kills < KILLS:  # a fast machine ends a run before it could be killed that often
        run_dir = tmp_path / f"killed{len(runs)}"
        runs.append(run_dir)
        while not (run_dir / "done").exists():
            killed = start_and_kill(run_dir, draw, wait_for_save=kills % 3 == 0) if kills < KILLS else start(run_dir)
            kills += killed
            inside_save += killed and bool(list(run_dir.glob(".tmp-*")))
    print(f"{kills} kills in {len(runs)} runs, {inside_save} inside a save")
    assert kills == KILLS and inside_save > 0
    for run_dir in runs:
        assert rows(run_dir) == rows(tmp_path / "whole")
        assert weights_hash(run_dir / "model") == weights_hash(tmp_path / "whole" / "model")


def start(run_dir: Path) -> bool:
    """Train to the end; whether the process was killed."""
    return _ended_by_kill(_started(run_dir))


def start_and_kill(run_dir: Path, draw: random.Random, *, wait_for_save: bool) -> bool:
    """Train and kill -9 at a random moment, or in a save; whether the process was still there to be killed."""
    process = _started(run_dir)
    if wait_for_save:
        deadline = time.monotonic() + 20
        while not list(run_dir.glob(".tmp-*")) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.02))
    else:
        time.sleep(draw.uniform(0.02, 0.4))
    assert process.pid is not None
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    return _ended_by_kill(process)


def _started(run_dir: Path) -> multiprocessing.context.ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=child, args=(run_dir,))
    process.start()
    return process


def _ended_by_kill(process: multiprocessing.context.ForkProcess) -> bool:
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == -signal.SIGKILL


def save(run_dir: Path, step: int, keep_last: int = 0, write_model=lambda d: (d / "weights").write_bytes(b"w" * 100)) -> Path:
    writer = state.CheckpointWriter(run_dir, write_model, World(), keep_last)
    return writer.save(step, optimizer={"a|b": torch.arange(3.0)}, state={"counters": {"step": step}}, data={"at": step})


def test_a_failure_at_any_point_of_a_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Every file operation of a save fails once in its turn."""
    real = {"fsync": os.fsync, "rename": Path.rename, "write_text": Path.write_text, "mkdir": Path.mkdir}
    left, failed = 0, 0

    def faulty(name):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(28, "No space left on device")
            return real[name](*args, **kwargs)

        return call

    for fail_at in range(1, 200):
        run_dir = tmp_path / str(fail_at)
        run_dir.mkdir()
        save(run_dir, 1)
        left = fail_at
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", faulty("fsync"))
            for name in ("rename", "write_text", "mkdir"):
                patch.setattr(Path, name, faulty(name))
            try:
                save(run_dir, 2, keep_last=1)
            except OSError:
                failed += 1
            else:
                break
        newest = directory.latest_checkpoint(run_dir)
        assert newest is not None
        saved = directory.read_trainer(newest)
        assert saved.step == saved.positions[0]["at"] in (1, 2)
    assert failed >= 10


def test_keep_last(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep_last=2)
    assert [p.name for p in state.checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]


def test_batches_in_memory_are_shared_by_another_number_of_ranks():
    batches = [tiny_batch(i) for i in range(5)]
    begun = [BatchList(batches, epochs=4, rank=rank, world_size=4) for rank in range(4)]
    seen = [next(iter(each)).ids for each in begun * 2]
    resumed = [BatchList(batches, epochs=4, rank=rank, world_size=3) for rank in range(3)]
    for each in resumed:
        each.restore([other.state() for other in begun])
    seen += [batch.ids for each in resumed for batch in each]
    assert sorted(seen) == sorted(batch.ids for batch in batches * 4)


def test_metrics_log_drops_what_a_resumed_run_writes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "evaluation": "x"}\n{"step": 3}\n{"ste')
    with closing(Recorder("test", tiny_train(), directory=tmp_path, step=2)) as recorder:
        recorder.write_evaluation(3, "y", {"again": True})
    assert [json.loads(line).get("again", False) for line in path.read_text().splitlines()] == [False, False, False, True]
