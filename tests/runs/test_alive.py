"""Runs of several ranks when one of them dies or stops, and the addresses at which ranks meet."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ivl.errors import InputError
from ivl.parallel import launch, saving
from ivl.parallel.launch import first_host, start_world
from ivl.runs.run import run
from ivl.train import world as world_module
from ivl.train.loop import Evaluator
from tests.helpers.ranks import free_port, on_ranks
from tests.helpers.training import changed
from tests.runs.helpers import redirect_errors, same_weights, steps


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-007,012],login", "gpu003"), ("node7", "node7"), ("a1,a2", "a1"), ("r[1-2]n[04,06]", "r1n04"),
        ("login.cluster,b[1-2]", "login.cluster"), ("x[9]", "x9"),
    ],
)  # fmt: skip
def test_the_first_node_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_slurm_gives_the_address(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the call sets is undone
        monkeypatch.delenv(name)
    step = {
        "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "3", "SLURM_JOB_ID": "45017",
        "SLURM_STEP_NODELIST": "gpu[11-12]",
    }  # fmt: skip
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert start_world("cpu").size == 1
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu11", "25020")


def test_a_batch_script_without_srun_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "64")
    assert start_world("cpu").size == 1


@pytest.mark.parametrize(
    ("comes", "words"),
    [
        (False, "^rank 0 of 2 ended before the ranks met, or never started$"),
        (True, r"^rank 0 on its-host ended, or stopped responding \(.*\)$"),
    ],
)
def test_a_rank_that_is_not_there_when_the_ranks_meet_is_named(monkeypatch, comes, words):
    monkeypatch.setattr(launch, "START_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr(world_module, "GRACE", 1.0)
    store = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    if comes:  # and ends before the ranks connect to one another
        PrefixStore("attempt 0", store).set("host of 0", "its-host")
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        start_world("cpu")


def stops(config, rank: int, log: Path) -> None:
    """Train; rank 1 stops after the third step or, of shards, in the thread that writes the fourth checkpoint."""
    redirect_errors(log)
    launch.STEP_TIMEOUT, world_module.GRACE = timedelta(seconds=8), 2.0
    os.environ |= {"RANK": str(rank)}
    save, saves = saving.save_file, []

    def stop(model):
        if rank == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGSTOP)
        return {}

    def stop_in_save(*args, **options):
        saves.append(args)
        return stop(None) if len(saves) == 2 else save(*args, **options)

    if config.shard and rank == 1:
        saving.save_file = stop_in_save
    try:
        run(config, evaluators=None if config.shard else lambda _: (Evaluator("stop", 3, stop),))
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


@pytest.mark.parametrize("shard", [False, True], ids=["in a step", "in a save of shards"])
def test_a_rank_that_stops_responding_ends_the_run_with_its_name(config, tmp_path, monkeypatch, shard):
    config = changed(config, shard=shard, save_every=2)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=stops, args=(config, rank, tmp_path / f"log{rank}")) for rank in (0, 1)]
    try:
        for rank in ranks:
            rank.start()
        ranks[0].join(90)
        assert ranks[0].exitcode == 1
        words = (tmp_path / "log0").read_text()
        assert "rank 1 on " in words and "stopped responding" in words
        assert sorted(Path(config.run_dir).glob("checkpoint-*"))[-1].name == "checkpoint-2"
        if not shard:  # rank 0 may have ended its steps, and wait for the checkpoint alone
            assert "most recent call first" in (Path(config.run_dir) / "stacks-rank-0.txt").read_text()
    finally:
        for rank in ranks:
            rank.kill()


SCRIPT = """
import os, pickle, signal, sys
import torch
from ivl.runs.run import run
from ivl.train.loop import Evaluator

def kill(model):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return {}

torch.set_num_threads(1)
config = pickle.load(open(sys.argv[1], "rb"))
run(config, evaluators=lambda _: (Evaluator("kill", 6, kill),), resume=True)
"""


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_the_run_goes_on_exactly(config, tmp_path):
    whole = changed(config, out_dir=str(tmp_path / "whole"))
    on_ranks(2, lambda rank, whole: run(whole) and None, whole)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2",
        str(tmp_path / "script.py"), str(tmp_path / "config.pickle"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "goes on from step 4" in done.stderr
    assert steps(config) == steps(whole) and not list(Path(config.run_dir).glob("stacks-*"))
    assert same_weights(Path(config.run_dir) / "model", Path(whole.run_dir) / "model")
