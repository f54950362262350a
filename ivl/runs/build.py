"""From a run's configuration to its parts: model, processor, data, objective and evaluators."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ivl.checkpoint import load_config, load_model, load_tokenizer, resolve
from ivl.checkpoint.model_dir import empty_model, open_rows
from ivl.checkpoint.shards import ShardedWeights, is_sharded_checkpoint
from ivl.checkpoint.tensor_file import TensorFile
from ivl.config import ModelConfig
from ivl.cpu import accelerate, has_bfloat16
from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.errors import InputError
from ivl.evaluation.training import curve_of
from ivl.lora.layers import add_lora, lora_parameters
from ivl.model.vlm import VLM
from ivl.parallel.compile import compile_layers
from ivl.parallel.shard import draw_shards, is_shared, load_shards, shard
from ivl.parallel.tensor import split
from ivl.processing.processor import Processor
from ivl.runs.config import RunConfig
from ivl.runs.gathered import ask_gathered, check_gathered_fits
from ivl.train.config import PARTS, ObjectiveConfig
from ivl.train.loop import Evaluator
from ivl.train.objectives import Objective, ObjectiveContext, StatefulObjective
from ivl.train.shards import keep, own_part
from ivl.train.stage import apply_stage, trainable
from ivl.train.world import World, in_step, is_sharded
from ivl.utils.imports import import_object

TRAINABLE = "trainer/trainable.safetensors"
"""What trains in a LoRA run, of a checkpoint that is not sharded."""


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


def build_model(config: RunConfig, checkpoint: Path | None, world: World) -> VLM:
    """Build the model of a run on this rank, with its adapters, from a checkpoint or as it starts; what trains is marked.

    Raises:
        InputError: if files do not fit the run, or the weights cannot be meant.
    """
    if is_spread(config, world):
        model = start_sharded(config, checkpoint, world, adapted=True)
    else:
        model = start_whole(config, checkpoint)
        adapt(model, config)
        if checkpoint is not None and config.lora is not None:
            restore_trainable(model, checkpoint)
        place(model, config, world)
    check_start(model, world)
    return model


def is_spread(config: RunConfig, world: World) -> bool:
    """Whether ranks share one model, by FSDP2 or as tensor ranks."""
    return (config.shard and world.data_size > 1) or world.tensor > 1


def start_sharded(config: RunConfig, checkpoint: Path | None, world: World, *, adapted: bool) -> VLM:
    """Build the shards of the model on this rank, whose memory never holds more than them and one tensor.

    Args:
        config: the run.
        checkpoint: where to take the weights from, or with LoRA the adapters; None takes those that the run starts from.
        world: the ranks.
        adapted: add the run's adapters and mark what trains.
    """
    own = checkpoint if config.lora is None else None
    model = empty_model(load_config(own) if own else read_architecture(config)).to(_dtype(config))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    source = own or (resolve(config.model) if config.model else None)
    stored = open_rows(source, model) if source else None  # refuses files before memory is taken
    adapters: dict[str, torch.Tensor] = {}
    if adapted:
        adapt(model, config, torch.device("cpu"))
        adapters = {name: p.detach() for name, p in lora_parameters(model).items()}
        model.to("meta")
    place(model, config, world)
    if stored:
        load_shards(model, stored)
    else:
        draw_shards(model, config.train.seed, shapes)
    for name, whole in adapters.items():
        keep(model.get_parameter(name), whole)
    if checkpoint is not None and adapters:
        restore_trainable(model, checkpoint)
    return model


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "pure_bf16" else torch.float32


def start_whole(config: RunConfig, checkpoint: Path | None = None) -> VLM:
    """Build the model on the CPU: from a checkpoint, from the weights that the run starts from, or from random weights."""
    dtype = _dtype(config)
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


def adapt(model: VLM, config: RunConfig, device: torch.device | None = None) -> None:
    """Add the run's adapters to the model, on the device if one is given, and mark the parameters that train."""
    if config.lora is not None:
        torch.manual_seed(config.train.seed)
        add_lora(model, config.lora, device)
    apply_stage(model, config.stage, adapters=lora_parameters(model), checkpointing=config.train.checkpointing)


