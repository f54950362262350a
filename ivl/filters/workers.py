"""One ordered map over chunks: in this process, in several, or on a Ray cluster. The values are the same."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from ivl.errors import InputError

C = TypeVar("C")
R = TypeVar("R")
AHEAD = 4
"""Chunks in work for each process."""


def ordered_map(function: Callable[[C], R], chunks: Iterable[C], *, workers: int = 0, ray: str | None = None) -> Iterator[R]:
    """Yield function(chunk) for each chunk, in order.

    Args:
        function: is sent to each process once.
        workers: processes of this machine; 0 computes here.
        ray: address of a cluster, or `local` for one of this machine with `workers` processors.

    Raises:
        InputError: if a worker dies or no cluster answers, and whatever InputError the function raises.
    """
    guarded = _Guarded(function)
    for result in _loader(guarded, chunks, workers) if ray is None else _cluster(guarded, chunks, ray, workers):
        if isinstance(result, InputError):
            raise result
        yield result


class _Guarded(Dataset):
    """Returns the InputError of a function, since a process would lose its type or show it with a traceback."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, chunk: Any) -> Any:
        try:
            return self.function(chunk)
        except InputError as error:
            return error


def _loader(function: _Guarded, chunks: Iterable[Any], workers: int) -> Iterator[Any]:
    options = {"prefetch_factor": AHEAD, "multiprocessing_context": "fork" if sys.platform == "linux" else "spawn"}
    loader = DataLoader(
        function, batch_size=None, sampler=chunks, num_workers=workers, collate_fn=_same, **(options if workers else {})
    )  # fmt: skip
    try:
        yield from loader
    except RuntimeError as error:
        if "worker" in str(error) and "exited unexpectedly" in str(error):
            raise InputError("a worker process died, most likely for want of memory; try fewer --workers") from None
        raise


def _same(value: Any) -> Any:
    return value


def _cluster(function: _Guarded, chunks: Iterable[Any], address: str, workers: int) -> Iterator[Any]:
    """Give the chunks to an actor for each processor. Ray starts an actor that died again, with its chunks."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise InputError("ray is not installed: pip install 'ivl[ray]'") from error
    started = not ray.is_initialized()
    if started:
        local = {"num_cpus": workers or os.cpu_count(), "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"--ray {address}: no cluster answers there ({error})") from None
    actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(_Guarded)
    actors = deque(actor.remote(function.function) for _ in range(int(ray.cluster_resources()["CPU"])))
    try:
        waiting: deque[Any] = deque()
        for chunk in chunks:
            actors.rotate()
            waiting.append(actors[0].__getitem__.remote(chunk))
            if len(waiting) == AHEAD * len(actors):
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    finally:
        for each in actors:
            ray.kill(each)
        if started:
            ray.shutdown()
