"""run() on two processes over gloo: replicas and shards end at the same weights, and either resumes exactly."""

import dataclasses
import json
import multiprocessing
import os
import socket
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed.fsdp  # both once here: forked processes inherit them

from ivl.checkpoint import load_model, save_processor
from ivl.config import LoraConfig
from ivl.data.config import DataConfig
from ivl.runs.config import RunConfig
from ivl.runs.run import run
from ivl.train.config import OptimConfig, Stage
from ivl.train.loop import Evaluator
from tests.helpers.mixtures import make_file, processor
from tests.helpers.training import run_config


def on_rank(rank: int, port: int, config: RunConfig, stop: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}

    def crash(model):
        os._exit(3)

    run(config, resume=True, evaluators=(lambda _: (Evaluator("crash", 5, crash),)) if stop else None)


def run_on_two(config: RunConfig, *, stop: bool = False) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=on_rank, args=(r, port, config, stop)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == (3 if stop else 0)


def test_shards_equal_replicas_and_resume(tmp_path):
    save_processor(processor(), tmp_path / "tokenizer")
    config = run_config(
        name="two", architecture=processor().config, tokenizer=str(tmp_path / "tokenizer"), checkpointing=True,
        stage=Stage(trainable=("vision", "projector")), lora=LoraConfig(rank=2, dropout=0.0),
        data=DataConfig(mixture=str(make_file(tmp_path / "data", 12)), max_tokens=200, max_tiles=30, num_workers=0, epochs=4),
        optim=OptimConfig(lr=1e-3, warmup_ratio=0.1, eps=1e-3), packs_per_step=2, precision="fp32", save_every=2, device="cpu",
        log_every=100, tensorboard=False,
    )  # fmt: skip
    folders = {name: str(tmp_path / name) for name in ("replicas", "shards", "crashed")}
    run_on_two(dataclasses.replace(config, out_dir=folders["replicas"]))
    run_on_two(dataclasses.replace(config, out_dir=folders["shards"], shard=True))
    crashed = dataclasses.replace(config, out_dir=folders["crashed"], shard=True)
    run_on_two(crashed, stop=True)
    run_on_two(crashed)
    replicas, shards, resumed = (load_model(f"{folder}/model").state_dict() for folder in folders.values())
    assert max(float((replicas[n] - shards[n]).abs().max()) for n in replicas) <= 1e-5
    assert all(shards[n].equal(resumed[n]) for n in shards)
    lines = Path(folders["crashed"], "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > 6
