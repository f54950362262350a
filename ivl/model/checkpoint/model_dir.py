"""A model directory in memory and back: VLM to and from config.json and safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ivl.config import ModelConfig
from ivl.errors import InputError
from ivl.model.checkpoint.config_json import dialect_of, load_config, tied
from ivl.model.checkpoint.config_write import generation_json, to_json
from ivl.model.checkpoint.files import (
    MAX_SHARD_BYTES,
    Progress,
    Source,
    Weights,
    check_entries,
    listing,
    write_json,
    write_shards,
)
from ivl.model.checkpoint.hub import resolve
from ivl.model.checkpoint.keymaps import Dialect, Entry, current_name, key_map
from ivl.model.vlm import VLM


def load_model(name_or_dir: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> VLM:
    """A model in eval mode from a directory or hub id, in either dialect.

    Weights are mapped from their files and converted on the way; at most one shard is held beyond the model.

    Args:
        dtype: of the parameters; None keeps that of most of the stored weights.

    Raises:
        InputError: if the model cannot be found, or its files do not describe exactly one model; nothing is allocated then.
    """
    directory = resolve(name_or_dir)
    model = empty_model(load_config(directory))
    weights, entries = open_weights(directory, model)
    model = model.to(dtype or weights.main_dtype).to_empty(device=device)
    fill(dict(model.named_parameters()), entries, weights)
    return model.eval()


def save_model(
    model: VLM,
    out_dir: str | Path,
    *,
    dialect: Dialect = "internvl_chat",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write config.json, generation_config.json and the weights; the tokenizer's files are the processor's matter.

    Args:
        dtype: of the written weights; None keeps the model's.

    Raises:
        InputError: if the dialect cannot express the model, or the model carries LoRA adapters.
    """
    dtype = dtype or model.dtype
    directory = Path(out_dir)
    parameters = dict(model.named_parameters())
    entries = key_map(empty_model(model.config), dialect)
    extra = sorted(parameters.keys() - {entry.ours for entry in entries})
    if extra:
        raise InputError(f"the model has parameters that no checkpoint holds: {listing(extra)}; merge LoRA adapters first")
    config = to_json(model.config, dialect, str(dtype).removeprefix("torch."))
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(
        directory,
        entries,
        {name: parameter.shape for name, parameter in parameters.items()},
        lambda entry: parameters[entry.ours].detach(),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    write_json(directory / "generation_config.json", generation_json(model.config))
    write_json(directory / "config.json", config)


def empty_model(config: ModelConfig) -> VLM:
    """The model on the meta device: every name and shape, no memory."""
    with torch.device("meta"):
        return VLM(config)


def open_weights(directory: Path, model: VLM) -> tuple[Weights, list[Entry]]:
    """The weights of a directory and the entries that map them to the model, checked to fit each other.

    Raises:
        InputError: listing missing, unexpected and misshapen tensors.
    """
    dialect = dialect_of(directory)
    entries = key_map(model, dialect)
    weights = Weights(directory, current_name if dialect == "transformers" else str)
    if tied(directory):
        untie(entries, weights, "decoder.")
    check_entries(entries, {name: parameter.shape for name, parameter in model.named_parameters()}, weights)
    return weights, entries


def untie(entries: Sequence[Entry], weights: Weights, ours: str = "") -> None:
    """Let a checkpoint without an output head give its embedding table for one."""
    names = {entry.ours: entry.theirs[0] for entry in entries}
    head, embeddings = names[f"{ours}head.weight"], names[f"{ours}embeddings.weight"]
    if head not in weights.shapes and embeddings in weights.shapes:
        weights.alias(head, embeddings)


@torch.no_grad()
def fill(parameters: Mapping[str, torch.Tensor], entries: Sequence[Entry], weights: Source) -> None:
    """Copy the weights of every entry into our parameters, converting dtype and device."""
    for entry in entries:
        ours = parameters[entry.ours]
        if entry.groups is not None:
            ours.copy_(read(entry, weights))
            continue
        for part, name in zip(entry.split(ours), entry.theirs, strict=True):  # views, so this fills ours
            part.copy_(weights.get(name))


def read(entry: Entry, weights: Source) -> torch.Tensor:
    """Our parameter for an entry, as stored."""
    return entry.join([weights.get(name) for name in entry.theirs])
