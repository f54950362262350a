"""Low-rank adapters (LoRA) on any linear layer, named and stored as PEFT does for the transformers model.

A layer that fuses several projections gets one adapter per projection, so adapters travel both ways unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.model.linear import Linear
from ivl.model.vlm import VLM
from ivl.quant.layers import quantized_layers

PEFT_PREFIX = "base_model.model."

# Our logical layer names to module paths of transformers' InternVLForConditionalGeneration.
_PATHS = (
    (r"decoder\.layers\.(\d+)\.qkv\.([qkv]_proj)", r"model.language_model.layers.\1.self_attn.\2"),
    (r"decoder\.layers\.(\d+)\.out", r"model.language_model.layers.\1.self_attn.o_proj"),
    (r"decoder\.layers\.(\d+)\.gate_up\.(gate_proj|up_proj)", r"model.language_model.layers.\1.mlp.\2"),
    (r"decoder\.layers\.(\d+)\.down", r"model.language_model.layers.\1.mlp.down_proj"),
    (r"decoder\.head", r"lm_head"),
    (r"vision\.layers\.(\d+)\.attention\.qkv\.([qkv]_proj)", r"model.vision_tower.encoder.layer.\1.attention.\2"),
    (r"vision\.layers\.(\d+)\.attention\.out", r"model.vision_tower.encoder.layer.\1.attention.projection_layer"),
    (r"vision\.layers\.(\d+)\.(fc[12])", r"model.vision_tower.encoder.layer.\1.mlp.\2"),
    (r"projector\.fc([12])", r"model.multi_modal_projector.linear_\1"),
)


class LoraLinear(Linear):
    """A Linear with low-rank adapters on some of its projections: y = W x + scale * B A dropout(x), W frozen.

    lora_A[name]: [rank, in], lora_B[name]: [rows of the projection, rank]. The projection of an unfused layer is named
    "weight". The inherited weight and bias keep their names, so the layer's checkpoint keys do not change.
    """

    def __init__(self, base: Linear, names: list[str], config: LoraConfig) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None, parts=base.parts)
        self.weight, self.bias = base.weight, base.bias
        self.config = config
        self.enabled = True
        self.spans = {name: span for name, span in _spans(base).items() if name in names}
        like = base.weight
        self.lora_A = nn.ParameterDict({n: nn.Parameter(like.new_empty(config.rank, base.in_features)) for n in self.spans})
        self.lora_B = nn.ParameterDict(
            {n: nn.Parameter(like.new_zeros(b - a, config.rank)) for n, (a, b) in self.spans.items()}
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
            y[..., first:last] += F.linear(F.linear(x, self.lora_A[name]), self.lora_B[name]) * self.config.scale
        return y

    def matrix(self) -> torch.Tensor:
        """The weight with the adapters added, differentiable; the adapters' dropout does not apply."""
        if not self.enabled:
            return self.weight
        rows = self.weight.clone()
        for name, (first, last) in self.spans.items():
            rows[first:last] += self.lora_B[name] @ self.lora_A[name] * self.config.scale
        return rows

    def merged(self) -> Linear:
        """A plain Linear that shares this layer's weight, with the adapters added to it in float32."""
        with torch.no_grad():
            for name, (first, last) in self.spans.items():
                rows = self.weight[first:last]
                delta = self.lora_B[name].float() @ self.lora_A[name].float() * self.config.scale
                rows.copy_(rows.float() + delta)
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


def _projections(model: VLM) -> dict[str, tuple[str, str]]:
    """Every logical projection: dotted name -> (module path, name inside the module)."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            for name in _spans(module):
                found[f"{path}.{name}" if module.parts else path] = (path, name)
    return found


def _lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def add_lora(model: VLM, config: LoraConfig) -> None:
    """Put untrained adapters (A kaiming-uniform, B zero) on the target layers, in place; their own weights are frozen.

    Raises:
        InputError: if a target names no layer (the message lists what exists), or the model has adapters already.
    """
    if _lora_layers(model):
        raise InputError("the model already carries LoRA adapters; merge_lora() folds them in first")
    if quantized_layers(model):
        raise InputError("the model is quantised, which is for inference only; adapters go on the model that it was made from")
    projections = _projections(model)
    chosen: dict[str, list[str]] = {}
    for target in config.targets:
        hits = [name for name in projections if name.startswith(f"{target}.") or fnmatchcase(name, target)]
        if not hits:
            kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in projections)
            raise InputError(f"LoRA target {target!r} names no linear layer; there are {', '.join(kinds)}")
        for path, name in (projections[hit] for hit in hits):
            chosen.setdefault(path, []).append(name)
    for path, names in chosen.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, Linear)
        model.set_submodule(path, LoraLinear(layer, names, config))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by dotted name; what a LoRA stage trains."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into its layer's weight, in place, and leave plain Linear layers."""
    for path, layer in _lora_layers(model).items():
        model.set_submodule(path, layer.merged())


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it did before adapters were added (the reference model of preference training)."""
    layers = list(_lora_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def transformers_path(name: str) -> str:
    """Module path in transformers' InternVLForConditionalGeneration of one logical projection."""
    for pattern, path in _PATHS:
        if match := re.fullmatch(pattern, name):
            return match.expand(path)
    raise KeyError(name)


