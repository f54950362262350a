"""One training run from a configuration: model, processor, data, loop, final model."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ivl.checkpoint import load_config, load_model, load_tokenizer, resolve, save_model, save_processor
from ivl.checkpoint.adapter import save_adapter
from ivl.config import ModelConfig
from ivl.cpu import accelerate
from ivl.cpu.memory import keep_freed_memory
from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.errors import InputError
from ivl.lora.layers import merge_lora
from ivl.model.vlm import VLM
from ivl.preference.objective import PreferenceObjective, Reference, frozen
from ivl.preference.reference import FileReference, adapters_off, precompute, weights_hash
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer
from ivl.train.config import TrainConfig, differences, from_json, to_json
from ivl.train.loop import Evaluator, to_device, train
from ivl.train.objectives import OBJECTIVES, Objective
from ivl.train.stage import apply_stage, check_start, trainable
from ivl.train.state import clean, is_complete, latest_checkpoint
from ivl.train.world import World, in_step, is_sharded, shard, start_world, stop_world, whole
from ivl.utils.files import write_atomic

CONFIG = "train.json"
STILL_STEPS = 50
"""Steps after which a policy that has not moved from its reference at all is an error."""
PACKAGES = ("ivl", "torch", "numpy", "pillow", "safetensors", "tokenizers", "huggingface-hub")

MakeEvaluators = Callable[[Processor], tuple[Evaluator, ...]]


def run(
    config: TrainConfig,
    *,
    evaluators: MakeEvaluators | None = None,
    resume: bool = False,
    allow_changed: bool = False,
) -> Path:
    """Train and return the directory of the final model, run_dir/model.

    run_dir also gets train.json (the whole configuration), environment.json, data_report.json, metrics.jsonl, checkpoints
    and, with LoRA, adapter/ in PEFT's format; model/ is then the merged model.

    Args:
        evaluators: given the processor, small evaluations to run during training.
        resume: go on from the newest complete checkpoint of run_dir; from the start if there is none yet. Exactly, if by as
            many ranks as wrote it; by another number every sample of the epoch still comes exactly once, in other packs.
        allow_changed: resume although the configuration differs from the one that the run began with.

    Raises:
        InputError: for a configuration, model or data that do not fit; if run_dir holds a run and resume is off.
    """
    run_dir = Path(config.run_dir)
    keep_freed_memory()
    world = start_world(config.device)
    try:
        checkpoint = prepare(config, run_dir, world, resume=resume, allow_changed=allow_changed)
        model = build_model(config, checkpoint)
        processor = accelerate(Processor(model.config, tokenizer_of(config)))
        apply_stage(model, config)
        if checkpoint is not None and config.lora is not None:
            restore_trainable(model, checkpoint)
        check_start(model)

        def place(one: VLM) -> None:
            if config.shard and world.size > 1:
                shard(one, (*one.vision.layers, *one.decoder.layers), world, methods=("encode_tiles",))
            else:
                one.to(world.device)

        resumed = checkpoint is not None
        copy = frozen(build_model(config) if resumed else model, place) if config.keeps_start else None
        place(model)
        objective = make_objective(model, processor, config, run_dir, world, copy, resumed=resumed)
        loader = make_loader(config.data, processor, config, world)
        record_environment(run_dir, config, loader, world)
        checks = evaluators(processor) if evaluators else ()
        if config.val_data is not None:
            checks = (validation(config, config.val_data, processor, objective, world), *checks)
        train(
            model, loader, config, objective=objective, evaluators=checks, world=world, out_dir=run_dir,
            write_model=lambda directory: write_checkpoint_model(model, processor, config, directory, world),
            resume=checkpoint,
            num_samples=config.data.epochs * len(loader.mixture) if config.data.epochs else None,
        )  # fmt: skip
        record_data(run_dir, loader, world)
        write_final(model, processor, config, run_dir, world)
        world.barrier()
        return run_dir / "model"
    finally:
        stop_world(world)


def make_objective(
    model: VLM, processor: Processor, config: TrainConfig, run_dir: Path, world: World, copy: Reference | None, *, resumed: bool
) -> Objective:
    """The loss of the configuration. That of preferences asks its reference, the model as it is now, about every pair, and
    when resumed reads what it said then.

    Args:
        copy: the frozen copy, where one is to be asked.

    Raises:
        InputError: if a resumed run finds no finished log-probabilities.
    """
    if config.objective != "preference":
        return OBJECTIVES[config.objective]
    c, reference = config.preference, copy
    if c.needs_reference and c.reference == "adapters":
        reference = adapters_off
    elif c.needs_reference and c.reference == "file":
        folder = Path(c.reference_dir) if c.reference_dir else run_dir / "reference"
        sets = {folder: config.data} | ({folder / "validation": config.val_data} if config.val_data else {})
        if not resumed:
            weights = weights_hash(model)
            for directory, data in sets.items():
                loader = make_loader(replace(data, epochs=1, shuffle=False), processor, config, world)
                precompute(model, loader, directory, precision=config.precision, weights=weights, world=world)
        reference = FileReference.read(*sets)
    still = STILL_STEPS * max(1, config.packs_per_step // world.size)
    return PreferenceObjective(c, reference, world, still_calls=still)


def make_loader(data: DataConfig, processor: Processor, config: TrainConfig, world: World) -> Loader:
    """This rank's batches: of preference pairs where the objective is theirs, else of anything but pairs."""
    pairs = config.objective == "preference"
    return Loader(data, processor, seed=config.seed, rank=world.rank, world_size=world.size, pairs=pairs)


