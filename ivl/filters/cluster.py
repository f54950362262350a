"""The ordered map of `ivl.utils.workers`, on a Ray cluster."""

from __future__ import annotations

import importlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ivl.errors import InputError

AHEAD = 4
"""Calls in work for each process."""


def in_order_on_ray(function: Callable[[Any], Any], items: Iterable[Any], *, address: str, workers: int) -> Iterator[Any]:
    """Yield function(item) for each item, in order. Ray starts an actor that died again, with its items.

    Args:
        function: is sent to an actor for each processor of the cluster, once.
        address: of the cluster, or `local` for one of this machine with `workers` processors (0 for all).

    Raises:
        InputError: if no cluster answers, or whatever the function raises.
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
    actors = deque(actor.remote(function) for _ in range(int(ray.cluster_resources()["CPU"])))
    waiting: deque[Any] = deque()
    try:
        for item in items:
            actors.rotate()
            waiting.append(actors[0].call.remote(item))
            if len(waiting) == AHEAD * len(actors):
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except ray.exceptions.RayTaskError as error:  # its text is a traceback
        raise error.cause from None
    finally:
        for each in actors:
            ray.kill(each)
        if started:
            ray.shutdown()


class _Actor:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def call(self, item: Any) -> Any:
        return self.function(item)
