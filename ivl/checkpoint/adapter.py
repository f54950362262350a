"""LoRA adapters in files, named and stored as PEFT does for transformers' InternVLForConditionalGeneration.

Beside the adapters, the file has the parameters that trained whole, which PEFT knows as modules to save.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

from ivl.checkpoint.config_json import dialect_of
from ivl.checkpoint.files import listing, new_directory
from ivl.checkpoint.hub import resolve
from ivl.checkpoint.keymaps import TensorEntry, key_map
from ivl.checkpoint.model_dir import empty_model, fill, load_model, save_model
from ivl.checkpoint.processor_files import load_processor, save_processor
from ivl.checkpoint.sections import FLAG, TEXT, Section, Values, open_section
from ivl.checkpoint.weights import StoredWeights, write_tensors
from ivl.config import LoraConfig
from ivl.errors import InputError, short
from ivl.lora.layers import add_lora, lora_layers, merge_lora, projections
from ivl.model.vlm import VLM
from ivl.utils.files import write_json

CONFIG_FILE, TENSORS_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "ivl_base.json"
PEFT_PREFIX = "base_model.model."
_PLAIN = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "layer_replication": None, "rank_pattern": {},
    "alpha_pattern": {}, "fan_in_fan_out": False,
}  # fmt: skip
"""Keys of adapter_config.json with the only values that the layers compute."""
SAMPLES = 4096


def merge(model: str | Path, adapter: str | Path, out: str | Path, *, force: bool = False, allow_base: bool = False) -> None:
    """Fold a LoRA adapter into its model and write a directory that needs neither, in the model's dialect.

    Args:
        force: replace out if it is a model directory.
        allow_base: accept a model that the adapter was not trained from.

    Raises:
        InputError: if the model or the adapter is unreadable, they do not fit each other, or out exists.
    """
    directory = resolve(model)
    with new_directory(out, force=force, sources=[directory]) as target:
        merged = load_model(directory, quantized=False)
        processor = load_processor(directory)
        load_adapter(merged, adapter, allow_base=allow_base)
        if not (Path(adapter) / BASE_FILE).exists():
            print(f"{adapter}: has no {BASE_FILE}, so whether it was trained from {model} is not known", file=sys.stderr)
        merge_lora(merged)
        save_model(merged, target, dialect=dialect_of(directory))
        save_processor(processor, target)


def save_adapter(model: VLM, out_dir: str | Path, *, base: str = "", trained: Iterable[str] = ()) -> None:
    """Write a model's adapters as PEFT does: adapter_config.json, adapter_model.safetensors, and the base's fingerprint.

    Args:
        base: name or directory of the base model, for the configuration.
        trained: names of the parameters that differ from the base's; those that are no adapters' are written whole.

    Raises:
        InputError: if the model has no adapters, or a file cannot be written.
    """
    layers = lora_layers(model)
    if not layers:
        raise InputError("the model carries no LoRA adapters, so there is nothing to save")
    config = next(iter(layers.values())).config
    alpha = config.scale * config.rank
    adapters = {name: parameter.detach().cpu().contiguous() for name, parameter in _adapter_tensors(model).items()}
    whole = {name for name in trained if ".lora_" not in name}
    entries, parameters = _entries(model), dict(model.named_parameters())
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for entry in entries
        if entry.ours in whole
        for name, tensor in zip(entry.theirs, entry.split(parameters[entry.ours]), strict=True)
    }
    targets = sorted({_module_path(name) for name in adapters})
    modules = _topmost({name for name in tensors if _module_path(name) not in targets}, entries)
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "modules_to_save": modules or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / TENSORS_FILE, adapters | {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()})
    write_json(out / BASE_FILE, {"fingerprint": base_fingerprint(model, whole)})
    write_json(out / CONFIG_FILE, described)


def load_adapter(model: VLM, adapter_dir: str | Path, *, allow_base: bool = False) -> LoraConfig:
    """Add the adapters of a directory that PEFT or save_adapter wrote to the model, and the parts trained whole, in place.

    Args:
        allow_base: accept a model that is not the one from which the adapter was trained.

    Raises:
        InputError: if files are missing, the adapter uses what is not supported here, a tensor does not fit, or the model is
            not the adapter's base; the model is then unchanged.
    """
    where = Path(adapter_dir)
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not os.path.lexists(where / file):
            raise InputError(f"{where}: no {file}; a LoRA adapter is a directory with {CONFIG_FILE} and {TENSORS_FILE}")
    described = open_section(where / CONFIG_FILE)
    rank, alpha, dropout = _numbers(described)
    weights = StoredWeights(where, lambda name: name.replace(".base_layer.", "."), file=TENSORS_FILE)
    paths = _module_paths(model)
    entries = {f"{PEFT_PREFIX}{name}": entry for entry in _entries(model) for name in entry.theirs}
    projection_at = {path: projection for projection, path in paths.items()}
    names = [name for name in weights.shapes if name not in entries]
    strangers = [name for name in names if _module_path(name) not in projection_at]
    if strangers:
        raise InputError(f"{where}: {len(strangers)} tensors name no linear layer of this model, first {short(strangers[0])}")
    targets = tuple(dict.fromkeys(projection_at[_module_path(name)] for name in names))
    if not targets:
        raise InputError(f"{where / TENSORS_FILE}: has no LoRA tensor; expected names such as {PEFT_PREFIX}*.lora_A.weight")
    whole = {entries[name].ours: entries[name] for name in weights.shapes if name in entries}
    config = LoraConfig(rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    blank = empty_model(model.config)
    add_lora(blank, config)
    shapes = {name: tuple(parameter.shape) for name, parameter in _adapter_tensors(blank).items()}
    for entry in whole.values():
        parts = entry.shapes(model.get_parameter(entry.ours).shape)
        shapes |= {PEFT_PREFIX + name: shape for name, shape in zip(entry.theirs, parts, strict=True)}
    for name, shape in shapes.items():
        if (stored := weights.shapes.get(name, "nothing")) != shape:
            raise InputError(f"{where}: {name} should be {shape} but the file has {stored}")
    if extra := sorted(weights.shapes.keys() - shapes.keys()):
        raise InputError(f"{where}: {listing(extra)} belong to no adapter")
    if os.path.lexists(where / BASE_FILE) and not allow_base:
        expected = open_section(where / BASE_FILE).read("fingerprint", TEXT)
        if expected != base_fingerprint(model, whole):
            trained_from = described.values.get("base_model_name_or_path") or "another model"
            raise InputError(f"{where}: was trained from {short(trained_from)}, not from this model; --allow-base takes it")
    add_lora(model, config)
    with torch.no_grad():
        for name, parameter in _adapter_tensors(model).items():
            parameter.copy_(weights.get(name))
        renamed = [replace(e, theirs=tuple(PEFT_PREFIX + name for name in e.theirs)) for e in whole.values()]
        fill(dict(model.named_parameters()), renamed, weights)
    return config


def base_fingerprint(model: VLM, whole: Collection[str]) -> str:
    """Hash the weights that an adapter leaves as they were, by name and shape and by elements all over each.

    Elements count as bfloat16, so that the type in which the base is stored or trained makes no difference.

    Args:
        whole: names of parameters that are no longer the base's.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" not in name and name not in whole:
            elements = parameter.detach().flatten()
            sample = elements[:: max(1, len(elements) // SAMPLES)].to("cpu", torch.bfloat16)
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _entries(model: VLM) -> list[TensorEntry]:
    return key_map(empty_model(model.config), "transformers")


def _topmost(names: set[str], entries: Iterable[TensorEntry]) -> list[str]:
    """The topmost modules all of whose tensors are among the names."""

    def modules(name: str) -> list[str]:
        return list(accumulate(name.split(".")[:-1], lambda path, part: f"{path}.{part}"))

    partly = {module for entry in entries for name in entry.theirs if name not in names for module in modules(name)}
    return sorted({next((m for m in modules(name) if m not in partly), "") for name in names} - {""})


def _module_paths(model: VLM) -> dict[str, str]:
    """Paths of our projections in transformers' InternVLForConditionalGeneration: those of their weights in its dialect."""
    paths = {entry.ours: iter(entry.theirs) for entry in _entries(model)}
    return {name: next(paths[f"{layer}.weight"]).removesuffix(".weight") for name, (layer, _) in projections(model).items()}


def _module_path(tensor: str) -> str:
    """The module path in a tensor's name of an adapter file."""
    return re.sub(r"(\.lora_[AB])?\.weight$", "", tensor.removeprefix(PEFT_PREFIX))


def _adapter_tensors(model: VLM) -> dict[str, nn.Parameter]:
    """A and B of every adapter, by their names in the file."""
    layers, paths = lora_layers(model), _module_paths(model)
    return {
        f"{PEFT_PREFIX}{paths[projection]}.lora_{letter}.weight": parameters[name]
        for projection, (path, name) in projections(model).items()
        if path in layers and name in layers[path].spans
        for letter, parameters in (("A", layers[path].lora_A), ("B", layers[path].lora_B))
    }


def _numbers(described: Section) -> tuple[int, float, float]:
    """Rank, alpha and dropout of adapter_config.json; refuses what is more than plain LoRA."""
    for key, plain in _PLAIN.items():
        if (value := described.values.get(key, plain)) != plain and (value or key == "peft_type"):
            raise described.refusal(key, value, f"{plain!r}; only plain LoRA is supported")
    described.items("modules_to_save", TEXT, [])
    rank, alpha = described.read("r", Values(int, 1, 1 << 12)), described.read("lora_alpha", Values(float, 1e-6, 1e6))
    scaled = alpha * rank**0.5 if described.read("use_rslora", FLAG, False) else alpha
    return rank, scaled, described.read("lora_dropout", Values(float, 0, 0.9999), 0.0)
