"""How a process joins the ranks that a launcher started."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from ivl.errors import InputError
from ivl.train.world import World


def start_world(device: str) -> World:
    """Join the run that torchrun or Slurm started, over gloo on CPUs and nccl on GPUs; a world of one when neither did.

    Raises:
        InputError: if a GPU is asked for and there is none; `auto` takes one when there is one.
    """
    gpu = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not gpu:
        raise InputError("device is cuda but torch finds no GPU here; use --device cpu or auto")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and "SLURM_PROCID" in os.environ:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    rank, size, local = (int(os.environ.get(name, default)) for name, default in zip(names, ("0", "1", "0"), strict=True))
    where = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(where)
    new_group = size > 1 and not dist.is_initialized()
    if new_group:
        dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=size)
    return World(rank, size, where, new_group)


def stop_world(world: World) -> None:
    """End the process group that start_world made."""
    if world.owns_group:
        dist.destroy_process_group()
