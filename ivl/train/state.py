"""Checkpoints that survive being killed at any moment, and tell when a disk has changed them.

run_dir/checkpoint-N/        a complete model directory, as write_model writes it
    trainer/state.json       step, counters and the objective's state
    trainer/optimizer.safetensors
    trainer/rank-K.json      data position of each rank
    COMPLETE                 written last: size and hash of every other file

A checkpoint is written beside its place under another name, flushed to disk, and renamed. There is no generator state
to save: the loop seeds torch anew for every pack from (seed, step, pack), so resuming needs the step alone. Weights and
optimizer are saved whole, also of a sharded run, and the data positions of all ranks are read together: another number of
ranks may go on.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ivl.errors import InputError, short
from ivl.train.world import World
from ivl.utils.files import write_json
from ivl.utils.sealed import check_sealed, put_in_place, seal
from ivl.utils.strict_json import from_json, read_json

MARKER = "COMPLETE"
STATE, OPTIMIZER = "trainer/state.json", "trainer/optimizer.safetensors"


@dataclass
class Counters:
    """What a run has done so far, over all ranks."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes run_dir/checkpoint-STEP; all ranks call save together."""

    run_dir: Path
    write_model: Callable[[Path], None]
    """Writes model files into a directory. Every rank calls it, for it may gather shards; only the first should write."""
    world: World
    keep_last: int = 0
    """Newest checkpoints kept; 0 keeps all."""

    def save(self, step: int, *, optimizer: dict[str, torch.Tensor], state: dict[str, Any], data: dict[str, Any]) -> Path:
        """Write a checkpoint, then remove older ones beyond keep_last.

        Args:
            step: steps done.
            optimizer: whole tensors; read on the first rank only.
            state: counters and the objective's state, the same on all ranks.
            data: this rank's data position.
        """
        run_dir, world = self.run_dir, self.world
        final, temp = run_dir / f"checkpoint-{step}", run_dir / f".tmp-checkpoint-{step}"
        if world.is_main:
            shutil.rmtree(temp, ignore_errors=True)
            (temp / "trainer").mkdir(parents=True)
        world.barrier()
        try:
            write_json(temp / "trainer" / f"rank-{world.rank}.json", data)
            self.write_model(temp)
            if world.is_main:
                tensors = {name: value.detach().cpu().contiguous() for name, value in optimizer.items()}
                save_file(tensors, temp / OPTIMIZER)
                write_json(temp / STATE, {"step": step, "world_size": world.size, **state})
            world.barrier()
            if world.is_main:
                seal(temp, MARKER)
                put_in_place(temp, final)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)  # the disk may be full
            raise
        if world.is_main and self.keep_last:
            for old in [path for path in checkpoints(run_dir) if step_of(path) <= step][: -self.keep_last]:
                # Renamed first: a half-deleted directory must never look like a checkpoint.
                shutil.rmtree(old.rename(run_dir / f".tmp-{old.name}-gone"))
        world.barrier()
        return final


@dataclass(frozen=True)
class TrainerState:
    """What state.json of a checkpoint holds."""

    step: int
    world_size: int
    counters: Counters
    objective: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if min(self.step, self.world_size) < 1 or self.counters.step != self.step:
            raise InputError(f"step and world_size must be >= 1, and step that of counters, got {short(vars(self))}")


@dataclass(frozen=True)
class SavedTrainer:
    """What a checkpoint holds besides the model."""

    checkpoint: Path
    step: int
    counters: Counters
    objective: dict[str, Any]
    optimizer: dict[str, torch.Tensor]
    positions: list[dict[str, Any]]
    """Data position of every rank that wrote the checkpoint."""


def load_trainer(checkpoint: Path) -> SavedTrainer:
    """Read what a checkpoint holds besides the model.

    Raises:
        InputError: naming the file that is not what it should be.
    """
    state = from_json(TrainerState, read_json(checkpoint / STATE), f"{checkpoint / STATE}")
    if state.step != step_of(checkpoint):
        raise InputError(f"{checkpoint / STATE}: is of step {short(state.step)}")
    positions = []
    for rank in range(state.world_size):
        path = checkpoint / "trainer" / f"rank-{rank}.json"
        positions.append(read_json(path))
        if not isinstance(positions[-1], dict):
            raise InputError(f"{path}: must be an object, got {short(positions[-1])}")
    try:
        optimizer = load_file(checkpoint / OPTIMIZER)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{checkpoint / OPTIMIZER}: cannot be read ({error})") from None
    return SavedTrainer(checkpoint, state.step, state.counters, state.objective or {}, optimizer, positions)


def checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints that hold what ivl wrote and nothing else, by names and sizes alone; oldest first."""
    found = []
    for path in places(run_dir):
        with suppress(InputError):
            names = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
            if names == check_sealed(path, MARKER, content=False) and not path.is_symlink():
                found.append(path)
    return found


def places(run_dir: Path) -> list[Path]:
    """List what is called checkpoint-N in a run's directory, by N: sound, damaged or somebody else's."""
    named = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name)]
    return sorted(named, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name has."""
    return int(checkpoint.name.split("-")[1])
