"""Several processes as one: sums over ranks. A single process is a World of size 1 and takes the same path."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ivl.errors import InputError

BUCKET = 2**25
"""Gradient elements summed over ranks in one message."""


@dataclass(frozen=True)
class World:
    """The processes of a run; this one is `rank`."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add up named float64 vectors of all ranks; a rank may lack names that others have."""
        if self.size == 1:
            return values
        gathered: list[dict[str, list[float]]] = [{} for _ in range(self.size)]
        dist.all_gather_object(gathered, {name: value.tolist() for name, value in values.items()})
        total: dict[str, torch.Tensor] = {}
        for part in gathered:
            for name, numbers in part.items():
                value = torch.tensor(numbers, dtype=torch.float64)
                total[name] = total[name] + value if name in total else value
        return total

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up gradients over ranks, in place. A parameter that was not used gets a zero gradient on every rank, so
        that an update never depends on how the work was split."""
        bucket: list[torch.Tensor] = []
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.size == 1:
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


def pick_device(device: str) -> str:
    """`auto` is a GPU when there is one.

    Raises:
        InputError: if a GPU is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda but torch finds no GPU here; use --device cpu or auto")
    return device


def start_world(device: str) -> World:
    """Join the run that torchrun or Slurm started; alone when neither did. gloo on CPUs, nccl on GPUs."""
    kind = pick_device(device)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and "SLURM_PROCID" in os.environ:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    rank, size, local = (int(os.environ.get(name, default)) for name, default in zip(names, ("0", "1", "0"), strict=True))
    where = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(where)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=size)
    return World(rank, size, where)


def stop_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
