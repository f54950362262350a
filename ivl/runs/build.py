"""From a run's configuration to its parts: model, processor, data, objective and evaluators."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ivl.checkpoint import load_config, load_model, load_tokenizer, resolve
from ivl.config import ModelConfig
from ivl.cpu import accelerate, has_bfloat16
from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.errors import InputError
from ivl.evaluation.training import curve_of
from ivl.lora.layers import add_lora, lora_parameters
from ivl.model.vlm import VLM
from ivl.parallel.compile import compile_layers
from ivl.parallel.shard import shard
from ivl.processing.processor import Processor
from ivl.runs.config import RunConfig
from ivl.train.config import PARTS, ObjectiveConfig
from ivl.train.loop import Evaluator
from ivl.train.objectives import Objective, ObjectiveContext, StatefulObjective
from ivl.train.stage import apply_stage, trainable
from ivl.train.world import World, is_sharded, synchronized
from ivl.utils.imports import import_object


def read_architecture(config: RunConfig) -> ModelConfig:
    """Read the model's configuration without its weights.

    Raises:
        InputError: if the model to start from is not the architecture that the run was written for.
    """
    if not config.model:
        assert config.architecture is not None
        return config.architecture
    actual = load_config(resolve(config.model))
    if (expected := config.architecture) is not None:
        for part in ("vision", "decoder", "image_token_id"):
            a, b = getattr(expected, part), getattr(actual, part)
            if part == "vision":  # drop path belongs to the stage, and a checkpoint may carry any
                a, b = replace(a, drop_path=0.0), replace(b, drop_path=0.0)
            if a != b:
                raise InputError(f"{config.model}: its {part} is {b}, the run was written for {a}")
    return actual


def with_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """Return the run with the precision that `auto` stands for on this device."""
    if config.train.precision != "auto":
        return config
    return replace(config, train=replace(config.train, precision="bf16" if has_bfloat16(device) else "fp32"))


def build_model(config: RunConfig, checkpoint: Path | None = None) -> VLM:
    """Build the model on the CPU: from a checkpoint, from the weights that the run starts from, or from random weights."""
    dtype = torch.bfloat16 if config.train.precision == "pure_bf16" else torch.float32
    if checkpoint is not None and config.lora is None:
        return load_model(checkpoint, dtype=dtype, quantized=False)
    if config.model:
        read_architecture(config)
        return load_model(config.model, dtype=dtype, quantized=False)
    assert config.architecture is not None
    torch.manual_seed(config.train.seed)
    model = VLM(config.architecture)
    model.init_weights()
    return model.to(dtype)


def adapt(model: VLM, config: RunConfig) -> None:
    """Add the run's adapters to the model and mark the parameters that train."""
    if config.lora is not None:
        torch.manual_seed(config.train.seed)
        add_lora(model, config.lora)
    apply_stage(model, config.stage, adapters=lora_parameters(model), checkpointing=config.train.checkpointing)


def check_start(model: VLM) -> None:
    """Refuse weights that cannot be meant: not finite, or a trainable part whose matrices are all zero.

    Raises:
        InputError: naming the parameters.
    """
    parameters = trainable(model)
    bad = [name for name, p in parameters.items() if not torch.isfinite(p).all()]
    if bad:
        raise InputError(f"{len(bad)} trainable parameters are not finite at the start, first {bad[0]!r}: were they ever set?")
    for part in PARTS:
        matrices = [p for name, p in parameters.items() if name.startswith(f"{part}.") and p.ndim >= 2]
        if matrices and not any(p.any() for p in matrices):
            raise InputError(f"every trainable matrix of the {part} is zero, so it cannot learn: was the checkpoint complete?")


def place(model: VLM, config: RunConfig, world: World) -> None:
    """Compile and shard the model where the run says so, or move it to this rank's device and accelerate it there.

    A sharded model stays plain: ranks must call its modules equally often.
    """
    if config.train.compile:
        compile_layers(model)
    if config.shard and world.size > 1:
        shard(model, world, torch.bfloat16 if config.train.precision == "bf16" else None)
    elif model.to(world.device).device.type == "cpu":
        accelerate(model)


