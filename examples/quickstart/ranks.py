"""Several processes of this machine that train as the ranks of one run.

A small model's tensors are too small for the threads of a CPU to share, but ranks share the packs without loss.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from ivl.errors import InputError


def spawn(function: Callable[..., None], args: tuple[Any, ...], num_ranks: int) -> None:
    """Call function(*args) in num_ranks processes; start_world then joins them to one run. They divide the cores.

    Raises:
        InputError: if a rank failed; its standard error says why.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks) if hasattr(os, "sched_getaffinity") else 1
    processes = [
        mp.get_context("spawn").Process(target=_as_rank, args=(rank, num_ranks, port, threads, function, args))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        # A rank would wait long for one that has failed, so the first failure ends all of them.
        # wait() of an empty list never returns, so the list of live ranks is made once a turn.
        while (alive := [p.sentinel for p in processes if p.is_alive()]) and not any(p.exitcode for p in processes):
            wait(alive)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
    if failed := [rank for rank, p in enumerate(processes) if p.exitcode]:
        raise InputError(f"rank {failed[0]} of {num_ranks} failed, see above")


def _as_rank(rank: int, num_ranks: int, port: int, threads: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(threads)
    # One group serves all runs of the function: a second one at the same address would meet the first one's leftovers.
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    try:
        function(*args)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    dist.destroy_process_group()
