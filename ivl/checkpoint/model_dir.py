"""Model directories in and out: a VLM, its config.json and its safetensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ivl.checkpoint.config_json import dialect_of, generation_json, load_config, model_config, tie_flags, to_json
from ivl.checkpoint.config_table import Dialect
from ivl.checkpoint.files import listing
from ivl.checkpoint.hub import resolve
from ivl.checkpoint.keymaps import TensorEntry, key_map, known_name
from ivl.checkpoint.quantization import (
    adopt,
    quantization_json,
    quantized_entries,
    rounds_activations,
    schemes_of,
    weight_shapes,
)
from ivl.checkpoint.sections import Section, Values, open_section
from ivl.checkpoint.shards import ShardedWeights, is_sharded_checkpoint
from ivl.checkpoint.weights import (
    MAX_SHARD_BYTES,
    OnMegabytes,
    RowSource,
    StoredWeights,
    TensorSource,
    check_entries,
    check_finite,
    is_finite,
    write_shards,
)
from ivl.config import ModelConfig
from ivl.errors import InputError
from ivl.model.vlm import VLM
from ivl.quant.layers import quantized_layers
from ivl.train.world import NO_CUTS, ModelCuts, cuts_of
from ivl.utils.files import write_json


def load_model(
    name_or_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantized: bool = True,
    map_embeddings: bool = False,
    split: Callable[[VLM], None] | None = None,
) -> VLM:
    """Load a model, in eval mode, from a directory or hub id of either dialect.

    Weights are copied from memory maps of their files; at most one shard is held beyond the model. Quantized weights stay
    what they are.

    Args:
        dtype: of the parameters; None keeps that of most of the stored weights.
        quantized: accept a quantized model; pass False where weights will be changed.
        map_embeddings: leave the embedding table in its file where that is possible: only rows that are used take memory.
        split: changes the empty model before it gets memory: leaves this rank its share (`ivl.parallel.tensor`), or gives
            layers memory on other cards (`ivl.gpu.spread`).

    Raises:
        InputError: if the model cannot be found, or its files do not describe exactly one model; nothing is allocated then.
    """
    directory = resolve(name_or_dir)
    model = empty_model(load_config(directory))
    weights, entries = open_weights(directory, model, quantized=quantized)
    model = model.to(dtype or weights.main_dtype)
    if split is not None:
        split(model)
    table = model.decoder.embeddings
    (name,) = next(entry.theirs for entry in entries if entry.ours == "decoder.embeddings.weight")
    on_cpu = torch.device(device).type == "cpu"
    if map_embeddings and split is None and on_cpu and table.weight.dtype == weights.dtypes[name]:
        table.weight = torch.nn.Parameter(weights.get(name))
        entries = [entry for entry in entries if entry.ours != "decoder.embeddings.weight"]
    allocate(model, device)
    fill(tensors_of(model), entries, weights, cuts_of(model))
    return model.eval()


def save_model(
    model: VLM,
    out_dir: str | Path,
    *,
    dialect: Dialect = "internvl_chat",
    dtype: torch.dtype | None = None,
    get: Callable[[str], torch.Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: OnMegabytes | None = None,
) -> None:
    """Write config.json, generation_config.json and the weights; the tokenizer's files are the processor's matter.

    Args:
        dtype: of the written weights; None keeps the model's.
        get: returns a parameter or buffer by its name, for a model on the meta device; called shard by shard, so that at
            most one shard is held. None writes the model's own.

    Raises:
        InputError: if the dialect cannot express the model, load_config would refuse its values, or the model carries LoRA
            adapters; nothing is written then.
    """
    directory, dtype = Path(out_dir), dtype or model.dtype
    config, generation = _configurations(model, dialect, dtype, directory)
    tensors = tensors_of(model)
    entries = quantized_entries(model, key_map(empty_model(model.config), dialect))
    extra = sorted(tensors.keys() - {entry.ours for entry in entries})
    if extra:
        raise InputError(f"the model has parameters that no checkpoint holds: {listing(extra)}; merge LoRA adapters first")
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(
        directory, entries, tensors, get or tensors.__getitem__,
        dtype=dtype, extra=weight_shapes(model, entries), max_shard_bytes=max_shard_bytes, progress=progress,
    )  # fmt: skip
    write_json(directory / "generation_config.json", generation)
    write_json(directory / "config.json", config)


def save_config(model: VLM, directory: Path) -> None:
    """Write config.json and generation_config.json of the original dialect, without weights."""
    config, generation = _configurations(model, "internvl_chat", next(model.parameters()).dtype, directory)
    write_json(directory / "generation_config.json", generation)
    write_json(directory / "config.json", config)


def _configurations(model: VLM, dialect: Dialect, dtype: torch.dtype, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what goes into config.json and generation_config.json, and refuse values that load_config would refuse."""
    config = to_json(model.config, dialect, str(dtype).removeprefix("torch."))
    if quantized_layers(model):
        config["quantization_config"] = quantization_json(schemes_of(model))
    generation = generation_json(model.config)
    place = "the configuration to be written"
    model_config(Section(config, place), Section(generation, place), directory)
    return config, generation


