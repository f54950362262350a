"""Kill one of two ranks at many moments: `python -m benchmarks.kills [--moments 20]`. Nothing may hang longer than 30 s.

Three parts: a tensor rank of a training run, a rank of a sharded run that saves all the time, and the follower of a server
under requests. Each is started on two gloo ranks without torchrun, which would end the other rank by itself, and killed, or
every third time stopped, after a random time: while it starts, loads, computes, saves or waits. Printed are the seconds until
the other rank has ended, and whether it named a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.helpers.engines import tiny_directory
from tests.helpers.mixtures import make_file, processor
from tests.helpers.ranks import free_port
from tests.helpers.training import run_config

LIMIT = 30.0
Processes = list[subprocess.Popen[bytes]]
RUN = """
import datetime, pickle, sys
import torch
from ivl.errors import InputError
from ivl.parallel import launch
from ivl.runs.run import run

torch.set_num_threads(1)
launch.START_TIMEOUT = launch.STEP_TIMEOUT = datetime.timedelta(seconds=10)  # of minutes, which are for large models
try:
    run(pickle.load(open(sys.argv[1], "rb")), resume=True)
except InputError as error:
    sys.exit(f"ivl train: {error}")
"""


def training(folder: Path, number: int, **changes: object) -> Processes:
    """Start a run on two ranks that goes on for a minute."""
    from ivl.checkpoint import save_processor
    from ivl.data.config import DataConfig
    from ivl.train.config import Stage

    place = folder / f"run-{number}"
    save_processor(processor(), folder / "tokenizer")
    data = DataConfig(mixture=str(make_file(folder / "data", 24)), max_tokens=300, max_tiles=40, num_workers=0)
    config = run_config(
        name="kills", out_dir=str(place), architecture=processor().config, tokenizer=str(folder / "tokenizer"),
        stage=Stage(trainable=("vision", "projector", "decoder")), data=data, num_steps=10_000, packs_per_step=2,
        precision="fp32", log_every=10_000, tensorboard=False, device="cpu", keep_last=1, save_every=1,
    )  # fmt: skip
    place.with_suffix(".pickle").write_bytes(pickle.dumps(replace(config, **changes)))
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [
        start(place, rank, "-c", RUN, str(place.with_suffix(".pickle")), RANK=str(rank), LOCAL_RANK=str(rank), **environment)
        for rank in (0, 1)
    ]


def start(place: Path, rank: int, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    with place.with_suffix(f".{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *arguments], stderr=log, stdout=log, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )


def serving(folder: Path, number: int) -> Processes:
    """Start a server on two ranks; the second is found as its child."""
    model, place = tiny_directory(folder / "model"), folder / f"serve-{number}"
    command = ("serve", str(model), "--tensor-parallel", "2", "--device", "cpu", "--port", "0", "--max-cache-tokens", "2048")
    return [start(place, 0, "-m", "ivl", *command)]


def ask(log: Path, until: float) -> None:
    """Send requests one after another once the server listens."""
    body = json.dumps({"messages": [{"role": "user", "content": "red?"}], "max_tokens": 200}).encode()
    while time.monotonic() < until:
        if not (at := re.search(r"http://127.0.0.1:\d+/v1", log.read_text())):
            time.sleep(0.05)
            continue
        request = urllib.request.Request(f"{at[0]}/chat/completions", body, {"Content-Type": "application/json"})
        with suppress(urllib.error.URLError, TimeoutError, ConnectionError):
            urllib.request.urlopen(request, timeout=max(0.1, until - time.monotonic())).read()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill(processes: Processes, folder: Path, name: str, number: int, draw: random.Random) -> tuple[float, str]:
    """Kill or stop a rank after a while; returns the seconds until the other has ended, and its last words."""
    first, log = processes[0], folder / f"{name}-{number}.0.log"
    while len(processes) == 1 and not children(first.pid):
        time.sleep(0.05)
    until = time.monotonic() + draw.uniform(1, 25)
    if name == "serve":
        ask(log, until)
    else:
        time.sleep(max(0.0, until - time.monotonic()))
    other = processes[1].pid if len(processes) > 1 else children(first.pid)[0]
    os.kill(other, signal.SIGSTOP if number % 3 == 2 else signal.SIGKILL)
    began = time.monotonic()
    with suppress(subprocess.TimeoutExpired):
        first.wait(4 * LIMIT)
    took = time.monotonic() - began
    for pid in (other, first.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.wait()
    words = [line for line in log.read_text().splitlines() if "rank 1" in line]
    return took, words[-1][:150] if words else "it named no rank: " + log.read_text()[-200:].replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--parts", nargs="+", default=["tensor", "shards", "serve"])
    args = parser.parse_args()
    starts: dict[str, Callable[[Path, int], Processes]] = {
        "tensor": lambda folder, number: training(folder, number, tensor_parallel=2),
        "shards": lambda folder, number: training(folder, number, shard=True),
        "serve": serving,
    }
    worst = 0.0
    for part in args.parts:
        draw = random.Random(0)
        with TemporaryDirectory() as name:
            for number in range(args.moments):
                folder = Path(name)
                processes = starts[part](folder, number)
                seconds, words = kill(processes, folder, "serve" if part == "serve" else "run", number, draw)
                worst = max(worst, seconds)
                print(f"{part} {number}: {'stopped' if number % 3 == 2 else 'killed'}, {seconds:.1f} s; {words}", flush=True)
    print(f"at most {worst:.1f} s")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
