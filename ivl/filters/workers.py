"""One ordered map over chunks: in this process, in several, or on a Ray cluster. The values are the same."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from ivl.errors import InputError

C, R = TypeVar("C"), TypeVar("R")
AHEAD = 4
"""Chunks in work for each process."""


def ordered_map(function: Callable[[C], R], chunks: Iterable[C], *, workers: int = 0, ray: str | None = None) -> Iterator[R]:
    """Yield function(chunk) for each chunk, in order.

    Args:
        function: what each process gets once, pickled; it may keep files open between chunks.
        workers: processes of this machine; 0 computes here.
        ray: address of a cluster, or `local` for one of this machine with `workers` processors.

    Raises:
        InputError: if a worker dies or no cluster answers, and whatever the function raises.
    """
    if not workers and ray is None:
        yield from map(function, chunks)
        return
    with _processes(function, workers) if ray is None else _cluster(function, ray, workers) as (submit, count):
        waiting: deque[Future[R]] = deque()
        for chunk in chunks:
            if len(waiting) == AHEAD * count:
                yield waiting.popleft().result()
            waiting.append(submit(chunk))
        while waiting:
            yield waiting.popleft().result()


Pool = Iterator[tuple[Callable[[Any], Future[Any]], int]]
"""A function that submits a chunk, and the number of processes."""


@contextmanager
def _processes(function: Callable[[Any], Any], workers: int) -> Pool:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (function,))
    try:
        yield lambda chunk: pool.submit(_call, chunk), workers
    except BrokenProcessPool:
        raise InputError("a worker process died, most likely for want of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]
"""The function of this worker process."""


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone: one that was killed cannot tell its workers to end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(chunk: Any) -> Any:
    return _function(chunk)


@contextmanager
def _cluster(function: Callable[[Any], Any], address: str, workers: int) -> Pool:
    """Start a Ray actor for each processor. Ray starts an actor that died again, and gives it its chunks again."""
    try:
        import ray
    except ImportError as error:
        raise InputError("ray is not installed: pip install 'ivl[ray]'") from error
    started = not ray.is_initialized()
    if started:
        local = {"num_cpus": workers or os.cpu_count(), "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"--ray {address}: no cluster answers there ({error})") from None

    class Worker:
        def call(self, chunk: Any) -> Any:
            return function(chunk)

    kind = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Worker)
    actors = deque(kind.remote() for _ in range(int(ray.cluster_resources()["CPU"])))

    def submit(chunk: Any) -> Future[Any]:
        actors.rotate()
        return actors[0].call.remote(chunk).future()

    try:
        yield submit, len(actors)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        for actor in actors:
            ray.kill(actor)
        if started:
            ray.shutdown()