def empty_model(config: ModelConfig) -> VLM:
    """Build the model on the meta device: every name and shape, no memory."""
    with torch.device("meta"):
        return VLM(config)


def tensors_of(model: VLM) -> dict[str, torch.Tensor]:
    """Return all tensors that a checkpoint holds: parameters, and the buffers of quantized layers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def allocate(model: torch.nn.Module, device: torch.device | str) -> None:
    """Give every tensor of a model that is on the meta device memory, not yet written.

    `to_empty` does this, too, but imports sympy (0.7 s) for it.
    """
    model._apply(lambda like: torch.empty(like.shape, dtype=like.dtype, device=device) if like.is_meta else like)


def open_weights(directory: Path, model: VLM, *, quantized: bool = False) -> tuple[RowSource, list[TensorEntry]]:
    """Open the weights of a directory, and map them to the model by entries that are checked to fit both.

    Args:
        quantized: accept quantized weights; the (empty) model then gets the layers for them.

    Raises:
        InputError: listing missing, unexpected and misshapen tensors, or if weights are quantized unasked.
    """
    dialect = dialect_of(directory)
    if is_sharded_checkpoint(directory):
        shards, entries = ShardedWeights(directory), [TensorEntry(name, (name,)) for name, _ in model.named_parameters()]
        check_entries(entries, {name: tensor.shape for name, tensor in tensors_of(model).items()}, shards)
        return shards, entries
    entries = key_map(model, dialect)
    top = open_section(directory / "config.json")
    integers = top.values.get("quantization_config") is not None
    if integers and not quantized:
        raise InputError(
            f"{directory}: is quantized, which is for inference only; to train, merge, convert or compose, take the "
            "original model"
        )
    modules = {name.rpartition(".")[0] for entry in entries for name in entry.theirs}
    weights = StoredWeights(directory, lambda name: known_name(name, modules), integers=integers)
    _fold_adapters(weights, top)
    untie(entries, weights, top)
    if integers:
        entries = adopt(model, entries, weights, rounds_activations(top.section("quantization_config")))
    check_entries(entries, {name: tensor.shape for name, tensor in tensors_of(model).items()}, weights)
    return weights, entries


def _fold_adapters(weights: StoredWeights, top: Section) -> None:
    """Let weights be read merged with the adapters that the original training code left in a directory.

    Their alpha is twice their rank, which config.json has for language model and ViT.

    Raises:
        InputError: if it has another rank, for then their scale is not known.
    """
    ranks = weights.fold(2.0)
    for key, vision in (("use_llm_lora", False), ("use_backbone_lora", True)):
        flag = top.read(key, Values(int, 0, 1 << 12), 0)
        stored = {rank for name, rank in ranks.items() if name.startswith("vision_model.") == vision}
        if stored != ({flag} if flag else set()):
            found = f"adapters of rank {', '.join(map(str, sorted(stored)))}" if stored else "none"
            remedy = f"set it to {max(stored)} if alpha is twice that" if stored else "set it to 0 if they are merged already"
            raise InputError(f"{top.place}: {key} is {flag}, but of such adapters the weights hold {found}; {remedy}")


def untie(entries: Sequence[TensorEntry], weights: StoredWeights, top: Section) -> None:
    """Let a checkpoint without an output head give its embedding table for one, where its config.json says so.

    A head that is stored counts more than the flag; where it contradicts the flag, a note says so.
    """
    names = {entry.ours: entry.theirs[0] for entry in entries}
    head, table = names["decoder.head.weight"], names["decoder.embeddings.weight"]
    flags = tie_flags(top)
    if table in weights.shapes and not any(name.startswith(head) for name in weights.shapes):
        if any(flags) or (not flags and top.values.get("model_type") == "internvl"):  # transformers' own default
            weights.alias(head, table)
        return
    both = flags[:1] == [True] and {head, table} <= weights.shapes.keys()
    if both and not torch.equal(weights.get(head), weights.get(table)):
        differ = f"tie_word_embeddings is true, but {head} differs from {table}"
        print(f"{weights.directory}: {differ}; the stored head is taken", file=sys.stderr)


@torch.no_grad()
def fill(
    parameters: Mapping[str, torch.Tensor], entries: Sequence[TensorEntry], weights: TensorSource, cuts: ModelCuts = NO_CUTS
) -> None:
    """Copy the weights of every entry into our parameters, or this rank's share of them, converting dtype and device.

    The copies are checked while the next ones are made: that takes no time of its own, and files are read once.

    Raises:
        InputError: naming the tensor, if it holds NaN or an infinity, or numbers that our dtype cannot express.
    """
    with ThreadPoolExecutor(1) as checker:
        finite: list[Future[bool]] = []
        for entry in entries:
            ours = parameters[entry.ours]
            if entry.ours in cuts.cuts:
                ours.copy_(cuts.share(entry.ours, read(entry, weights)))
            elif entry.rows and entry.form == "same" and entry.groups is None:
                for part, name in zip(ours.split(entry.rows), entry.theirs, strict=True):  # joins without a copy of the whole
                    part.copy_(weights.get(name))
            else:
                ours.copy_(read(entry, weights))
            finite.append(checker.submit(is_finite, ours.detach()))
    for entry, found in zip(entries, finite, strict=True):
        if not found.result():
            raise _not_finite(entry, weights, parameters[entry.ours].dtype)


def open_rows(directory: Path, model: VLM) -> EntryRows:
    """Open the weights of a directory, checked to fit the model, to be read by rows of our parameters."""
    weights, entries = open_weights(directory, model)
    return EntryRows(entries, weights)


class EntryRows:
    """Our parameters as tensors whose rows are read alone, by the entries of a key map."""

    def __init__(self, entries: Sequence[TensorEntry], weights: RowSource) -> None:
        self.entries, self.weights = {entry.ours: entry for entry in entries}, weights
        self.shapes = {
            name: (sum(weights.shapes[theirs][0] for theirs in entry.theirs), *weights.shapes[entry.theirs[0]][1:])
            if entry.form == "same" else weights.shapes[entry.theirs[0]][1:]
            for name, entry in self.entries.items()
        }  # fmt: skip

    def get(self, name: str) -> torch.Tensor:
        """Read a parameter."""
        return read_finite(self.entries[name], self.weights)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read rows [first, last) of a parameter."""
        if self.entries[name].form != "same":
            return self.get(name)[first:last]
        parts, at = [], 0
        for theirs, begin, count in self.entries[name].runs(self.shapes[name][0]):
            low, high = max(first, at), min(last, at + count)
            if low < high:
                parts.append(self.weights.rows(theirs, begin + low - at, begin + high - at))
                if not is_finite(parts[-1]):
                    check_finite(self.weights, [theirs])
            at += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def read(entry: TensorEntry, weights: TensorSource) -> torch.Tensor:
    """Read our parameter for an entry, as stored."""
    return entry.join([weights.get(name) for name in entry.theirs])


def read_finite(entry: TensorEntry, weights: TensorSource) -> torch.Tensor:
    """Read our parameter for an entry into memory of its own.

    Raises:
        InputError: naming the tensor, if it holds NaN or an infinity.
    """
    tensors = [weights.get(name) for name in entry.theirs]
    ours = entry.join(tensors)
    ours = ours.clone() if ours is tensors[0] else ours  # else the file would be read here and by whoever copies
    if not is_finite(ours):
        raise _not_finite(entry, weights, ours.dtype)
    return ours


def _not_finite(entry: TensorEntry, weights: TensorSource, dtype: torch.dtype) -> InputError:
    """Return the error for what was read for an entry, or raise that for one of its tensors."""
    check_finite(weights, entry.theirs)
    places = " or ".join(map(weights.place, entry.theirs))
    return InputError(f"{places} holds numbers that {dtype} cannot express; take bfloat16 or float32")
