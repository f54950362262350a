"""Evaluations of a sharded model: the first rank gathers it and asks it alone, where its memory has room for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from ivl.checkpoint.model_dir import allocate, empty_model
from ivl.cpu import accelerate
from ivl.errors import InputError
from ivl.lora.layers import merged_parameters
from ivl.model.vlm import VLM
from ivl.parallel.cards import GIB
from ivl.parallel.shard import whole_parameters
from ivl.train.shards import own_part
from ivl.train.stage import trainable
from ivl.train.world import World, is_sharded
from ivl.utils.machine import free_memory

ROOM = 1.1
"""Memory that a gathered model takes, as a multiple of its weights: the key/value cache of a few replies is small."""


def ask_gathered(curve: Callable[[VLM], dict[str, float]], world: World, model: VLM) -> dict[str, float]:
    """Return the figures of a curve. Of a sharded model the first rank asks a whole copy, while the others wait."""
    if not is_sharded(model):
        return curve(model)
    whole = _gathered(model, world)
    return world.from_first(lambda: curve(cast(VLM, whole)))


@torch.no_grad()
def _gathered(model: VLM, world: World) -> VLM | None:
    """Return a whole copy in the type that the model computes in, with adapters merged; None on other ranks."""
    with whole_parameters(model, world) as get:
        if get is None:
            return None
        whole = empty_model(model.config).to(model.dtype)
        allocate(whole, model.device)
        read = merged_parameters(model, get)
        for name, parameter in whole.named_parameters():
            parameter.copy_(read(name))
    if whole.device.type == "cpu":
        accelerate(whole)
    return whole.eval()


def check_gathered_fits(model: VLM, run_dir: Path, world: World) -> None:
    """Refuse evaluations of a sharded model that the first rank has no room for.

    Raises:
        InputError: on all ranks, with the numbers and the remedy.
    """
    weights = sum(p.numel() for p in model.parameters()) * model.dtype.itemsize
    to_come = 3 * sum(own_part(p.detach()).nbytes for p in trainable(model).values())  # gradients and two moments

    def check() -> None:
        room = free_memory(str(model.device)) - to_come
        if ROOM * weights > room:
            gib, left = ROOM * weights / GIB, max(room, 0) / GIB
            raise InputError(
                f"eval_tasks gather the sharded model on the first rank, which takes {gib:.1f} GiB, and {left:.1f} GiB will be "
                f"left there: train without eval_tasks, and evaluate the checkpoints by `ivl eval {run_dir}/checkpoint-N`"
            )

    world.from_first(check)
