"""LoRA adapters in files, named and stored as PEFT does for transformers' InternVLForConditionalGeneration.

Beside the adapters, the file has the parameters that trained whole, which PEFT knows as modules to save.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch

from ivl.checkpoint.config_json import dialect_of
from ivl.checkpoint.convert import convert
from ivl.checkpoint.files import new_directory
from ivl.checkpoint.hub import resolve
from ivl.checkpoint.keymaps import TensorEntry, key_map
from ivl.checkpoint.model_dir import empty_model, load_model, save_model
from ivl.checkpoint.peft_file import CONFIG_FILE, PEFT_PREFIX, AdapterFile, AdapterRanks
from ivl.checkpoint.processor_files import load_processor, save_processor
from ivl.checkpoint.sections import TEXT, open_section
from ivl.checkpoint.weights import ADAPTER, write_tensors
from ivl.config import LoraConfig
from ivl.errors import InputError, short
from ivl.lora.layers import LoraLinear, add_adapters, lora_layers, merge_lora
from ivl.model.vlm import VLM
from ivl.utils.files import write_json

BASE_FILE = "ivl_base.json"
SAMPLES = 4096


def merge(
    model: str | Path, adapter: str | Path | None, out: str | Path, *, force: bool = False, allow_base: bool = False
) -> None:
    """Fold a LoRA adapter into its model and write a directory that needs neither, in the model's dialect.

    Args:
        adapter: directory of the adapter; or a model directory that holds weights and adapters unmerged, as the original
            training code leaves them, or None where the model is that. The base is then not read.
        force: replace out if it is a model directory.
        allow_base: accept a model that the adapter was not trained from.

    Raises:
        InputError: if the model or the adapter is unreadable, they do not fit each other, or out exists.
    """
    directory = resolve(model)
    inside = directory if adapter is None else Path(adapter)
    if not (inside / CONFIG_FILE).exists() and (inside / "config.json").exists():
        top = open_section(inside / "config.json")
        if not (top.values.get("use_llm_lora") or top.values.get("use_backbone_lora")):
            raise InputError(
                f"{top.place}: names no adapters in use_llm_lora or use_backbone_lora, so there is nothing to merge"
            )
        convert(inside, out, force=force)
        return
    if adapter is None:
        raise InputError(f"{directory}: is an adapter; name its model before it: ivl merge MODEL {directory} OUT")
    with new_directory(out, force=force, sources=[directory]) as target:
        merged = load_model(directory, quantized=False)
        processor = load_processor(directory)
        load_adapter(merged, adapter, allow_base=allow_base)
        if not (Path(adapter) / BASE_FILE).exists():
            print(f"{adapter}: has no {BASE_FILE}, so whether it was trained from {model} is not known", file=sys.stderr)
        merge_lora(merged)
        save_model(merged, target, dialect=dialect_of(directory))
        save_processor(processor, target)


def save_adapter(
    model: VLM,
    out_dir: str | Path,
    *,
    base: str = "",
    trained: Iterable[str] = (),
    get: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write a model's adapters as PEFT does: adapter_config.json, adapter_model.safetensors, and the base's fingerprint.

    Args:
        base: name or directory of the base model, for the configuration.
        trained: names of the parameters that differ from the base's; those that are no adapters' are written whole.
        get: returns a parameter by its name, of a model that is sharded. None takes the model's own.

    Raises:
        InputError: if the model has no adapters, or a file cannot be written.
    """
    entries, get = key_map(empty_model(model.config), "transformers"), get or model.get_parameter
    paths = {layer: path for path, layer in lora_layers(model).items()}
    adapted = _adapted(model, entries)
    if not adapted:
        raise InputError("the model carries no LoRA adapters, so there is nothing to save")
    configs = {path: layer.configs[name] for path, (layer, name) in adapted.items()}
    config = next(iter(configs.values()))
    adapters = {
        f"{PEFT_PREFIX}{path}.lora_{letter}.weight": get(f"{paths[layer]}.lora_{letter}.{name}").detach().cpu().contiguous()
        for path, (layer, name) in adapted.items()
        for letter in ("A", "B")
    }
    whole = {name for name in trained if ".lora_" not in name}
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for entry in entries
        if entry.ours in whole
        for name, tensor in zip(entry.theirs, entry.split(get(entry.ours)), strict=True)
    }
    modules = _topmost({name for name in tensors if name.removesuffix(".weight") not in adapted}, entries)
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": _alpha(config),
        "lora_dropout": config.dropout,
        "target_modules": sorted(adapted),
        "modules_to_save": modules or None,
        "rank_pattern": {path: own.rank for path, own in configs.items() if own.rank != config.rank},
        "alpha_pattern": {path: _alpha(own) for path, own in configs.items() if _alpha(own) != _alpha(config)},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / ADAPTER, adapters | {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()})
    write_json(out / BASE_FILE, {"fingerprint": base_fingerprint(model, whole, get)})
    write_json(out / CONFIG_FILE, described)


