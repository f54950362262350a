"""Rewrite a model directory in the other dialect, quantised or as GGUF files, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ivl.checkpoint import load_config, resolve
from ivl.checkpoint.config_json import Dialect, dialect_of
from ivl.checkpoint.config_write import generation_json, to_json
from ivl.checkpoint.files import new_directory
from ivl.checkpoint.gguf.tokenizer import gguf_vocabulary
from ivl.checkpoint.gguf.writer import STORAGE, write_language, write_vision
from ivl.checkpoint.keymaps import key_map
from ivl.checkpoint.model_dir import empty_model, open_weights, read, tensors_of
from ivl.checkpoint.processor_files import jinja, load_processor, save_processor
from ivl.checkpoint.quantization import quantization_json, quantized_entries, weight_shapes
from ivl.checkpoint.weights import MAX_SHARD_BYTES, ByteProgress, write_shards
from ivl.errors import InputError
from ivl.processing.chat import template_of
from ivl.quant.layers import Scheme, Schemes, quantize, quantize_layers, quantized_layers, unpacked
from ivl.utils.files import write_json

LANGUAGE_GGUF, VISION_GGUF = "model.gguf", "mmproj.gguf"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Dialect | None = None,
    dtype: torch.dtype | None = None,
    schemes: Schemes | None = None,
    force: bool = False,
    weights_only: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ByteProgress | None = None,
) -> list[QuantizationLoss]:
    """Rewrite a model directory or hub id in a dialect: configuration, weights, tokenizer and preprocessor files.

    Tensors stream from shard to shard, so any size fits a small machine. What quantising loses is returned by layer, worst
    first, and written to `quantization.json`.

    Args:
        to: dialect to write; None keeps that of the source.
        dtype: of the written weights; None keeps that of the source. Integers stay integers.
        schemes: quantise linear layers in these ways.
        force: replace the target if it is a model directory.
        weights_only: do not ask for, and do not write, tokenizer and preprocessor files.

    Raises:
        InputError: if the source is not one complete model, or the target exists; the target is then untouched.
    """
    directory = resolve(source)
    config = load_config(directory)
    model = empty_model(config)
    weights, entries = open_weights(directory, model)
    dtype = dtype or weights.main_dtype
    to = to or dialect_of(directory)
    config_json = to_json(config, to, str(dtype).removeprefix("torch."))
    processor = None if weights_only else load_processor(directory)
    ours = {entry.ours: entry for entry in entries}
    theirs = key_map(model, to)
    quantizer = Quantizer(model, lambda name: read(ours[name], weights), schemes or Schemes())
    if schemes and schemes.named():
        theirs = quantized_entries(model, theirs)
        config_json["quantization_config"] = quantization_json(schemes)
    with new_directory(target, force=force) as out:
        write_shards(
            out,
            theirs,
            tensors_of(model),
            lambda entry: quantizer.get(entry.ours),
            dtype=dtype,
            extra=weight_shapes(model, theirs),
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        write_json(out / "generation_config.json", generation_json(config))
        if processor:
            save_processor(processor, out)
        losses = sorted(quantizer.losses, key=lambda loss: -loss.error)
        if losses:
            write_json(out / "quantization.json", _report(losses))
        write_json(out / "config.json", config_json)
    return losses


@dataclass(frozen=True, kw_only=True)
class QuantizationLoss:
    """What quantising lost of a layer."""

    layer: str
    scheme: str
    error: float
    """Norm of the difference of the weights, as a share of their norm."""


class Quantizer:
    """Puts quantised layers into an empty model and gives their tensors, from those of the model that it reads.

    Raises:
        InputError: if a layer does not fit its scheme.
    """

    def __init__(self, model: nn.Module, read: Callable[[str], torch.Tensor], schemes: Schemes) -> None:
        def scheme_of(path: str, layer: nn.Linear) -> Scheme | None:
            scheme = schemes.of(path)
            try:
                if scheme:
                    scheme.groups(layer.in_features)
            except ValueError as error:
                raise InputError(f"{path}: {error}; name another --group-size") from None
            return scheme

        self.losses: list[QuantizationLoss] = []
        self._read = read
        self._paths = set(quantize_layers(model, scheme_of))
        self._layers = quantized_layers(model)
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def get(self, name: str) -> torch.Tensor:
        """A parameter or buffer of the model; those of a quantised layer are asked for one after another."""
        path, _, leaf = name.rpartition(".")
        if path not in self._paths or leaf == "bias":
            return self._read(name)
        if self._last[0] != path:
            self._last = (path, self._quantized(path))
        return self._last[1][leaf]

    def _quantized(self, path: str) -> dict[str, torch.Tensor]:
        matrix, scheme = self._read(f"{path}.weight"), self._layers[path].scheme
        try:
            weight, scale, zero = quantize(matrix, scheme)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        lost, norm = 0.0, 0.0
        for first in range(0, len(matrix), 4096):
            some = slice(first, first + 4096)
            wanted = matrix[some].float()
            got = unpacked(weight[some], scale[some].float(), None if zero is None else zero[some], scheme)
            lost += float((got - wanted).square().sum())
            norm += float(wanted.square().sum())
        self.losses.append(QuantizationLoss(layer=path, scheme=scheme.name, error=(lost / norm) ** 0.5 if norm else 0.0))
        return {"weight": weight, "scale": scale, **({} if zero is None else {"zero": zero})}


def _report(losses: list[QuantizationLoss]) -> dict[str, Any]:
    meaning = "norm of the difference of the weights, as a share of their norm; worst layers first"
    return {"error": meaning, "layers": [asdict(loss) for loss in losses]}


def convert_to_gguf(
    source: str | Path,
    target: str | Path,
    *,
    storage: str | None = None,
    force: bool = False,
    progress: ByteProgress | None = None,
) -> int:
    """Write a model directory or hub id as the two files of llama.cpp: `model.gguf` and `mmproj.gguf` (docs/hand_over.md).

    Args:
        storage: float32, float16, bfloat16 or q8_0, of the matrices; None keeps the type of the source.
        force: replace the target if it holds such files.

    Returns:
        How many matrices q8_0 does not fit (rows no multiple of 32), which are float16 instead.

    Raises:
        InputError: as convert, and if llama.cpp does not compute such a model or has no words for its tokenizer.
    """
    directory = resolve(source)
    config = load_config(directory)
    model = empty_model(config)
    weights, entries = open_weights(directory, model)
    processor = load_processor(directory)
    form = template_of(config.template)
    end = processor.tokenizer.id(form.end)
    eos = end if end in config.eos_token_ids else config.eos_token_ids[0]
    vocabulary = gguf_vocabulary(processor.tokenizer, eos=eos, pad=config.pad_token_id)
    ours = {entry.ours: entry for entry in entries}

    def stored(name: str) -> torch.Tensor:
        return read(ours[name], weights)

    kind = STORAGE[storage or str(weights.main_dtype).removeprefix("torch.")]
    with new_directory(target, force=force, mark=LANGUAGE_GGUF) as out:
        wider = write_language(
            out / LANGUAGE_GGUF, model, stored, vocabulary,
            chat_template=jinja(form, config.system_message), storage=kind, progress=progress,
        )  # fmt: skip
        return wider + write_vision(out / VISION_GGUF, model, stored, storage=kind, progress=progress)
