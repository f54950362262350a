"""How a process joins the ranks that a launcher started, and what limits a step in which one of them stops."""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ivl.errors import InputError
from ivl.train.world import RankLostError, World

START_TIMEOUT, STEP_TIMEOUT = timedelta(minutes=30), timedelta(minutes=5)
"""How long ranks wait for one another: while they load, save and evaluate, and within a training step after the first."""


def start_world(device: str, directory: Path | None = None) -> World:
    """Join the run that torchrun or Slurm started, over gloo on CPUs and nccl on GPUs; a world of one when neither did.

    Args:
        device: auto takes a GPU when there is one.
        directory: of the run, where NCCL's flight recorder writes what it was doing when a rank did not answer.

    Raises:
        InputError: if a GPU is asked for and there is none, or another rank does not come.
    """
    gpu = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not gpu:
        raise InputError("device is cuda but torch finds no GPU here; use --device cpu or auto")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and {"MASTER_ADDR", "SLURM_STEP_ID"} & os.environ.keys():
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        _find_address()
    rank, size, local = (int(os.environ.get(name, default)) for name, default in zip(names, ("0", "1", "0"), strict=True))
    where = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(where)
    if size == 1 or dist.is_initialized():
        return World(rank, size, where)
    if gpu and directory is not None:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(directory / "nccl-rank-"))
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise InputError(f"rank {rank} of {size} needs {' and '.join(missing)} in its environment, as torchrun sets them")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun holds the store
    try:
        store = TCPStore(host, port, size, holds, START_TIMEOUT, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        raise RankLostError(f"rank 0 ended, or never started: {host}:{port} does not answer ({error})") from None
    return join_world(store, rank, size, where)


def join_world(store: Store, rank: int, size: int, where: torch.device) -> World:
    """Join the ranks that meet at a store.

    Raises:
        RankLostError: naming the ranks that do not come, or end before all have joined.
    """
    # torchrun keeps its store when it starts the ranks again: the addresses of those that died must not be found there.
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    world = World(rank, size, where, owns_group=True, store=store)
    try:
        store.set(f"host of {rank}", socket.gethostname())
        _await_all(world, store)
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=START_TIMEOUT,
            device_id=where if where.type == "cuda" else None,
        )  # fmt: skip
    except RuntimeError as error:
        raise world.lost(error) from None
    return world


def _await_all(world: World, store: Store) -> None:
    """Wait until all ranks have come, and name those that do not."""
    until = time.monotonic() + START_TIMEOUT.total_seconds()
    for rank in range(world.size):
        while not store.check([f"host of {rank}"]):
            if time.monotonic() > until:
                late = [str(rank) for rank in range(world.size) if not store.check([f"host of {rank}"])]
                names = f"rank {late[0]}" if len(late) == 1 else f"ranks {', '.join(late)}"
                raise RankLostError(f"{names} of {world.size} ended before the ranks met, or never started")
            time.sleep(0.1)


def _find_address() -> None:
    """Let the ranks of a Slurm step meet on its first node, at a port that follows from the job's number."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
    os.environ.setdefault("MASTER_ADDR", first_host(nodes))
    job = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(20_000 + job % 20_000))


def first_host(nodes: str) -> str:
    """Return the first host of a node list as Slurm writes it: `gpu[003-007,012],login` begins with gpu003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", first[0] if first else nodes)


def stop_world(world: World) -> None:
    """End the process group that start_world made."""
    if world.owns_group:
        dist.destroy_process_group()


class Watchdog:
    """A context around a training step of several ranks, which must not take longer than STEP_TIMEOUT after the first.

    A rank that is still in a step then writes its stacks into the directory, and the ranks that wait for it get an error of
    the process group. What is done between steps may take START_TIMEOUT.
    """

    def __init__(self, world: World, directory: Path) -> None:
        self.world, self.stacks, self.limit = world, directory / f"stacks-rank-{world.rank}.txt", START_TIMEOUT
        self.file: IO[str] | None = None
        """Open from the first step to `close`: a step of many ranks must not wait for a shared file system."""

    def __enter__(self) -> Self:
        if self.world.owns_group:
            self.file = self.file or self.stacks.open("w")
            self._set_timeout(self.limit)
            faulthandler.dump_traceback_later(self.limit.total_seconds(), file=self.file)
        return self

    def __exit__(self, *_: object) -> None:
        if self.world.owns_group:
            faulthandler.cancel_dump_traceback_later()
            self._set_timeout(START_TIMEOUT)
            self.limit = STEP_TIMEOUT

    def _set_timeout(self, limit: timedelta) -> None:
        set_timeout(limit, None, *(self.world.mesh.get_all_groups() if self.world.mesh is not None else ()))

    def close(self) -> None:
        """Remove the file of stacks if there are none in it."""
        if self.file is not None:
            self.file.close()
            with suppress(OSError):
                if not self.stacks.stat().st_size:
                    self.stacks.unlink()


def set_timeout(limit: timedelta, *groups: dist.ProcessGroup | None) -> None:
    """Set how long ranks wait for one another in the groups; None is the group of all."""
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(limit, group)
