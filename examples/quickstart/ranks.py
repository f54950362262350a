"""Several processes of this machine that train as the ranks of one run.

A small model's tensors are too small for the threads of a CPU to share, but ranks share the packs without loss.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ivl.errors import InputError

PATIENCE = 30
"""Seconds in which ranks that were asked to end may save a checkpoint; then they are killed."""


def spawn(function: Callable[..., None], args: tuple[Any, ...], num_ranks: int) -> None:
    """Call function(*args) in num_ranks processes; start_world then joins them to one run. They divide the cores.

    Raises:
        InputError: if a rank failed; its standard error says why.
        KeyboardInterrupt: once the ranks have ended, if this process was interrupted; SystemExit, if it was told to end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks) if hasattr(os, "sched_getaffinity") else 1
    command = [sys.executable, "-m", "examples.quickstart.ranks", str(num_ranks), str(port), str(threads)]
    ranks: list[subprocess.Popen[bytes]] = []
    with _passed_on(ranks) as signals:
        try:
            for rank in range(num_ranks):
                # In a group of its own a rank does not get the terminal's Ctrl-C beside the signal that is passed on.
                process = subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE, process_group=0)
                ranks.append(process)
                assert process.stdin is not None
                process.stdin.write(pickle.dumps((function, args)))
                process.stdin.close()
            # A rank would wait long for one that has failed, so the first failure ends all of them.
            while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
                time.sleep(0.1)
        finally:
            _end(ranks, told=bool(signals))
    if signals:
        raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])
    if failed := [rank for rank, process in enumerate(ranks) if process.returncode]:
        raise InputError(f"rank {failed[0]} of {num_ranks} failed, see above")


@contextmanager
def _passed_on(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the ranks, as the SIGTERM at which they save a checkpoint; yields the signals that came."""
    came: list[int] = []

    def pass_on(number: int, _: object) -> None:
        came.append(number)
        for rank in ranks:
            rank.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(ranks: list[subprocess.Popen[bytes]], *, told: bool) -> None:
    """Wait until every rank has ended. Those that run are told to, if no signal has told them yet."""
    last = time.monotonic() + PATIENCE
    for rank in ranks:
        if rank.poll() is None and not told:
            rank.terminate()
    for rank in ranks:
        try:
            rank.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _as_rank(num_ranks: int, port: int, threads: int, rank: int) -> None:
    """Call the function that standard input names, as one of the ranks."""
    function, args = pickle.load(sys.stdin.buffer)
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


if __name__ == "__main__":
    _as_rank(*map(int, sys.argv[1:]))