def load_adapter(model: VLM, adapter_dir: str | Path, *, allow_base: bool = False) -> LoraConfig:
    """Add the adapters of a directory that PEFT or save_adapter wrote to the model, and the parts trained whole, in place.

    Adapters of embeddings and convolutions are added to their weights.

    Args:
        allow_base: accept a model that is not the one from which the adapter was trained.

    Returns:
        Rank, scale and dropout of adapter_config.json, of which single layers may differ.

    Raises:
        InputError: if files are missing, the adapter uses what is not supported here, a tensor does not fit, or the model is
            not the adapter's base; the model is then unchanged.
    """
    where = Path(adapter_dir)
    if not os.path.lexists(where / CONFIG_FILE):
        inside = "".join(f"; {path.parent} has one" for path in sorted(where.glob(f"*/{CONFIG_FILE}"))[:1])
        raise InputError(f"{where}: no {CONFIG_FILE}; a LoRA adapter is a directory with {CONFIG_FILE} and {ADAPTER}{inside}")
    described = open_section(where / CONFIG_FILE)
    ranks = AdapterRanks(described)
    file = AdapterFile(where, model, ranks)
    configs: dict[str, LoraConfig] = {}
    for matrices in file.low_rank:
        for name in matrices.projections(model):
            if name in configs:
                raise InputError(f"{where}: {name} has two adapters, under the names of two classes")
            configs[name] = matrices.config
    if os.path.lexists(where / BASE_FILE) and not allow_base:
        expected = open_section(where / BASE_FILE).read("fingerprint", TEXT)
        if expected != base_fingerprint(model, {entry.ours for entry, _ in file.whole.values()}):
            trained_from = described.values.get("base_model_name_or_path") or "another model"
            remedy = "name that one; `ivl merge --allow-base` takes it all the same"
            raise InputError(f"{where}: was trained from {short(trained_from)}, not from this model; {remedy}")
    add_adapters(model, configs)
    file.replace_whole(model)
    for matrices in file.low_rank:
        matrices.put(model, file.weights)
    return replace(ranks.common, targets=tuple(configs) or ranks.common.targets)


def adapted(model: VLM, adapter: str | Path) -> VLM:
    """Return the model with an adapter, unmerged. It shares every parameter that the adapter leaves as it was.

    Raises:
        InputError: as `load_adapter`.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    variant = copy.deepcopy(model, shared)
    load_adapter(variant, adapter)
    return variant.requires_grad_(False).eval()


def base_fingerprint(model: VLM, whole: Collection[str], get: Callable[[str], torch.Tensor] | None = None) -> str:
    """Hash the weights that an adapter leaves as they were, by name and shape and by elements all over each.

    Elements count as bfloat16, so that the type in which the base is stored or trained makes no difference.

    Args:
        model: the model.
        whole: names of parameters that are no longer the base's.
        get: as of save_adapter.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" not in name and name not in whole:
            elements = (get(name) if get else parameter).detach().flatten()
            sample = elements[:: max(1, len(elements) // SAMPLES)].to("cpu", torch.bfloat16)
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _topmost(names: set[str], entries: Iterable[TensorEntry]) -> list[str]:
    """The topmost modules all of whose tensors are among the names."""

    def modules(name: str) -> list[str]:
        return list(accumulate(name.split(".")[:-1], lambda path, part: f"{path}.{part}"))

    partly = {module for entry in entries for name in entry.theirs if name not in names for module in modules(name)}
    return sorted({next((m for m in modules(name) if m not in partly), "") for name in names} - {""})


def _adapted(model: VLM, entries: Iterable[TensorEntry]) -> dict[str, tuple[LoraLinear, str]]:
    """Layer and name of every adapter by the path of its module in the class whose tensors the entries name."""
    layers = lora_layers(model)
    weights = ((layers[path], entry) for entry in entries if (path := entry.ours.removesuffix(".weight")) in layers)
    return {
        theirs.removesuffix(".weight"): (layer, name)
        for layer, entry in weights
        for name, theirs in zip([name for name, _ in layer.parts] or ["weight"], entry.theirs, strict=True)
        if name in layer.spans
    }


def _alpha(config: LoraConfig) -> float:
    alpha = config.scale * config.rank
    return int(alpha) if alpha == int(alpha) else alpha
