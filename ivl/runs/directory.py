"""The directory of a run: starting and resuming it, what it records, its checkpoints and its final model."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ivl.checkpoint import save_model, save_processor
from ivl.checkpoint.adapter import save_adapter
from ivl.checkpoint.model_dir import empty_model, save_config
from ivl.checkpoint.shards import ShardedWeights, is_sharded_checkpoint
from ivl.checkpoint.tensor_file import TensorFile
from ivl.data.loader import Loader
from ivl.data.mixture import load_mixture
from ivl.errors import InputError, short
from ivl.formats.rows import row_files
from ivl.lora.layers import merged_parameters
from ivl.model.vlm import VLM
from ivl.parallel.shard import ReadWhole, is_shared, whole_parameters
from ivl.processing.processor import Processor
from ivl.runs.build import TRAINABLE
from ivl.runs.config import RunConfig, differences, run_config, to_json
from ivl.train.stage import trainable
from ivl.train.state import MARKER, OPTIMIZER, CheckpointWriter, SavedTrainer, load_trainer, places, step_of
from ivl.train.world import World, cuts_of
from ivl.utils.files import locked, not_utf8, real, write_json
from ivl.utils.sealed import check_sealed, put_in_place
from ivl.utils.strict_json import read_json
from ivl.utils.terminal import printable

CONFIG = "run.json"
RESULTS = (
    "model", "best", "adapter", "reference", "tensorboard", "metrics.jsonl", "environment.json", "data_report.json", "loss.png",
)  # fmt: skip
"""What a run writes beside its configuration and its checkpoints."""
PACKAGES = ("ivl", "torch", "numpy", "pillow", "safetensors", "tokenizers", "huggingface-hub")


@dataclass(frozen=True)
class RunStart:
    """Where a run begins: the checkpoint to go on from, None for the first step; and whether it has a final model."""

    checkpoint: Path | None
    finished: bool


@contextmanager
def open_directory(config: RunConfig, world: World, *, resume: bool, allow_changed: bool) -> Iterator[RunStart]:
    """Hold the run's directory for this process and the other ranks. No file of it changes before `begin`.

    Raises:
        InputError: if another process holds it, if it holds a run that is not to be resumed or was begun with another
            configuration, files that no run wrote, or damaged checkpoints alone.
    """
    with ExitStack() as stack:
        yield world.from_first(lambda: _open(Path(config.run_dir), config, stack, resume=resume, allow_changed=allow_changed))


def _open(run_dir: Path, config: RunConfig, stack: ExitStack, *, resume: bool, allow_changed: bool) -> RunStart:
    if not_utf8(run_dir):
        raise InputError(f"{str(run_dir)!r}: this name is not UTF-8, which weights files need; choose another --out-dir")
    try:
        stack.callback(_remove_empty, [path for path in (run_dir, *run_dir.parents) if not path.exists()])
        run_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise InputError(
            f"{short(str(run_dir))}: cannot be the directory of a run ({reason}); choose another --out-dir"
        ) from None
    stack.enter_context(locked(run_dir))
    for path in (run_dir / name for name in (CONFIG, *RESULTS)):
        if os.path.lexists(path) and not path.exists():
            raise InputError(f"{path}: is a link to nothing; choose another --out-dir")
    begun = load_run_config(run_dir) if (run_dir / CONFIG).exists() else None
    if begun is None and (others := [name for name in RESULTS if (run_dir / name).exists()] + _unfinished(run_dir)):
        raise InputError(
            f"{run_dir} holds {', '.join(others)}, but no {CONFIG} of the run that wrote it: choose another --out-dir"
        )
    finished = (run_dir / "model").exists()
    if not resume and (ours := [path.name for path in places(run_dir) if _is_ours(path)]):
        raise InputError(f"{run_dir} holds a run ({ours[-1]}): go on with --resume {run_dir}, or choose another --out-dir")
    if not resume and finished:
        raise InputError(f"{run_dir} holds a finished run: choose another --out-dir")
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None and finished:
        raise InputError(f"{run_dir} is finished and kept no checkpoint to go on from; its model is {run_dir / 'model'}")
    if checkpoint is not None and not allow_changed and (changed := differences(begun or load_run_config(run_dir), config)):
        raise InputError(f"{run_dir} was begun with another configuration ({'; '.join(changed)}); --allow-changed goes on")
    if begun is None and checkpoint is None:
        _check_rows_apart(run_dir, config)
    if begun is not None and resume:
        print(f"goes on from step {step_of(checkpoint)}, {checkpoint}" if checkpoint else
              f"{run_dir} has no checkpoint yet: starts from step 0", file=sys.stderr)  # fmt: skip
    return RunStart(checkpoint, finished)


def _check_rows_apart(run_dir: Path, config: RunConfig) -> None:
    """Refuse a directory inside a folder of rows, for metrics.jsonl would be one of its files of rows; and rows inside it."""
    place = real(run_dir)
    for data in filter(None, (config.data, config.val_data)):
        for spec in load_mixture(data.mixture, root=data.root, format=data.format):
            rows = Path(spec.annotation)
            inside = rows.is_dir() and real(rows) in (place, *place.parents)
            if inside or any(place in real(file).parents for file in row_files(rows)):
                raise InputError(f"{run_dir}: the run's files would lie among the rows of {rows}; choose another --out-dir")


def _remove_empty(directories: list[Path]) -> None:
    for path in directories:
        with suppress(OSError, ValueError):
            path.rmdir()


def begin(config: RunConfig, start: RunStart, world: World) -> None:
    """Write the configuration into the directory, and remove what an interrupted run left unfinished there."""
    if not world.is_main:
        return
    run_dir = Path(config.run_dir)
    for name in _unfinished(run_dir):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    if start.checkpoint is None:
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
    write_json(run_dir / CONFIG, {"folder": os.path.relpath(Path.cwd(), run_dir), **to_json(config)})


def _unfinished(run_dir: Path) -> list[str]:
    """List the names of the folders that a run writes into before it renames them."""
    form = re.compile(r"[.]tmp-(model|adapter|best(-gone)?|checkpoint-[0-9]+(-gone)?)")
    return [path.name for path in run_dir.glob(".tmp-*") if form.fullmatch(path.name) and not path.is_symlink()]


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest sound checkpoint of a run, None if it has none. Others are left as they are and named on stderr.

    Raises:
        InputError: if it has checkpoints and none is sound.
    """
    damaged = []
    for path in reversed(places(run_dir)):
        if not _is_ours(path):
            print(f"{path}: not a checkpoint of ivl; it is left alone", file=sys.stderr)
            continue
        try:
            check_sealed(path, MARKER)
            read_trainer(path)
        except InputError as error:
            damaged.append(error)
            print(f"{path} is damaged and left alone: {printable(error)}", file=sys.stderr)
        else:
            return path
    if damaged:
        raise InputError(
            f"{run_dir} has no sound checkpoint to go on from ({damaged[0]}); choose another --out-dir to start afresh"
        )
    return None


