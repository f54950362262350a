"""Checkpoints that survive being killed at any moment.

run_dir/checkpoint-N/        a complete model directory, as write_model writes it
    trainer/state.json       step, counters and the objective's state
    trainer/optimizer.safetensors
    trainer/rank-K.json      data position of each rank
    COMPLETE                 written last: every other file and its size

A checkpoint is written beside its place under another name, flushed to disk, and renamed. There is no generator state
to save: the loop seeds torch anew for every pack from (seed, step, pack), so resuming needs the step alone. Weights and
optimizer are saved whole, also of a sharded run, and the data positions of all ranks are read together: another number of
ranks may go on.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ivl.errors import InputError
from ivl.train.world import World
from ivl.utils.files import sync, write_json

MARKER = "COMPLETE"


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
        write_json(temp / "trainer" / f"rank-{world.rank}.json", data)
        self.write_model(temp)
        if world.is_main:
            tensors = {name: value.detach().cpu().contiguous() for name, value in optimizer.items()}
            save_file(tensors, temp / "trainer" / "optimizer.safetensors")
            write_json(temp / "trainer" / "state.json", {"step": step, "world_size": world.size, **state})
        world.barrier()
        if world.is_main:
            _complete(temp, final)
            if self.keep_last:
                for old in checkpoints(run_dir)[: -self.keep_last]:
                    _remove(old)
        world.barrier()
        return final


def _complete(temp: Path, final: Path) -> None:
    """Flush every file, write the marker, and rename the directory to its final place."""
    files = sorted(p for p in temp.rglob("*") if p.is_file())
    sizes = {p.relative_to(temp).as_posix(): p.stat().st_size for p in files}
    for path in (*files, *(p for p in temp.rglob("*") if p.is_dir())):
        sync(path)
    write_json(temp / MARKER, sizes)
    _remove(final)  # an incomplete directory of this name, or that of a run which does the same step again
    temp.rename(final)
    sync(final.parent)


@dataclass(frozen=True)
class SavedTrainer:
    """What a checkpoint holds besides the model."""

    step: int
    counters: dict[str, Any]
    objective: dict[str, Any]
    optimizer: dict[str, torch.Tensor]
    positions: list[dict[str, Any]]
    """Data position of every rank that wrote the checkpoint."""


def load_trainer(checkpoint: Path) -> SavedTrainer:
    """Read what a checkpoint holds besides the model.

    Raises:
        InputError: if the checkpoint is not complete.
    """
    if not is_complete(checkpoint):
        raise InputError(f"{checkpoint}: not a complete checkpoint (no {MARKER} marker, or files differ from it)")
    state = json.loads((checkpoint / "trainer" / "state.json").read_text(encoding="utf-8"))
    files = [checkpoint / "trainer" / f"rank-{rank}.json" for rank in range(state["world_size"])]
    return SavedTrainer(
        step=state["step"],
        counters=state["counters"],
        objective=state.get("objective") or {},
        optimizer=load_file(checkpoint / "trainer" / "optimizer.safetensors"),
        positions=[json.loads(file.read_text(encoding="utf-8")) for file in files],
    )


def checkpoints(run_dir: Path) -> list[Path]:
    """List complete checkpoints, oldest first."""
    named = [p for p in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and is_complete(p)]
    return sorted(named, key=lambda p: int(p.name.split("-")[1]))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run."""
    return next(reversed(checkpoints(run_dir)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there and every file it lists has its size."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def clean(run_dir: Path) -> list[str]:
    """Remove what an interrupted save or removal left behind; returns the names."""
    left = [p for p in run_dir.glob(".tmp-checkpoint-*") if p.is_dir()]
    left += [p for p in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and not is_complete(p)]
    for path in left:
        shutil.rmtree(path)
    return sorted(p.name for p in left)


def _remove(directory: Path) -> None:
    """Rename, then delete: a half-deleted directory must never look like a checkpoint."""
    if directory.exists():
        gone = directory.with_name(f".tmp-{directory.name}-gone")
        shutil.rmtree(gone, ignore_errors=True)
        directory.rename(gone)
        shutil.rmtree(gone)
