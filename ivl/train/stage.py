"""What trains, decided in one place. Freezing is the complement of `Stage.trainable`."""

from __future__ import annotations

import torch
from torch import nn

from ivl.errors import InputError
from ivl.lora.layers import add_lora, lora_parameters
from ivl.model.vlm import VLM
from ivl.train.config import Stage, TrainConfig

PARTS = ("vision", "projector", "decoder")


def apply_stage(model: VLM, config: TrainConfig) -> None:
    """Add adapters, set requires_grad, train and eval modes, drop path and activation checkpointing, in place."""
    if config.lora is not None and not lora_parameters(model):
        torch.manual_seed(config.seed)
        add_lora(model, config.lora)
    adapters = lora_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapters or _trains(name, config.stage, model.config.vision.num_layers))
    last = max(len(model.vision.layers) - 1, 1)
    for number, layer in enumerate(model.vision.layers):
        layer.drop_path = config.stage.drop_path * number / last  # type: ignore[assignment]
    for part in (model.vision, model.decoder):
        # A part below every trainable parameter keeps no graph, so there is nothing to recompute; the decoder always
        # carries the gradient of what is below it.
        part.checkpointing = config.checkpointing and (part is model.decoder or _any_trainable(part))
    set_modes(model)


def set_modes(model: nn.Module) -> None:
    """Modules with something to train are in train mode, all others in eval mode: a frozen ViT has no drop path."""
    for module in model.modules():
        module.training = _any_trainable(module)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_by_part(model: VLM) -> dict[str, tuple[int, int]]:
    """part -> (trained, frozen) parameters."""
    counts = {}
    for part in PARTS:
        parameters = list(model.get_submodule(part).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        counts[part] = (trained, sum(p.numel() for p in parameters) - trained)
    return counts


def check_start(model: VLM) -> None:
    """Refuse weights that cannot be meant: not finite, or a trainable part whose matrices are all zero.

    Raises:
        InputError: naming the parameters.
    """
    bad = [name for name, p in trainable(model).items() if not torch.isfinite(p).all()]
    if bad:
        raise InputError(f"{len(bad)} trainable parameters are not finite at the start, first {bad[0]!r}: were they ever set?")
    adapters = lora_parameters(model)
    for part in PARTS:
        matrices = [p for n, p in trainable(model).items() if n.startswith(f"{part}.") and p.ndim >= 2 and n not in adapters]
        if matrices and not any(p.any() for p in matrices):
            raise InputError(f"every trainable matrix of the {part} is zero, so it cannot learn: was the checkpoint complete?")


def _trains(name: str, stage: Stage, num_vision_layers: int) -> bool:
    part = name.split(".")[0]
    if part not in stage.trainable:
        return False
    if part != "vision" or stage.vision_from_layer == 0:
        return True
    first = stage.vision_from_layer
    if not -num_vision_layers <= first < num_vision_layers:
        raise InputError(f"vision_from_layer {first} does not name one of the ViT's {num_vision_layers} layers")
    pieces = name.split(".")
    return pieces[1] == "layers" and int(pieces[2]) >= first % num_vision_layers


def _any_trainable(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
