"""Checkpoints that survive being killed at any moment.

run_dir/checkpoint-N/        a complete model directory, as write_model makes it
    trainer/state.json       step, counters, and what the caller adds
    trainer/optimizer.safetensors
    trainer/rank-K.json      data position of each rank
    COMPLETE                 written last: every other file and its size

A checkpoint is written beside its place under another name, flushed to disk, and renamed. There is no generator state
to save: the loop seeds torch anew for every pack from (seed, step, pack), so resuming needs the step alone. Weights and
optimiser are saved whole, also of a sharded run, and the data positions of all ranks are read together: another number of
ranks may go on.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ivl.errors import InputError
from ivl.train.world import World
from ivl.utils.files import sync

MARKER = "COMPLETE"


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    optimizer: dict[str, torch.Tensor],
    state: dict,
    data: dict,
    world: World,
    keep_last: int = 0,
) -> Path:
    """Write run_dir/checkpoint-STEP; every rank calls this. Older ones beyond keep_last go afterwards (0 keeps all)."""
    final, temp = run_dir / f"checkpoint-{step}", run_dir / f".tmp-checkpoint-{step}"
    if world.is_main:
        shutil.rmtree(temp, ignore_errors=True)
        (temp / "trainer").mkdir(parents=True)
    world.barrier()
    _write_json(temp / "trainer" / f"rank-{world.rank}.json", data)
    write_model(temp)
    if world.is_main:
        tensors = {name: value.detach().cpu().contiguous() for name, value in optimizer.items()}
        save_file(tensors, temp / "trainer" / "optimizer.safetensors")
        _write_json(temp / "trainer" / "state.json", {"step": step, "world_size": world.size, **state})
    world.barrier()
    if world.is_main:
        files = sorted(p for p in temp.rglob("*") if p.is_file())
        sizes = {p.relative_to(temp).as_posix(): p.stat().st_size for p in files}
        for path in (*files, *(p for p in temp.rglob("*") if p.is_dir())):
            sync(path)
        _write_json(temp / MARKER, sizes)
        sync(temp / MARKER)
        sync(temp)
        _remove(final)  # an incomplete directory of this name, or a run that went over the same step again
        temp.rename(final)
        sync(run_dir)
        if keep_last:
            for old in checkpoints(run_dir)[:-keep_last]:
                _remove(old)
    world.barrier()
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and is_complete(p)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
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


def load_trainer(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict, list[dict]]:
    """Optimiser tensors, state and the data position of every rank that wrote it.

    Raises:
        InputError: if the checkpoint is not complete.
    """
    if not is_complete(checkpoint):
        raise InputError(f"{checkpoint}: not a complete checkpoint (no {MARKER} marker, or files differ from it)")
    state = json.loads((checkpoint / "trainer" / "state.json").read_text(encoding="utf-8"))
    files = [checkpoint / "trainer" / f"rank-{rank}.json" for rank in range(state["world_size"])]
    positions = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return load_file(checkpoint / "trainer" / "optimizer.safetensors"), state, positions


def _remove(directory: Path) -> None:
    """Rename first: a half-removed directory must never look like a checkpoint."""
    if directory.exists():
        gone = directory.with_name(f".tmp-{directory.name}-gone")
        shutil.rmtree(gone, ignore_errors=True)
        directory.rename(gone)
        shutil.rmtree(gone)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