def prepare(config: TrainConfig, run_dir: Path, world: World, *, resume: bool, allow_changed: bool) -> Path | None:
    """Make or check the run directory; returns the checkpoint to go on from.

    Raises:
        InputError: if the directory holds a run that is not to be resumed, or was begun with another configuration.
    """
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
    if checkpoint is not None and not allow_changed and (changed := differences(load_train_config(run_dir), config)):
        raise InputError(f"{run_dir} was begun with another configuration ({'; '.join(changed)}); --allow-changed goes on")
    world.barrier()
    if world.is_main:
        if checkpoint is None:
            (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        _write_json(run_dir / CONFIG, to_json(config))
    return checkpoint


def load_train_config(directory: Path) -> TrainConfig:
    """The configuration of a run, from its directory or one of its checkpoints.

    Raises:
        InputError: if there is none.
    """
    for path in (directory / CONFIG, directory / "trainer" / CONFIG):
        if path.is_file():
            return from_json(TrainConfig, json.loads(path.read_text(encoding="utf-8")))
    raise InputError(f"{directory}: not a training run, there is no {CONFIG} in it")


def model_config(config: TrainConfig) -> ModelConfig:
    """The model's configuration without its weights.

    Raises:
        InputError: if the model to start from is not the architecture that the run was written for.
    """
    if not config.model:
        assert config.architecture is not None
        return config.architecture
    found = load_config(resolve(config.model))
    if (wanted := config.architecture) is not None:
        for part in ("vision", "decoder", "image_token_id"):
            # Drop path is the stage's matter, and a checkpoint may carry any.
            a, b = (replace(x, drop_path=0.0) if part == "vision" else x for x in (getattr(wanted, part), getattr(found, part)))
            if a != b:
                raise InputError(f"{config.model}: its {part} is {b}, the run was written for {a}")
    return found


def build_model(config: TrainConfig, checkpoint: Path | None = None) -> VLM:
    """The model to train: from a checkpoint, from given weights, or from nothing, on the CPU."""
    dtype = torch.bfloat16 if config.precision == "pure_bf16" else torch.float32
    if checkpoint is not None and config.lora is None:
        return load_model(checkpoint, dtype=dtype, quantized=False)
    if config.model:
        model_config(config)
        return load_model(config.model, dtype=dtype, quantized=False)
    assert config.architecture is not None
    torch.manual_seed(config.seed)
    model = VLM(config.architecture)
    model.init_weights()
    return model.to(dtype)


def tokenizer_of(config: TrainConfig) -> Tokenizer:
    if not (config.tokenizer or config.model):
        raise InputError("a random start needs `tokenizer`, a directory with tokenizer.json or tokenizer.model")
    return load_tokenizer(config.tokenizer or resolve(config.model))


def validation(config: TrainConfig, data: DataConfig, processor: Processor, objective: Objective, world: World) -> Evaluator:
    """The validation loss: the objective over val_packs packs, or all of them, always the same ones."""
    data = replace(data, epochs=data.epochs or 1, shuffle=False)

    def loss(model: nn.Module) -> dict[str, float]:
        total = torch.zeros(2, dtype=torch.float64)
        loader = make_loader(data, processor, config, world)
        for number, batch in enumerate(in_step(iter(loader), world) if is_sharded(model) else loader):
            if config.val_packs and number * world.size >= config.val_packs:
                break
            with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                value = objective(model, to_device(batch, world.device))  # type: ignore[arg-type]
            total += torch.tensor([float(value.total), float(value.weight)], dtype=torch.float64)
        loss_sum, weight = world.sum({"loss": total})["loss"].tolist()
        if not weight:
            raise InputError(f"{data.mixture}: the validation data gave no trained token")
        return {"loss": loss_sum / weight}

    return Evaluator("validation", config.val_every, loss)


def gathered(model: VLM, config: TrainConfig, world: World) -> VLM | None:
    """The whole model on the first rank, None on others; all ranks call this together."""
    if not is_sharded(model):
        return model if world.is_main else None
    full = None
    if world.is_main:
        with torch.device("meta"):
            full = VLM(model.config)
            apply_stage(full, config)
        full = full.to(next(model.parameters()).dtype).to_empty(device="cpu")
    places = dict(full.named_parameters()) if full is not None else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = whole(parameter)
            if places:
                places[name].copy_(value)
    return full


def write_checkpoint_model(model: VLM, processor: Processor, config: TrainConfig, directory: Path, world: World) -> None:
    """What a checkpoint holds besides the trainer's state: a model directory, or with LoRA the adapter alone."""
    full = gathered(model, config, world)
    if full is None:
        return
    model = full
    if config.lora is None:
        save_model(model, directory)
        save_processor(processor, directory)
    else:
        save_adapter(model, directory, base=config.model)
        tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(model).items()}
        save_file(tensors, directory / "trainer" / "trainable.safetensors")
    _write_json(directory / "trainer" / CONFIG, to_json(config))


