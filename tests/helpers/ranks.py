"""Ranks over gloo as forked processes: they start at once, for everything is imported already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch
import torch._dynamo
import torch.distributed.fsdp  # both once here: forked processes inherit them


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_ranks(world_size: int, function: Callable[..., None], *args, exitcode: int = 0) -> None:
    """Call function(rank, *args) on every rank, as torchrun would start it; each must end with this exit code."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_start, args=(rank, world_size, port, function, args)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == exitcode


def _start(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    function(rank, *args)
