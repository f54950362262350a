"""The ranks of a run and their sums. A single process is a World of size 1 and takes the same path.

Tested on CPU processes over gloo, with replicas and with FSDP2 shards. GPUs and nccl take the same calls but have not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import Store

from ivl.errors import InputError

WorldItem = TypeVar("WorldItem")

GRACE = 10.0
"""Seconds that ranks give one another to tell that they are alive, when a message did not come."""
BUCKET = 2**25
"""Gradient elements summed over ranks in one message."""


class RankFailedError(InputError):
    """Another rank has stopped; the message is its reason."""


class RankLostError(RankFailedError):
    """Another rank has ended or does not answer, so that the ranks can do nothing together any more."""


@dataclass(frozen=True)
class World:
    """The ranks of a run; this process is `rank`."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    owns_group: bool = False
    """Whether start_world of ivl.parallel made the process group, so that stop_world ends it."""
    store: Store | None = None
    """What all ranks can write to and read without waiting for one another."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here; raises as all_reduce does."""
        self._gather({})

    def all_reduce(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum named float64 vectors over all ranks; a rank may lack names that others have.

        Raises:
            RankFailedError: if another rank has called fail.
        """
        if self.size == 1:
            return values
        total: dict[str, torch.Tensor] = {}
        for part in self._gather({name: value.tolist() for name, value in values.items()}):
            for name, numbers in part.items():
                value = torch.tensor(numbers, dtype=torch.float64)
                total[name] = total[name] + value if name in total else value
        return total

    def fail(self, reason: str) -> None:
        """Make the next barrier or all_reduce of the other ranks raise, instead of waiting for a rank that has stopped."""
        with suppress(RankFailedError):
            self._gather(reason)

    def from_first(self, function: Callable[[], WorldItem]) -> WorldItem:
        """Call a function on the first rank; returns its result (no string, see _gather), or raises its InputError, on all."""
        if not self.is_main:
            return self._gather(None)[0]
        try:
            result = function()
        except InputError as error:
            self.fail(str(error))
            raise
        self._gather(result)
        return result

    def _gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks. A string is a reason to stop."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(gathered, value)
        except RuntimeError as error:  # of the process group, which knows no names
            raise self.lost(error) from None
        if reasons := [part for part in gathered if isinstance(part, str)]:
            raise RankFailedError(reasons[0])
        return gathered

    def lost(self, error: Exception) -> RankLostError:
        """Return an error of the process group with the names of the ranks that do not meet it, too, within GRACE seconds."""
        silent: list[str] = []
        with suppress(RuntimeError):  # the store has ended with the rank that held it
            if self.store is not None:
                self.store.set_timeout(timedelta(seconds=GRACE))
                self.store.set(f"error of {self.rank}", "")
                time.sleep(GRACE)
                ranks = [rank for rank in range(self.size) if not self.store.check([f"error of {rank}"])]
                silent = [f"rank {rank} on {self.store.get(f'host of {rank}').decode()}" for rank in ranks]
        names = ", ".join(silent) or "another rank of the run"
        return RankLostError(f"{names} ended, or stopped responding ({error})")

    def all(self, condition: bool) -> bool:
        """Whether the condition holds on every rank."""
        return all(self._gather(condition))

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over ranks, in place.

        A parameter without a gradient gets a zero one on every rank, so that an update does not depend on how the packs were
        split.
        """
        bucket: list[torch.Tensor] = []
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.size == 1:
                continue
            if hasattr(parameter, "full_tensor"):
                parameter.grad.mul_(self.size)  # FSDP2's backward pass leaves the mean over ranks
                continue
            bucket.append(parameter.grad)
            size += parameter.grad.numel()
            if size >= BUCKET:
                _all_reduce(bucket)
                bucket, size = [], 0
        if bucket:
            _all_reduce(bucket)


def _all_reduce(gradients: list[torch.Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def is_sharded(model: nn.Module) -> bool:
    """Whether ivl.parallel has sharded the model."""
    return hasattr(model, "set_requires_gradient_sync")  # a method that FSDP2 adds


def reshard(model: nn.Module) -> None:
    """Give up the parameters that a forward pass without a backward pass leaves gathered, rounded to what it computes in."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


def full_tensor(tensor: Any) -> torch.Tensor:
    """Gather the whole tensor of a shard on every rank; all ranks call this together. A plain tensor passes through."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distribute(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """Return this rank's shard of a whole tensor, placed as `like` is; the whole tensor if `like` is not sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def synchronized(items: Iterator[WorldItem], world: World) -> Iterator[WorldItem]:
    """Yield items while every rank has one, since ranks that share shards must run the model together."""
    while True:
        item = next(items, None)
        if not world.all(item is not None):
            return
        assert item is not None
        yield item
