"""The ordered map of `ivl.utils.workers`, on a Ray cluster."""

from __future__ import annotations

import importlib
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ivl.errors import InputError
from ivl.filters.buckets import MapInOrder, R, T

AHEAD = 4
"""Calls in work for each process."""


@contextmanager
def ray_processes(*, address: str, workers: int) -> Generator[MapInOrder]:
    """A map over the processors of a cluster. Ray starts an actor that died again, with its items.

    Args:
        address: of the cluster, or `local` for one of this machine with `workers` processors (0 for all).

    Raises:
        InputError: if no cluster answers, or whatever a mapped function raises.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise InputError("ray is not installed: pip install 'ivl[ray]'") from error
    if started := not ray.is_initialized():
        local = {"num_cpus": workers or os.cpu_count(), "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"--ray {address}: no cluster answers there ({error})") from None
    actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(_Actor)
    actors = deque(actor.remote() for _ in range(int(ray.cluster_resources()["CPU"])))

    def mapped(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        sent, waiting = ray.put(function), deque()
        for item in items:
            actors.rotate()
            waiting.append(actors[0].call.remote([sent], item))
            if len(waiting) == AHEAD * len(actors):
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())

    try:
        yield mapped
    except ray.exceptions.RayTaskError as error:  # its text is a traceback
        raise error.cause from None
    finally:
        for each in actors:
            ray.kill(each)
        if started:
            ray.shutdown()


class _Actor:
    """Keeps the function that it called last, since unpickling one opens the files of the mixture."""

    def __init__(self) -> None:
        self.sent: Any = None

    def call(self, sent: list[Any], item: Any) -> Any:
        if sent != self.sent:
            self.sent, self.function = sent, importlib.import_module("ray").get(sent[0])
        return self.function(item)