def _is_ours(checkpoint: Path) -> bool:
    """Whether a run wrote a checkpoint, sound or not."""
    return (checkpoint / MARKER).exists() or (checkpoint / "trainer").is_dir()


def load_run_config(directory: Path) -> RunConfig:
    """Read the configuration of a run from its directory or one of its checkpoints.

    Raises:
        InputError: if there is none.
    """
    for path in (directory / CONFIG, directory / "trainer" / CONFIG):
        if path.is_file():
            return run_config(read_json(path), str(path))
    raise InputError(f"{directory}: not a training run, there is no {CONFIG} in it")


def checkpoint_writer(model: VLM, processor: Processor, config: RunConfig, world: World) -> CheckpointWriter:
    """Make the writer of the run's checkpoints; all ranks call this together."""
    run_dir, keep_last = Path(config.run_dir), config.train.keep_last
    write = partial(write_checkpoint_model, model, processor, config)
    if not is_shared(model):
        return CheckpointWriter(run_dir, write, world, keep_last)
    from ivl.parallel.saving import ShardedCheckpoints

    def parameters() -> dict[str, torch.Tensor]:
        return dict(model.named_parameters() if config.lora is None else trainable(model))

    return ShardedCheckpoints(run_dir, write, world, keep_last, parameters=parameters, cuts=cuts_of(model))


