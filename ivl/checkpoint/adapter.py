"""LoRA adapters in files, named and stored as PEFT does for transformers' InternVLForConditionalGeneration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ivl.checkpoint.config_json import dialect_of
from ivl.checkpoint.files import new_directory, read_object
from ivl.checkpoint.hub import resolve
from ivl.checkpoint.keymaps import key_map
from ivl.checkpoint.model_dir import empty_model, load_model, save_model
from ivl.checkpoint.processor_files import load_processor, save_processor
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.lora.layers import add_lora, lora_layers, merge_lora, projections
from ivl.model.vlm import VLM
from ivl.utils.files import write_json

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
_PLAIN = {
    "bias": "none", "use_dora": False, "layer_replication": None, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "fan_in_fan_out": False,
}  # fmt: skip
"""Keys of adapter_config.json with the only values that the layers compute."""


def merge(model: str | Path, adapter: str | Path, out: str | Path, *, force: bool = False) -> None:
    """Fold a LoRA adapter into its model and write a directory that needs neither, in the model's dialect.

    Args:
        force: replace out if it is a model directory.

    Raises:
        InputError: if the model or the adapter is unreadable, they do not fit each other, or out exists.
    """
    directory = resolve(model)
    merged = load_model(directory, quantized=False)
    processor = load_processor(directory)
    load_adapter(merged, adapter)
    merge_lora(merged)
    with new_directory(out, force=force) as target:
        save_model(merged, target, dialect=dialect_of(directory))
        save_processor(processor, target)


def save_adapter(model: VLM, out_dir: str | Path, *, base: str = "") -> None:
    """Write a model's adapters as PEFT does: adapter_config.json and adapter_model.safetensors.

    Args:
        base: name or directory of the base model, for the configuration.

    Raises:
        InputError: if the model has no adapters.
    """
    layers = lora_layers(model)
    if not layers:
        raise InputError("the model carries no LoRA adapters, so there is nothing to save")
    config = next(iter(layers.values())).config
    alpha = config.scale * config.rank
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in _adapter_tensors(model).items()}
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({_module_path(name) for name in tensors}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / TENSORS_FILE, metadata={"format": "pt"})
    write_json(out / CONFIG_FILE, described)


def load_adapter(model: VLM, adapter_dir: str | Path) -> LoraConfig:
    """Add the adapters of a directory that PEFT or save_adapter wrote to the model, in place.

    Raises:
        InputError: if files are missing, the adapter uses what is not supported here, or a tensor does not fit.
    """
    where = Path(adapter_dir)
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (where / file).is_file():
            raise InputError(f"{where}: no {file}; a LoRA adapter is a directory with {CONFIG_FILE} and {TENSORS_FILE}")
    described = read_object(where / CONFIG_FILE)
    try:
        tensors = load_file(where / TENSORS_FILE)
    except SafetensorError as error:
        raise InputError(f"{where / TENSORS_FILE}: not a readable safetensors file: {error}") from None
    names = {path: projection for projection, path in _module_paths(model).items()}
    strangers = [name for name in tensors if _module_path(name) not in names]
    if strangers:
        raise InputError(f"{where}: {len(strangers)} tensors name no linear layer of this model, first {strangers[0]!r}")
    config = _adapter_config(where, described, tuple(dict.fromkeys(names[_module_path(name)] for name in tensors)))
    add_lora(model, config)
    with torch.no_grad():
        for name, parameter in _adapter_tensors(model).items():
            stored = tuple(tensors[name].shape) if name in tensors else "nothing"
            if stored != tuple(parameter.shape):
                raise InputError(f"{where}: {name} should be {tuple(parameter.shape)} but the file has {stored}")
            parameter.copy_(tensors[name])
    return config


def _module_paths(model: VLM) -> dict[str, str]:
    """Paths of our projections in transformers' InternVLForConditionalGeneration: those of their weights in its dialect."""
    paths = {entry.ours: iter(entry.theirs) for entry in key_map(empty_model(model.config), "transformers")}
    return {name: next(paths[f"{layer}.weight"]).removesuffix(".weight") for name, (layer, _) in projections(model).items()}


def _module_path(tensor: str) -> str:
    """The module path in a tensor's name of an adapter file."""
    return re.sub(r"\.lora_[AB]\.weight$", "", tensor.removeprefix(PEFT_PREFIX))


def _adapter_tensors(model: VLM) -> dict[str, nn.Parameter]:
    """A and B of every adapter, by their names in the file."""
    layers, paths = lora_layers(model), _module_paths(model)
    return {
        f"{PEFT_PREFIX}{paths[projection]}.lora_{letter}.weight": parameters[name]
        for projection, (path, name) in projections(model).items()
        if path in layers and name in layers[path].spans
        for letter, parameters in (("A", layers[path].lora_A), ("B", layers[path].lora_B))
    }


def _adapter_config(where: Path, described: dict[str, Any], targets: tuple[str, ...]) -> LoraConfig:
    """The configuration of adapters on the given projections; refuses what is more than plain LoRA."""
    if described.get("peft_type") != "LORA":
        raise InputError(f"{where}: adapter type {described.get('peft_type')!r}; only LORA is supported")
    for key, plain in _PLAIN.items():
        if (value := described.get(key, plain)) and value != plain:
            raise InputError(f"{where}: {CONFIG_FILE} has {key} = {value!r}, which is not supported; only plain LoRA is")
    try:
        rank, alpha = described["r"], described["lora_alpha"]
        scaled = alpha * rank**0.5 if described.get("use_rslora") else alpha
        return LoraConfig(rank=rank, alpha=scaled, dropout=described.get("lora_dropout", 0.0), targets=targets)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {CONFIG_FILE}: {error}") from None
