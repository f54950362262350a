"""Rewrite a model directory in the other dialect, quantized or as GGUF files, whole or not at all."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ivl.checkpoint.config_json import dialect_of, load_config
from ivl.checkpoint.config_table import Dialect, StoredDtype
from ivl.checkpoint.files import new_directory
from ivl.checkpoint.gguf.tokenizer import gguf_vocabulary
from ivl.checkpoint.gguf.writer import STORAGE, ReadParameter, Storage, write_language, write_vision
from ivl.checkpoint.hub import resolve
from ivl.checkpoint.model_dir import empty_model, open_weights, read_finite, save_model
from ivl.checkpoint.processor_files import jinja, load_processor, save_processor
from ivl.checkpoint.weights import MAX_SHARD_BYTES, OnMegabytes
from ivl.errors import InputError
from ivl.model.vlm import VLM
from ivl.processing.chat import template_of
from ivl.processing.processor import Processor
from ivl.quant.layers import QuantConfig, QuantPlan, dequantize, quantize, quantize_layers, quantized_layers
from ivl.utils.files import write_json

LANGUAGE_GGUF, VISION_GGUF = "model.gguf", "mmproj.gguf"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Dialect | Literal["keep", "gguf"] = "keep",
    dtype: StoredDtype | Literal["q8_0"] = "keep",
    schemes: QuantPlan | None = None,
    force: bool = False,
    weights_only: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: OnMegabytes | None = None,
) -> ConversionReport:
    """Rewrite a model directory or hub id: configuration, weights, tokenizer and preprocessor files.

    Tensors stream from shard to shard, so any size fits a small machine. `quantization.json` reports the loss of each
    quantized layer.

    Args:
        to: dialect to write, or gguf for the two files of llama.cpp (docs/hand_over.md); keep is the dialect of the source.
        dtype: of the written matrices; keep is that of the source, q8_0 is for gguf. Integers stay integers.
        schemes: of linear layers to quantize.
        force: replace the target if it is a model directory.
        weights_only: neither read nor write tokenizer and preprocessor files.

    Raises:
        InputError: if the source is not one complete model or has weights that are not finite, the target exists, or the
            format cannot express the model; the target is then untouched.
    """
    schemes = schemes or QuantPlan()
    if to == "gguf" and schemes.by_part():
        raise InputError("--quantize is not for --to gguf, which has formats of its own: --dtype q8_0")
    if to == "gguf" and weights_only:
        raise InputError("--weights-only is not for --to gguf: llama.cpp needs the tokenizer in the file")
    if to != "gguf" and dtype == "q8_0":
        raise InputError("--dtype q8_0 is for --to gguf; safetensors take bfloat16, float16 or float32")
    directory = resolve(source)
    model = empty_model(load_config(directory))
    weights, entries = open_weights(directory, model)
    processor = None if weights_only else load_processor(directory)
    stored = {entry.ours: entry for entry in entries}

    def original(name: str) -> torch.Tensor:
        return read_finite(stored[name], weights)

    written = str(weights.main_dtype).removeprefix("torch.") if dtype == "keep" else dtype
    if to == "gguf" and processor:
        with new_directory(target, force=force, sources=[directory]) as out:
            return ConversionReport(wider=_write_gguf(out, model, original, processor, STORAGE.get(written, "F32"), progress))
    losses: list[QuantizationLoss] = []
    get = quantizing(model, original, schemes, losses)
    with new_directory(target, force=force, sources=[directory]) as out:
        save_model(
            model, out, dialect=dialect_of(directory) if to in ("keep", "gguf") else to, dtype=getattr(torch, written),
            get=get, max_shard_bytes=max_shard_bytes, progress=progress,
        )  # fmt: skip
        if processor:
            save_processor(processor, out)
        losses.sort(key=lambda loss: -loss.error)
        if losses:
            error = "norm of the difference of the weights, as a share of their norm; worst layers first"
            write_json(out / "quantization.json", {"error": error, "layers": [asdict(loss) for loss in losses]})
    return ConversionReport(losses=losses)


def _write_gguf(
    out: Path, model: VLM, get: ReadParameter, processor: Processor, storage: Storage, progress: OnMegabytes | None
) -> int:
    config = model.config
    template = template_of(config.template)
    end = processor.tokenizer.id(template.end)
    eos = end if end in config.eos_token_ids else config.eos_token_ids[0]
    vocabulary = gguf_vocabulary(processor.tokenizer, eos=eos, pad=config.pad_token_id)
    chat_template = jinja(template, config.system_message)
    wider = write_language(
        out / LANGUAGE_GGUF, model, get, vocabulary, chat_template=chat_template, storage=storage, progress=progress
    )
    return wider + write_vision(out / VISION_GGUF, model, get, storage=storage, progress=progress)


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """The losses of a conversion."""

    losses: list[QuantizationLoss] = field(default_factory=list)
    """Of each quantized layer, the largest first."""
    wider: int = 0
    """How many matrices q8_0 does not fit (rows no multiple of 32), which are float16 instead."""


@dataclass(frozen=True, kw_only=True)
class QuantizationLoss:
    """The difference that quantizing made to a layer."""

    layer: str
    scheme: str
    error: float
    """Norm of the difference of the weights, as a share of their norm."""


def quantizing(model: nn.Module, read: ReadParameter, schemes: QuantPlan, losses: list[QuantizationLoss]) -> ReadParameter:
    """Replace layers of an empty model by quantized ones; return a reader that computes them from the original's tensors.

    Args:
        read: returns a tensor of the original model by its name.
        losses: gets the loss of each layer when that is first read.

    Raises:
        InputError: if a layer does not fit its scheme.
    """

    def scheme_of(path: str, layer: nn.Linear) -> QuantConfig | None:
        scheme = schemes.for_layer(path)
        try:
            if scheme:
                scheme.groups(layer.in_features)
        except ValueError as error:
            raise InputError(f"{path}: {error}; name another --group-size") from None
        return scheme

    quantize_layers(model, scheme_of)
    layers = quantized_layers(model)

    @lru_cache(maxsize=1)  # the tensors of a layer are read one after another
    def quantized(path: str) -> dict[str, torch.Tensor | None]:
        matrix, scheme = read(f"{path}.weight"), layers[path].config
        try:
            weight, scale, zero = quantize(matrix, scheme)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        lost, norm = 0.0, 0.0
        for first in range(0, len(matrix), 4096):
            rows = slice(first, first + 4096)
            original = matrix[rows].float()
            restored = dequantize(weight[rows], scale[rows].float(), None if zero is None else zero[rows], scheme)
            lost += float((restored - original).square().sum())
            norm += float(original.square().sum())
        losses.append(QuantizationLoss(layer=path, scheme=scheme.name, error=(lost / norm) ** 0.5 if norm else 0.0))
        return {"weight": weight, "scale": scale, "zero": zero}

    def get(name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        tensor = quantized(path)[leaf] if path in layers and leaf != "bias" else None
        return read(name) if tensor is None else tensor

    return get