def _adapters(model: VLM) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """transformers module path -> (A, B) of every adapter."""
    layers = _lora_layers(model)
    return {
        transformers_path(logical): (layers[path].lora_A[name], layers[path].lora_B[name])
        for logical, (path, name) in _projections(model).items()
        if path in layers and name in layers[path].spans
    }


def save_adapter(model: VLM, out_dir: str | Path, *, base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does; base is the base model's name or directory.

    Raises:
        InputError: if the model has no adapters.
    """
    layers = _lora_layers(model)
    if not layers:
        raise InputError("the model carries no LoRA adapters, so there is nothing to save")
    config = next(iter(layers.values())).config
    adapters = _adapters(model)
    tensors = {}
    for path, pair in adapters.items():
        for letter, parameter in zip("AB", pair, strict=True):
            tensors[f"{PEFT_PREFIX}{path}.lora_{letter}.weight"] = parameter.detach().cpu().contiguous()
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": _whole(config.scale * config.rank),
        "lora_dropout": config.dropout,
        "target_modules": sorted(adapters),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def load_adapter(model: VLM, adapter_dir: str | Path) -> LoraConfig:
    """Add the adapters of a directory that PEFT or save_adapter wrote to the model, in place.

    Raises:
        InputError: if files are missing, the adapter uses what is not supported here, or a tensor does not fit.
    """
    where = Path(adapter_dir)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (where / file).is_file():
            raise InputError(
                f"{where}: no {file}; a LoRA adapter is a directory with adapter_config.json and adapter_model.safetensors"
            )
    described = json.loads((where / "adapter_config.json").read_text(encoding="utf-8"))
    _check_supported(where, described)
    try:
        tensors = load_file(where / "adapter_model.safetensors")
    except SafetensorError as error:
        raise InputError(f"{where / 'adapter_model.safetensors'}: not a readable safetensors file: {error}") from None
    logical = {f"{PEFT_PREFIX}{transformers_path(name)}": name for name in _projections(model)}
    wanted = {key: logical.get(re.sub(r"\.lora_[AB]\.weight$", "", key)) for key in tensors}
    if strangers := [key for key, name in wanted.items() if name is None]:
        raise InputError(f"{where}: {len(strangers)} tensors name no linear layer of this model, first {strangers[0]!r}")
    rank = described["r"]
    alpha = described["lora_alpha"] * (rank**0.5 if described.get("use_rslora") else 1)
    targets = tuple(dict.fromkeys(name for name in wanted.values() if name))
    config = LoraConfig(rank=rank, alpha=alpha, dropout=described.get("lora_dropout", 0.0), targets=targets)
    add_lora(model, config)
    with torch.no_grad():
        for path, pair in _adapters(model).items():
            for letter, parameter in zip("AB", pair, strict=True):
                key = f"{PEFT_PREFIX}{path}.lora_{letter}.weight"
                got = tuple(tensors[key].shape) if key in tensors else "nothing"
                if got != tuple(parameter.shape):
                    raise InputError(f"{where}: {key} should be {tuple(parameter.shape)} but the file has {got}")
                parameter.copy_(tensors[key])
    return config


def _check_supported(where: Path, described: dict) -> None:
    if described.get("peft_type") != "LORA":
        raise InputError(f"{where}: adapter type {described.get('peft_type')!r}; only LORA is supported")
    plain = {
        "bias": "none",
        "use_dora": False,
        "layer_replication": None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
    }
    for key, usual in plain.items():
        if (value := described.get(key, usual)) and value != usual:
            raise InputError(f"{where}: adapter_config.json has {key} = {value!r}, which is not supported; only plain LoRA is")