def restore_trainable(model: VLM, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "trainer" / "trainable.safetensors")
    parameters = trainable(model)
    if wrong := set(tensors) ^ set(parameters):
        raise InputError(f"{checkpoint}: its trainable parameters differ from the run's in {len(wrong)}, first {min(wrong)!r}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def write_final(model: VLM, processor: Processor, config: TrainConfig, run_dir: Path, world: World) -> None:
    """run_dir/model, written whole or not at all; with LoRA also run_dir/adapter."""
    full = gathered(model, config, world)
    if full is None:
        return
    model = full
    if config.lora is not None:
        save_adapter(model, run_dir / "adapter", base=config.model)
        merge_lora(model)
    temp, final = run_dir / ".tmp-model", run_dir / "model"
    shutil.rmtree(temp, ignore_errors=True)
    save_model(model, temp, dtype=getattr(torch, config.save_dtype) if config.save_dtype else None)
    save_processor(processor, temp)
    shutil.rmtree(final, ignore_errors=True)
    temp.rename(final)


def record_environment(run_dir: Path, config: TrainConfig, loader: Loader, world: World) -> None:
    """environment.json: what the numbers depend on besides the configuration."""
    if not world.is_main:
        return
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    where = Path(__file__).parent
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        git = None
    environment = {
        "python": platform.python_version(), "platform": platform.platform(), "versions": versions, "git": git,
        "ranks": world.size, "device": str(world.device), "threads": torch.get_num_threads(),
        "data": loader.mixture.fingerprint(), "command": sys.argv,
    }  # fmt: skip
    _write_json(run_dir / "environment.json", environment)


def record_data(run_dir: Path, loader: Loader, world: World) -> None:
    """data_report.json (one a rank, if there are several): packs, tokens, and every row left out, by kind with examples."""
    name = "data_report.json" if world.size == 1 else f"data_report-{world.rank}.json"
    _write_json(run_dir / name, asdict(loader.report))
    if loader.report.summary():
        print(f"{loader.report.summary()}; see {run_dir / name}", file=sys.stderr)


def run_dir_of(path: str | Path) -> Path:
    """The run directory, given it or one of its checkpoints.

    Raises:
        InputError: if it is neither.
    """
    path = Path(path)
    if path.name.startswith("checkpoint-") and is_complete(path):
        path = path.parent
    if not (path / CONFIG).is_file():
        raise InputError(f"{path}: not a training run, there is no {CONFIG} in it")
    return path


def _write_json(path: Path, value: dict) -> None:
    write_atomic(path, json.dumps(value, indent=2))
