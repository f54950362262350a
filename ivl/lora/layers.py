"""Low-rank adapters (LoRA) on any linear layer.

A layer that fuses several projections gets one adapter per projection, so that adapters of PEFT, which knows no fused layers,
travel both ways unchanged (ivl/checkpoint/adapter.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn import functional as F

from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.model.linear import Linear
from ivl.model.vlm import VLM
from ivl.quant.layers import quantized_layers

NamedMatrices = Mapping[str, torch.Tensor] | nn.ParameterDict


class LoraLinear(Linear):
    """A Linear with low-rank adapters on some of its projections: y = W x + scale * B A dropout(x), W frozen.

    lora_A[name]: [rank, in], lora_B[name]: [rows of the projection, rank]. The projection of an unfused layer is named
    "weight". The inherited weight and bias keep their names, so the layer's checkpoint keys do not change.
    own: rank and scale of projections that differ from config in them.
    device: where the adapters lie; None takes the base's.
    """

    def __init__(
        self, base: Linear, names: list[str], config: LoraConfig, own: dict[str, LoraConfig] | None = None,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None, parts=base.parts)
        self.weight, self.bias = base.weight, base.bias
        self.config = config
        self.configs = configs = dict.fromkeys(names, config) | (own or {})
        self.enabled = True
        self.spans = {name: span for name, span in _spans(base).items() if name in configs}
        kind = {"dtype": base.weight.dtype, "device": device or base.weight.device}
        self.lora_A = nn.ParameterDict(
            {n: nn.Parameter(torch.empty(configs[n].rank, base.in_features, **kind)) for n in self.spans}
        )
        self.lora_B = nn.ParameterDict(
            {n: nn.Parameter(torch.zeros(b - a, configs[n].rank, **kind)) for n, (a, b) in self.spans.items()}
        )
        for parameter in self.lora_A.values():
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(base.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = super().forward(input)
        if not self.enabled:
            return y
        if torch.is_grad_enabled() and not y.requires_grad:
            y = y.clone()  # F.linear may return a view, and gradients cannot be written into a view of a frozen product
        x = F.dropout(input, self.config.dropout, self.training)
        for name, (first, last) in self.spans.items():
            y[..., first:last] += F.linear(F.linear(x, self.lora_A[name]), self.lora_B[name]) * self.configs[name].scale
        return y

    def matrix(self) -> torch.Tensor:
        """The weight with the adapters added, differentiable; the adapters' dropout does not apply."""
        if not self.enabled:
            return self.weight
        rows = self.weight.clone()
        for name, (first, last) in self.spans.items():
            rows[first:last] += self.lora_B[name] @ self.lora_A[name] * self.configs[name].scale
        return rows

    @torch.no_grad()
    def merge_into(self, weight: torch.Tensor, lora_A: NamedMatrices, lora_B: NamedMatrices) -> None:
        """Add the products of adapters to a weight, in place, in float32."""
        for name, (first, last) in self.spans.items():
            rows = weight[first:last]
            rows.copy_(rows.float() + lora_B[name].float() @ lora_A[name].float() * self.configs[name].scale)

    def merged(self) -> Linear:
        """A plain Linear that shares this layer's weight, with the adapters added to it in float32."""
        self.merge_into(self.weight, self.lora_A, self.lora_B)
        with torch.device("meta"):
            plain = Linear(self.in_features, self.out_features, bias=self.bias is not None, parts=self.parts)
        plain.weight, plain.bias = self.weight, self.bias
        return plain.requires_grad_(True).train(self.training)


def _spans(layer: Linear) -> dict[str, tuple[int, int]]:
    """Row range of each projection in the weight."""
    spans, at = {}, 0
    for name, rows in layer.parts or (("weight", layer.out_features),):
        spans[name] = (at, at + rows)
        at += rows
    return spans


def projections(model: VLM) -> dict[str, tuple[str, str]]:
    """Return the module path and the name inside the module of every projection, by dotted name."""
    paths = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            for name in _spans(module):
                paths[f"{path}.{name}" if module.parts else path] = (path, name)
    return paths


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers with adapters by their path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def add_lora(model: VLM, config: LoraConfig, device: torch.device | None = None) -> None:
    """Put untrained adapters (A kaiming-uniform, B zero) on the target layers, in place; their own weights are frozen.

    Args:
        model: the model.
        config: targets, rank, scale and dropout.
        device: where the adapters lie; None puts each beside its layer.

    Raises:
        InputError: if a target names no layer (the message lists what exists), or the model has adapters already.
    """
    known = projections(model)
    chosen: dict[str, LoraConfig] = {}
    for target in config.targets:
        hits = [name for name in known if name.startswith(f"{target}.") or fnmatchcase(name, target)]
        if not hits:
            kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in known)
            raise InputError(f"LoRA target {target!r} names no linear layer; there are {', '.join(kinds)}")
        chosen |= dict.fromkeys(hits, config)
    add_adapters(model, chosen, device)


def add_adapters(model: VLM, configs: dict[str, LoraConfig], device: torch.device | None = None) -> None:
    """Put an untrained adapter on each of the projections, which are given with rank and scale by dotted name, in place.

    Raises:
        InputError: if the model has adapters already, or is quantized.
    """
    if lora_layers(model):
        raise InputError("the model already carries LoRA adapters; merge_lora() folds them in first")
    if quantized_layers(model):
        raise InputError("the model is quantized, which is for inference only; put adapters on the model that it was made from")
    known = projections(model)
    by_layer: dict[str, dict[str, LoraConfig]] = {}
    for projection, config in configs.items():
        path, name = known[projection]
        by_layer.setdefault(path, {})[name] = config
    for path, chosen in by_layer.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, Linear)
        model.set_submodule(path, LoraLinear(layer, list(chosen), next(iter(chosen.values())), chosen, device))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a LoRA stage trains, by dotted name."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def merged_parameters(model: nn.Module, get: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """Return a function that gives the parameters of the model without adapters, by name, with the adapters merged.

    Args:
        model: the model with adapters.
        get: returns a parameter of it by name.
    """
    layers = lora_layers(model)

    def merged(name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in layers:
            return get(name)
        layer, weight = layers[path], get(name).clone()
        layer.merge_into(weight, *({n: get(f"{path}.{letter}.{n}") for n in layer.spans} for letter in ("lora_A", "lora_B")))
        return weight

    return merged


def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into its layer's weight, in place, and leave plain Linear layers."""
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.merged())


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Let the model compute what it did before adapters were added, inside a `with` block: the reference model of MPO."""
    layers = list(lora_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
