"""Checkpoints that survive being killed at any moment, and tell when a disk has changed them.

run_dir/checkpoint-N/        a complete model directory, as write_model writes it
    trainer/state.json       step, counters and the objective's state
    trainer/optimizer.safetensors
    trainer/rank-K.json      data position of each rank
    COMPLETE                 written last: size and hash of every other file

A checkpoint is written beside its place under another name, flushed to disk, and renamed. There is no generator state
to save: the loop seeds torch anew for every pack from (seed, step, pack), so resuming needs the step alone. The data
positions of all ranks are read together: another number of ranks may go on. A sharded run has each rank write what it holds,
while training goes on (ivl/parallel/saving.py); weights and optimizer are then files in shards/.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ivl.errors import InputError, short
from ivl.train.shards import StoredTensors
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


@dataclass
class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Writes run_dir/checkpoint-STEP; all ranks call save together. A context: at its end everything is on disk."""

    run_dir: Path
    write_model: Callable[[Path], None]
    """Writes the model's files into a directory; the first rank calls it."""
    world: World
    keep_last: int = 0
    """Newest checkpoints kept; 0 keeps all."""

    def save(self, step: int, *, optimizer: dict[str, torch.Tensor], state: dict[str, Any], data: dict[str, Any]) -> None:
        """Write a checkpoint, then remove older ones beyond keep_last.

        Args:
            step: steps done.
            optimizer: its state, as Optimizer.state returns it.
            state: counters and the objective's state, the same on all ranks.
            data: this rank's data position.
        """
        world, temp = self.world, self.part(step)
        try:
            self.begin(step, state, data)
            if world.is_main:
                tensors = {name: value.detach().cpu().contiguous() for name, value in optimizer.items()}
                save_file(tensors, temp / OPTIMIZER)
            world.barrier()
            if world.is_main:
                self.finish(step)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)  # the disk may be full
            raise
        world.barrier()

    def part(self, step: int) -> Path:
        """Return the directory that becomes a checkpoint when it is complete."""
        return self.run_dir / f".tmp-checkpoint-{step}"

    def begin(self, step: int, state: dict[str, Any], data: dict[str, Any]) -> None:
        """Write everything but the optimizer into the part of a checkpoint; arguments as `save`."""
        world, temp = self.world, self.part(step)
        if world.is_main:
            shutil.rmtree(temp, ignore_errors=True)
            (temp / "trainer").mkdir(parents=True)
        world.barrier()
        if not world.tensor_rank:  # tensor ranks take the same data
            write_json(temp / "trainer" / f"rank-{world.data_rank}.json", data)
        if world.is_main:
            self.write_model(temp)
            write_json(temp / STATE, {"step": step, "world_size": world.data_size, **state})

    def finish(self, step: int, hashed: dict[str, list[Any]] | None = None) -> None:
        """Seal the part that every rank has written, put it in its place, and remove older checkpoints beyond keep_last.

        Args:
            step: of the checkpoint.
            hashed: size and hash of files whose writers know them, by their names.
        """
        run_dir, temp = self.run_dir, self.part(step)
        seal(temp, MARKER, hashed)
        put_in_place(temp, run_dir / f"checkpoint-{step}")
        if self.keep_last:
            for old in [path for path in checkpoints(run_dir) if step_of(path) <= step][: -self.keep_last]:
                # Renamed first: a half-deleted directory must never look like a checkpoint.
                shutil.rmtree(old.rename(run_dir / f".tmp-{old.name}-gone"))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what `save` has begun; nothing, where save itself waits."""


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
    optimizer: StoredTensors
    positions: list[dict[str, Any]]
    """Data position of every rank that wrote the checkpoint."""


def load_trainer(checkpoint: Path, optimizer: StoredTensors) -> SavedTrainer:
    """Read what a checkpoint holds besides the model.

    Args:
        checkpoint: its directory.
        optimizer: the optimizer's tensors there.

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