def write_checkpoint_model(model: VLM, processor: Processor, config: RunConfig, directory: Path) -> None:
    """Write what a checkpoint holds besides the trainer's state: a model directory, or with LoRA the adapter alone.

    Of a sharded run these are the files without tensors.
    """
    if config.lora is None:
        (save_config if is_shared(model) else save_model)(model, directory)
        save_processor(processor, directory)
    elif not is_shared(model):
        save_adapter(model, directory, base=config.model, trained=trainable(model))
        tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(model).items()}
        save_file(tensors, directory / TRAINABLE)
    write_json(directory / "trainer" / CONFIG, to_json(config))


def read_trainer(checkpoint: Path) -> SavedTrainer:
    """Read what a checkpoint holds besides the model, sharded or not."""
    sharded = is_sharded_checkpoint(checkpoint)
    return load_trainer(checkpoint, ShardedWeights(checkpoint, state=True) if sharded else TensorFile(checkpoint / OPTIMIZER))


def write_final_model(model: VLM, processor: Processor, config: RunConfig, world: World) -> None:
    """Write run_dir/model, whole or not at all; with LoRA also run_dir/adapter. Shards are gathered tensor by tensor."""
    run_dir = Path(config.run_dir)
    with whole_parameters(model, world) as get:
        if get is None:
            return
        temp = run_dir / ".tmp-adapter"
        if config.lora is not None:
            save_adapter(model, temp, base=config.model, trained=trainable(model), get=get)
            put_in_place(temp, run_dir / "adapter")
        temp = run_dir / ".tmp-model"
        _write_whole(model, processor, config, temp, get)
        put_in_place(temp, run_dir / "model")


def _write_whole(model: VLM, processor: Processor, config: RunConfig, directory: Path, get: ReadWhole) -> None:
    """Write a model directory, with adapters merged."""
    plain = empty_model(model.config).to(next(model.parameters()).dtype)
    dtype = getattr(torch, config.save_dtype) if config.save_dtype else None
    save_model(plain, directory, dtype=dtype, get=merged_parameters(model, get))
    save_processor(processor, directory)


def write_best_model(model: VLM, processor: Processor, config: RunConfig, world: World) -> None:
    """Write run_dir/best anew: the model as it is now, with LoRA its adapter, which `--adapter` takes."""
    run_dir = Path(config.run_dir)
    temp, gone, place = run_dir / ".tmp-best", run_dir / ".tmp-best-gone", run_dir / "best"
    with whole_parameters(model, world) as get:
        if get is None:
            return
        for path in (temp, gone):
            shutil.rmtree(path, ignore_errors=True)
        if config.lora is not None:
            save_adapter(model, temp, base=config.model, trained=trainable(model), get=get)
        else:
            _write_whole(model, processor, config, temp, get)
    if place.is_dir():
        place.rename(gone)
    put_in_place(temp, place)
    shutil.rmtree(gone, ignore_errors=True)


def record_environment(run_dir: Path, loader: Loader, world: World, step: int) -> None:
    """Add what the figures depend on besides the configuration to environment.json: at first, and in `starts` of each start."""
    if not world.is_main:
        return
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        git = None
    environment: dict[str, Any] = {
        "step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S"), "command": sys.argv, "python": platform.python_version(),
        "platform": platform.platform(), "versions": versions, "git": git, "ranks": world.size, "device": str(world.device),
        "threads": torch.get_num_threads(), "data": loader.mixture.fingerprint(),
    }  # fmt: skip
    path, before = run_dir / "environment.json", None
    with suppress(InputError):
        before = read_json(path) if step else None
    first = before if isinstance(before, dict) else environment
    starts = first.get("starts", [{**first}])
    starts = [*(starts if isinstance(starts, list) else []), *([environment] if first is before else [])]
    write_json(path, first | {"starts": starts})


def record_data(run_dir: Path, loader: Loader, world: World) -> None:
    """Write data_report.json (one a rank, if there are several): packs, tokens, and the rows left out by kind."""
    name = "data_report.json" if world.size == 1 else f"data_report-{world.rank}.json"
    write_json(run_dir / name, asdict(loader.report))
    if loader.report.summary():
        print(f"{loader.report.summary()}; see {run_dir / name}", file=sys.stderr)
