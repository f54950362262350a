"""Pointwise outcomes of blocks of rows, in order: in this process, in several, or on a Ray cluster. The values are the same."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ivl.errors import InputError
from ivl.filters.chain import Outcome, Pointwise

Place = tuple[int, int]
"""Data set and row."""
AHEAD = 4
"""Blocks in work for each process."""


@dataclass(frozen=True)
class Blocks:
    """All rows of all data sets in order, cut into blocks of `size` from row `start` on."""

    counts: tuple[int, ...]
    """Rows of each data set."""
    start: int
    size: int

    def __len__(self) -> int:
        return -(-max(0, sum(self.counts) - self.start) // self.size)

    def __getitem__(self, block: int) -> list[Place]:
        low = self.start + block * self.size
        position_N = np.arange(low, min(low + self.size, sum(self.counts)))
        ends = np.cumsum(self.counts)
        dataset_N = np.searchsorted(ends, position_N, side="right")
        row_N = position_N - np.concatenate([[0], ends])[dataset_N]
        return list(zip(dataset_N.tolist(), row_N.tolist(), strict=True))


Results = Iterator[tuple[list[Place], list[Outcome]]]


def outcomes(pointwise: Pointwise, blocks: Blocks, *, workers: int = 0, ray: str | None = None) -> Results:
    """Each block with its outcomes, in order.

    workers: processes of this machine; 0 computes here. ray: address of a cluster, or `local` for one of this machine.
    """
    if ray is not None:
        return _with_ray(pointwise, blocks, ray, workers)
    if workers:
        return _with_processes(pointwise, blocks, workers)
    return ((blocks[n], pointwise(blocks[n])) for n in range(len(blocks)))


_worker: Pointwise | None = None


def _start_worker(pointwise: Pointwise, parent: int) -> None:
    global _worker
    _worker = pointwise
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A parent that was killed cannot tell its workers to end."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(places: list[Place]) -> list[Outcome]:
    assert _worker is not None
    return _worker(places)


def _with_processes(pointwise: Pointwise, blocks: Blocks, workers: int) -> Results:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (pointwise, os.getpid()))
    waiting: deque[tuple[list[Place], Future[list[Outcome]]]] = deque()
    todo = iter(range(len(blocks)))
    try:
        while True:
            for block in islice(todo, AHEAD * workers - len(waiting)):
                waiting.append((blocks[block], pool.submit(_work, blocks[block])))
            if not waiting:
                return
            places, done = waiting.popleft()
            yield places, done.result()
    except BrokenProcessPool:
        raise InputError("a worker process died, most likely for want of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _with_ray(pointwise: Pointwise, blocks: Blocks, address: str, workers: int) -> Results:
    """Ray Data keeps the order of blocks; outcomes travel as JSON."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("ray is not installed: pip install 'ivl[ray]'") from error

    started = not ray.is_initialized()
    if started:
        local = {"num_cpus": workers or os.cpu_count(), "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"--ray {address}: no cluster answers there ({error})") from None
    try:
        if not len(blocks):
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False

        def compute(row: dict[str, Any]) -> dict[str, Any]:
            block = int(row["id"])
            try:
                return {"block": block, "said": json.dumps([each.to_json() for each in pointwise(blocks[block])]), "error": ""}
            except InputError as error:
                return {"block": block, "said": "", "error": str(error)}

        # A task of several blocks opens the files once.
        tasks = min(len(blocks), 10_000)
        found = ray.data.range(len(blocks), override_num_blocks=tasks).map(compute)
        with contextlib.closing(iter(found.iter_rows())) as rows:  # type: ignore[type-var]
            for expected, row in enumerate(rows):
                if row["error"]:
                    raise InputError(row["error"])
                if row["block"] != expected:
                    raise RuntimeError(f"Ray returned block {row['block']} where {expected} was due")
                yield blocks[expected], [Outcome.from_json(each) for each in json.loads(row["said"])]
    finally:
        if started:
            ray.shutdown()
