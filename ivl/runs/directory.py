"""The directory of a run: starting and resuming it, what it records, its checkpoints and its final model."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ivl.checkpoint import save_model, save_processor
from ivl.checkpoint.adapter import save_adapter
from ivl.data.loader import Loader
from ivl.errors import InputError
from ivl.lora.layers import add_lora, merge_lora
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.runs.config import RunConfig, differences, run_config, to_json
from ivl.train.stage import trainable
from ivl.train.state import clean, is_complete, latest_checkpoint
from ivl.train.world import World, full_tensor, is_sharded
from ivl.utils.files import write_json
from ivl.utils.strict_json import read_json

CONFIG = "run.json"
PACKAGES = ("ivl", "torch", "numpy", "pillow", "safetensors", "tokenizers", "huggingface-hub")


def open_directory(config: RunConfig, world: World, *, resume: bool, allow_changed: bool) -> Path | None:
    """Create or check the run's directory, and write the configuration into it; returns the checkpoint to go on from.

    Raises:
        InputError: if the directory holds a run that is not to be resumed, or was begun with another configuration.
    """
    run_dir = Path(config.run_dir)
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        clean(run_dir)
    world.barrier()
    checkpoint = latest_checkpoint(run_dir)
    finished = (run_dir / "model").exists()
    if not resume and checkpoint is not None:
        raise InputError(
            f"{run_dir} holds a run ({checkpoint.name}): go on with --resume {run_dir}, or choose another --out-dir"
        )
    if not resume and finished:
        raise InputError(f"{run_dir} holds a finished run: choose another --out-dir")
    if checkpoint is None and finished:
        raise InputError(f"{run_dir} is finished and kept no checkpoint to go on from; its model is {run_dir / 'model'}")
    if checkpoint is not None and not allow_changed and (changed := differences(load_run_config(run_dir), config)):
        raise InputError(f"{run_dir} was begun with another configuration ({'; '.join(changed)}); --allow-changed goes on")
    world.barrier()
    if world.is_main:
        if checkpoint is None:
            (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        write_json(run_dir / CONFIG, to_json(config))
    return checkpoint


def load_run_config(directory: Path) -> RunConfig:
    """Read the configuration of a run from its directory or one of its checkpoints.

    Raises:
        InputError: if there is none.
    """
    for path in (directory / CONFIG, directory / "trainer" / CONFIG):
        if path.is_file():
            return run_config(read_json(path), str(path))
    raise InputError(f"{directory}: not a training run, there is no {CONFIG} in it")


def run_dir_of(path: str | Path) -> Path:
    """Return the run's directory, given it or one of its checkpoints.

    Raises:
        InputError: if it is neither.
    """
    path = Path(path)
    if path.name.startswith("checkpoint-") and is_complete(path):
        path = path.parent
    if not (path / CONFIG).is_file():
        raise InputError(f"{path}: not a training run, there is no {CONFIG} in it")
    return path


def gather_model(model: VLM, config: RunConfig, world: World) -> VLM | None:
    """Gather the whole model on the first rank, None on others; all ranks call this together."""
    if not is_sharded(model):
        return model if world.is_main else None
    full = None
    if world.is_main:
        with torch.device("meta"):
            full = VLM(model.config)
            if config.lora is not None:
                add_lora(full, config.lora)
        full = full.to(next(model.parameters()).dtype).to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            full.get_parameter(name).requires_grad_(parameter.requires_grad)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = full_tensor(parameter)
            if full is not None:
                full.get_parameter(name).copy_(value)
    return full


def write_checkpoint_model(model: VLM, processor: Processor, config: RunConfig, directory: Path, world: World) -> None:
    """Write what a checkpoint holds besides the trainer's state: a model directory, or with LoRA the adapter alone."""
    full = gather_model(model, config, world)
    if full is None:
        return
    if config.lora is None:
        save_model(full, directory)
        save_processor(processor, directory)
    else:
        save_adapter(full, directory, base=config.model, trained=trainable(full))
        tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(full).items()}
        save_file(tensors, directory / "trainer" / "trainable.safetensors")
    write_json(directory / "trainer" / CONFIG, to_json(config))


def restore_trainable(model: VLM, checkpoint: Path) -> None:
    """Load the trained parameters of a LoRA run's checkpoint into the model."""
    tensors = load_file(checkpoint / "trainer" / "trainable.safetensors")
    parameters = trainable(model)
    if wrong := set(tensors) ^ set(parameters):
        raise InputError(f"{checkpoint}: its trainable parameters differ from the run's in {len(wrong)}, first {min(wrong)!r}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def write_final_model(model: VLM, processor: Processor, config: RunConfig, world: World) -> None:
    """Write run_dir/model, whole or not at all; with LoRA also run_dir/adapter."""
    full, run_dir = gather_model(model, config, world), Path(config.run_dir)
    if full is None:
        return
    if config.lora is not None:
        save_adapter(full, run_dir / "adapter", base=config.model, trained=trainable(full))
        merge_lora(full)
    temp, final = run_dir / ".tmp-model", run_dir / "model"
    shutil.rmtree(temp, ignore_errors=True)
    save_model(full, temp, dtype=getattr(torch, config.save_dtype) if config.save_dtype else None)
    save_processor(processor, temp)
    shutil.rmtree(final, ignore_errors=True)
    temp.rename(final)


def record_environment(run_dir: Path, loader: Loader, world: World) -> None:
    """Write environment.json: what the figures depend on besides the configuration."""
    if not world.is_main:
        return
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        git = None
    environment = {
        "python": platform.python_version(), "platform": platform.platform(), "versions": versions, "git": git,
        "ranks": world.size, "device": str(world.device), "threads": torch.get_num_threads(),
        "data": loader.mixture.fingerprint(), "command": sys.argv,
    }  # fmt: skip
    write_json(run_dir / "environment.json", environment)


def record_data(run_dir: Path, loader: Loader, world: World) -> None:
    """Write data_report.json (one a rank, if there are several): packs, tokens, and the rows left out by kind."""
    name = "data_report.json" if world.size == 1 else f"data_report-{world.rank}.json"
    write_json(run_dir / name, asdict(loader.report))
    if loader.report.summary():
        print(f"{loader.report.summary()}; see {run_dir / name}", file=sys.stderr)
