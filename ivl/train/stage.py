"""What trains, decided in one place. Freezing is the complement of `Stage.trainable`."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ivl.errors import InputError
from ivl.model.vlm import VLM
from ivl.train.config import Stage


def apply_stage(model: VLM, stage: Stage, *, adapters: Collection[str] = (), checkpointing: bool = False) -> None:
    """Set requires_grad, train and eval modes, drop path and activation checkpointing, in place.

    Args:
        model: the model, with its adapters if it has any.
        stage: the parts that train.
        adapters: names of parameters that train whatever the stage says.
        checkpointing: recompute activations in the backward pass.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapters or _trains(name, stage, model.config.vision.num_layers))
    last = max(len(model.vision.layers) - 1, 1)
    for number, layer in enumerate(model.vision.layers):
        layer.drop_path = stage.drop_path * number / last  # type: ignore[assignment]
    for part in (model.vision, model.decoder):
        # A part below every trainable parameter keeps no graph, so there is nothing to recompute. The decoder always carries
        # the gradient of the parts below it.
        part.checkpointing = checkpointing and (part is model.decoder or _any_trainable(part))
    set_modes(model)


def set_modes(model: nn.Module) -> None:
    """Put modules that have a trainable parameter in train mode, all others in eval mode: a frozen ViT has no drop path."""
    for module in model.modules():
        module.training = _any_trainable(module)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


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