def check_start(model: VLM, world: World) -> None:
    """Refuse weights that cannot be meant: not finite, or a trainable part whose matrices are all zero.

    Raises:
        InputError: naming the parameters, on all ranks that share shards.
    """
    parameters = {name: own_part(p.detach()) for name, p in trainable(model).items()}
    infinite = [name for name, p in parameters.items() if not torch.isfinite(p).all()]
    nonzero = [name for name, p in parameters.items() if p.ndim >= 2 and p.any()]
    found = world.gather((infinite, nonzero)) if is_shared(model) else [(infinite, nonzero)]
    if bad := [name for name in parameters if any(name in names for names, _ in found)]:
        raise InputError(f"{len(bad)} trainable parameters are not finite at the start, first {bad[0]!r}: were they ever set?")
    sets = {name for _, names in found for name in names}
    for part in PARTS:
        matrices = {name for name, p in parameters.items() if name.startswith(f"{part}.") and p.ndim >= 2}
        if matrices and not matrices & sets:
            raise InputError(f"every trainable matrix of the {part} is zero, so it cannot learn: was the checkpoint complete?")


def restore_trainable(model: VLM, checkpoint: Path) -> None:
    """Load the trained parameters of a LoRA run's checkpoint into the model."""
    path = checkpoint / TRAINABLE
    stored = ShardedWeights(checkpoint) if is_sharded_checkpoint(checkpoint) else TensorFile(path)
    shapes = {name: tuple(parameter.shape) for name, parameter in trainable(model).items()}
    if wrong := set(stored.shapes.items()) ^ set(shapes.items()):
        raise InputError(f"{path}: its tensors differ from the run's parameters in {len(wrong)}, first {min(wrong)[0]!r}")
    load_shards(model, stored)


def place(model: VLM, config: RunConfig, world: World) -> None:
    """Compile the model, and share it among ranks where the run says so, or move it to this device and accelerate it there.

    Shards have no content yet. A model that is shared stays plain: ranks must call its modules equally often.
    """
    if config.train.compile:
        compile_layers(model)
    if world.tensor > 1:
        split(model, world)
    if config.shard and world.data_size > 1:
        shard(model, world, torch.bfloat16 if config.train.precision == "bf16" else None)
    if is_spread(config, world):
        model.to_empty(device=world.device)
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
    return Loader(data, processor, seed=config.train.seed, rank=world.data_rank, world_size=world.data_size, pairs=pairs)


def build_run_objective(config: RunConfig, processor: Processor, run_dir: Path, world: World, *, resumed: bool) -> Objective:
    """Import and build the objective; its prepare has not been called."""

    def loader(data: DataConfig) -> Loader:
        return build_loader(replace(data, epochs=1, shuffle=False), processor, config, world)

    def start_model() -> VLM:
        if is_spread(config, world):
            return start_sharded(config, None, world, adapted=False).eval().requires_grad_(False)
        model = start_whole(config).eval().requires_grad_(False)
        if config.train.precision == "bf16":
            model.to(torch.bfloat16)  # nothing of it trains, so it needs no float32 parameters
        place(model, config, world)
        return model

    sets = {"train": config.data} | ({"validation": config.val_data} if config.val_data else {})
    context = ObjectiveContext(
        world=world, directory=run_dir, precision=config.train.precision,
        packs_per_rank=max(1, config.train.packs_per_step // world.data_size), resumed=resumed,
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
        for number, (batch, counts) in enumerate(in_step(loader, world if is_sharded(model) else World())):
            if config.val_packs and number * world.data_size >= config.val_packs:
                break
            value = objective(model, batch)
            if counts:
                total += torch.tensor([float(value.total), float(value.weight)], dtype=torch.float64)
        loss_sum, weight = world.all_reduce({"loss": total})["loss"].tolist()
        if not weight:
            raise InputError(f"{data.mixture}: the validation data gave no trained token")
        return {"loss": loss_sum / weight}

    return Evaluator("validation", config.val_every, loss)


def build_curves(config: RunConfig, processor: Processor, model: VLM, world: World) -> tuple[Evaluator, ...]:
    """Build the evaluators of tasks, whose questions are read now. The first rank asks a sharded model, gathered."""
    if config.eval_tasks and is_sharded(model):
        check_gathered_fits(model, Path(config.run_dir), world)
    curves = {name: curve_of(name, config.eval_limit, processor) for name in config.eval_tasks}
    return tuple(
        Evaluator(name.rpartition(":")[2], config.eval_every, partial(ask_gathered, curve, world))
        for name, curve in curves.items()
    )
