"""One model on several processes: starts them or meets them, loads everybody's share, and leads on rank 0.

On one machine the process that loads is rank 0 and starts the others, which end with it. Under torchrun or Slurm all are there.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ivl import gpu
from ivl.checkpoint import load_config
from ivl.errors import InputError
from ivl.generators import LoadConfig
from ivl.generators.local import load_parts
from ivl.inference.engine import Engine
from ivl.parallel.follow import Channel, LeadingEngine, follow
from ivl.parallel.launch import START_TIMEOUT, join_world, start_world
from ivl.parallel.tensor import TensorVLM, local_config, split
from ivl.processing.processor import Processor
from ivl.train.world import World

Result = TypeVar("Result")
Processes = dict[int, subprocess.Popen[bytes]]
"""Other ranks that this process has started."""


def load_shared(directory: Path, config: LoadConfig, options: dict[str, Any]) -> LeadingEngine:
    """Load a model on config.tensor_parallel processes, and return the engine of rank 0.

    On other ranks of torchrun this follows rank 0 until it ends, and then raises SystemExit.

    Args:
        options: arguments of Engine.

    Raises:
        InputError: if the model cannot be shared so, there are other processes or GPUs than it needs, or one of them fails.
    """
    count = config.tensor_parallel
    local_config(load_config(directory), count)
    if config.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"tensor_parallel takes a GPU a process: device is auto, cuda or cpu, got {config.device}")
    if dist.is_initialized():
        raise InputError("this process belongs to a group already: close the engine of the other model first")
    world, processes = start_world(config.device), Processes()
    if world.size == 1:
        world, processes = start_ranks(directory, config)
    elif world.size != count:
        raise InputError(f"tensor_parallel {count} needs {count} processes, torchrun has started {world.size}")
    try:
        world = _together(partial(world.arranged, tensor=count), processes)
        model, processor = _load(directory, config, world)
        assert world.store is not None
        if world.rank:
            world.store.set(f"loaded {world.rank}", "")
        else:
            for rank in range(1, count):
                _wait(world, f"loaded {rank}", processes)
        channel = _together(partial(Channel, world, model), processes)
        if world.rank:
            _follow(model, processor, channel)
        engine = LeadingEngine(
            model, processor, channel, ended=partial(_ended, processes), at_end=partial(_await_end, processes), **options
        )
        if world.device.type == "cuda":
            gpu.accelerate(engine)
        size = engine.cache.block_size
        options = options | {"max_cache_tokens": engine.cache.num_blocks * size, "block_size": size}
        world.store.set("options", json.dumps(options))
        engine.start()
    except BaseException:
        _stop(processes)
        raise
    atexit.register(engine.close)
    return engine


def start_ranks(directory: Path, config: LoadConfig) -> tuple[World, Processes]:
    """Start the other ranks on this machine and meet them."""
    count, on_gpus = config.tensor_parallel, config.device != "cpu" and torch.cuda.is_available()
    if on_gpus and torch.cuda.device_count() < count:
        here = f"this machine has {torch.cuda.device_count()}"
        raise InputError(f"tensor_parallel {count} needs {count} GPUs, {here}: torchrun takes those of several machines")
    store = TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False, timeout=START_TIMEOUT)
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count),
        "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    command = [sys.executable, "-m", __name__, str(directory), json.dumps(asdict(config))]
    processes = Processes()
    for rank in range(1, count):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes[rank] = subprocess.Popen(command, env=own, stdin=subprocess.PIPE, start_new_session=True)
    device = torch.device("cuda", 0) if on_gpus else torch.device("cpu")
    try:
        return _together(partial(join_world, store, 0, count, device), processes), processes
    except BaseException:
        _stop(processes)
        raise


def _load(directory: Path, config: LoadConfig, world: World) -> tuple[TensorVLM, Processor]:
    """Load this rank's share."""
    if world.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // world.size))
    models, processor = load_parts(directory, config, str(world.device), partial(split, world=world))
    model = models[""]
    assert isinstance(model, TensorVLM)
    return model, processor


def _follow(model: Any, processor: Any, channel: Channel) -> None:
    """Follow rank 0 to its end, and end."""
    world = channel.world
    assert world.store is not None
    world.store.set_timeout(START_TIMEOUT)
    options: dict[str, Any] = json.loads(world.store.get("options"))
    try:
        engine = Engine(model, processor, **options)
        if world.device.type == "cuda":
            gpu.accelerate(engine)
        follow(engine, channel)
    except RuntimeError as error:
        print(f"rank {world.rank} ends, for another rank has ended or does not answer: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    dist.destroy_process_group()
    raise SystemExit(0)


def _together(function: Callable[[], Result], processes: Processes) -> Result:
    """Call a function that all ranks call together. Raises InputError if one that this process has started ends or is stopped.

    The process group would wait half an hour for that rank, and cannot be interrupted: so a thread calls the function, which
    is left behind then.
    """
    if not processes:
        return function()
    done: Future[Result] = Future()

    def call() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    while not wait([done], 0.02).done:
        _check(processes)
    return done.result()


def _wait(world: World, key: str, processes: Processes) -> None:
    """Wait until a rank has set a key. Raises InputError if it ends or is stopped before."""
    assert world.store is not None
    until = time.monotonic() + START_TIMEOUT.total_seconds()
    while not world.store.check([key]):
        _check(processes)
        if time.monotonic() > until:
            raise InputError(f"a rank is not {key}")
        time.sleep(0.02)


def _check(processes: Processes) -> None:
    if (name := _ended(processes, True)) is not None:
        raise InputError(f"{name} while it loaded the model")


def _ended(processes: Processes, or_stopped: bool) -> str | None:
    """Name a process that has ended, or one that a signal has stopped."""
    for rank, process in processes.items():
        if (code := process.poll()) is not None:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return f"rank {rank} (process {process.pid}) {how}"
    return _stopped(processes) if or_stopped else None


def _stopped(processes: Processes) -> str | None:
    """Name a process that a signal has stopped: it does not end."""
    for rank, process in processes.items():
        with suppress(ChildProcessError):  # it has just ended
            if os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None:
                return f"rank {rank} (process {process.pid}) was stopped by a signal"
    return None


def _stop(processes: Processes) -> None:
    for process in processes.values():
        process.kill()
        process.wait()


def _await_end(processes: Processes, told: bool) -> None:
    """Wait for processes that were told to end, and end those that do not."""
    for process in processes.values() if told else ():
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    _stop(processes)
    with suppress(RuntimeError, ValueError):
        dist.destroy_process_group()


def main() -> None:
    """Be one of the other ranks; `start_ranks` calls this in a process of its own."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    load_shared(Path(sys.argv[1]), LoadConfig(**json.loads(sys.argv[2])), {})


def _end_with_parent() -> None:
    """End this process when rank 0 has ended, however that was: its end of the pipe is closed then."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
