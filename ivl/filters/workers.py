"""One ordered map over chunks: in this process, in several, or on a Ray cluster. The values are the same."""

from __future__ import annotations

import importlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ivl.errors import InputError
from ivl.utils.workers import in_order

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
    if ray is None:
        yield from in_order(function, chunks, num_workers=workers, prefetch=AHEAD)
        return
    for result in _cluster(function, chunks, ray, workers):
        if isinstance(result, InputError):
            raise result
        yield result


class _Guarded:
    """Returns the InputError of a function, since a Ray actor would lose its type or show it with a traceback."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, chunk: Any) -> Any:
        try:
            return self.function(chunk)
        except InputError as error:
            return error


def _cluster(function: Callable[[Any], Any], chunks: Iterable[Any], address: str, workers: int) -> Iterator[Any]:
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
    actors = deque(actor.remote(function) for _ in range(int(ray.cluster_resources()["CPU"])))
    try:
        waiting: deque[Any] = deque()
        for chunk in chunks:
            actors.rotate()
            waiting.append(actors[0].__call__.remote(chunk))
            if len(waiting) == AHEAD * len(actors):
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    finally:
        for each in actors:
            ray.kill(each)
        if started:
            ray.shutdown()