def build_processor(config: RunConfig, model: VLM) -> Processor:
    """Build the processor from the run's tokenizer, or the model's own."""
    if not (config.tokenizer or config.model):
        raise InputError("a random start needs `tokenizer`, a directory with tokenizer.json or tokenizer.model")
    return accelerate(Processor(model.config, load_tokenizer(config.tokenizer or resolve(config.model))))


def build_loader(data: DataConfig, processor: Processor, config: RunConfig, world: World) -> Loader:
    """Build this rank's batches: of preference pairs where the objective trains on them, else of anything but pairs."""
    pairs = config.objective.pairs
    return Loader(data, processor, seed=config.train.seed, rank=world.rank, world_size=world.size, pairs=pairs)


def build_run_objective(config: RunConfig, processor: Processor, run_dir: Path, world: World, *, resumed: bool) -> Objective:
    """Import and build the objective; its prepare has not been called."""

    def loader(data: DataConfig) -> Loader:
        return build_loader(replace(data, epochs=1, shuffle=False), processor, config, world)

    def start_model() -> VLM:
        model = build_model(config).eval().requires_grad_(False)
        if config.train.precision == "bf16" and not (config.shard and world.size > 1):
            model.to(torch.bfloat16)  # nothing of it trains, so it needs no float32 parameters
        place(model, config, world)
        return model

    sets = {"train": config.data} | ({"validation": config.val_data} if config.val_data else {})
    context = ObjectiveContext(
        world=world, directory=run_dir, precision=config.train.precision,
        packs_per_rank=max(1, config.train.packs_per_step // world.size), resumed=resumed,
        loaders={name: partial(loader, data) for name, data in sets.items()}, start_model=start_model,
    )  # fmt: skip
    return build_objective(config.objective, context)


def build_objective(config: ObjectiveConfig, context: ObjectiveContext) -> Objective:
    """Import the objective that the configuration names, and build it where it is a StatefulObjective.

    Raises:
        InputError: if there is no such object, or the settings are those of another objective.
    """
    target: Any = import_object(config.path, "objective")
    if not callable(target):
        raise InputError(f"objective {config.path} is {type(target).__name__}, not a function or a StatefulObjective")
    built = target if isinstance(target, type) and issubclass(target, StatefulObjective) else None
    settings = built.Settings if built else ObjectiveConfig
    if type(config) is not settings:
        raise InputError(f"objective {config.path} takes settings of {settings.__name__}, got {type(config).__name__}")
    return built.build(config, context) if built else cast(Objective, target)


def build_validation(config: RunConfig, processor: Processor, objective: Objective, world: World) -> Evaluator | None:
    """Build the evaluator of the validation loss: over val_packs packs, or all of them, always the same ones."""
    if config.val_data is None:
        return None
    data = replace(config.val_data, epochs=config.val_data.epochs or 1, shuffle=False)
    build_loader(data, processor, config, world)  # a missing file stops the run now, and not after its first steps

    def loss(model: VLM) -> dict[str, float]:
        total = torch.zeros(2, dtype=torch.float64)
        loader = build_loader(data, processor, config, world)
        for number, batch in enumerate(synchronized(iter(loader), world) if is_sharded(model) else loader):
            if config.val_packs and number * world.size >= config.val_packs:
                break
            value = objective(model, batch)
            total += torch.tensor([float(value.total), float(value.weight)], dtype=torch.float64)
        loss_sum, weight = world.all_reduce({"loss": total})["loss"].tolist()
        if not weight:
            raise InputError(f"{data.mixture}: the validation data gave no trained token")
        return {"loss": loss_sum / weight}

    return Evaluator("validation", config.val_every, loss)


def build_curves(config: RunConfig, processor: Processor) -> tuple[Evaluator, ...]:
    """Build the evaluators of tasks, whose questions are read now."""
    return tuple(
        Evaluator(name.rpartition(":")[2], config.eval_every, curve_of(name, config.eval_limit, processor))
        for name in config.eval_tasks
    )
