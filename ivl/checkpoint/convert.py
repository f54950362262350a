"""Rewrite a model directory in the other dialect, quantized or as GGUF files, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ivl.checkpoint.config_json import dialect_of, load_config
from ivl.checkpoint.config_table import Dialect
from ivl.checkpoint.files import new_directory
from ivl.checkpoint.gguf.tokenizer import gguf_vocabulary
from ivl.checkpoint.gguf.writer import STORAGE, write_language, write_vision
from ivl.checkpoint.hub import resolve
from ivl.checkpoint.model_dir import empty_model, open_weights, read, write_model
from ivl.checkpoint.processor_files import jinja, load_processor, save_processor
from ivl.checkpoint.weights import MAX_SHARD_BYTES, ByteProgress
from ivl.errors import InputError
from ivl.processing.chat import template_of
from ivl.quant.layers import QuantConfig, QuantPlan, dequantize, quantize, quantize_layers, quantized_layers
from ivl.utils.files import write_json

LANGUAGE_GGUF, VISION_GGUF = "model.gguf", "mmproj.gguf"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Dialect | None = None,
    dtype: torch.dtype | None = None,
    schemes: QuantPlan | None = None,
    force: bool = False,
    weights_only: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ByteProgress | None = None,
) -> list[QuantizationLoss]:
    """Rewrite a model directory or hub id in a dialect: configuration, weights, tokenizer and preprocessor files.

    Tensors stream from shard to shard, so any size fits a small machine. `quantization.json` reports the loss of each
    quantized layer.

    Args:
        to: dialect to write; None keeps that of the source.
        dtype: of the written weights; None keeps that of the source. Integers stay integers.
        schemes: of linear layers to quantize.
        force: replace the target if it is a model directory.
        weights_only: neither read nor write tokenizer and preprocessor files.

    Returns:
        The loss of each quantized layer, the largest first.

    Raises:
        InputError: if the source is not one complete model, or the target exists; the target is then untouched.
    """
    directory = resolve(source)
    model = empty_model(load_config(directory))
    weights, entries = open_weights(directory, model)
    processor = None if weights_only else load_processor(directory)
    stored = {entry.ours: entry for entry in entries}
    quantizer = Quantizer(model, lambda name: read(stored[name], weights), schemes or QuantPlan())
    with new_directory(target, force=force) as out:
        write_model(
            out, model, to or dialect_of(directory), quantizer.get,
            dtype=dtype or weights.main_dtype, max_shard_bytes=max_shard_bytes, progress=progress,
        )  # fmt: skip
        if processor:
            save_processor(processor, out)
        losses = sorted(quantizer.losses, key=lambda loss: -loss.error)
        if losses:
            error = "norm of the difference of the weights, as a share of their norm; worst layers first"
            write_json(out / "quantization.json", {"error": error, "layers": [asdict(loss) for loss in losses]})
    return losses


@dataclass(frozen=True, kw_only=True)
class QuantizationLoss:
    """The difference that quantizing made to a layer."""

    layer: str
    scheme: str
    error: float
    """Norm of the difference of the weights, as a share of their norm."""


class Quantizer:
    """Replaces layers of an empty model by quantized ones, and computes their tensors from those of the original model.

    Args:
        read: returns a tensor of the original model by its name.

    Raises:
        InputError: if a layer does not fit its scheme.
    """

    def __init__(self, model: nn.Module, read: Callable[[str], torch.Tensor], schemes: QuantPlan) -> None:
        def scheme_of(path: str, layer: nn.Linear) -> QuantConfig | None:
            scheme = schemes.for_layer(path)
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
        """Return a parameter or buffer of the model. The last quantized layer is kept: its tensors are read in a row."""
        path, _, leaf = name.rpartition(".")
        if path not in self._paths or leaf == "bias":
            return self._read(name)
        if self._last[0] != path:
            self._last = (path, self._quantized(path))
        return self._last[1][leaf]

    def _quantized(self, path: str) -> dict[str, torch.Tensor]:
        matrix, scheme = self._read(f"{path}.weight"), self._layers[path].config
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
        self.losses.append(QuantizationLoss(layer=path, scheme=scheme.name, error=(lost / norm) ** 0.5 if norm else 0.0))
        return {"weight": weight, "scale": scale, **({} if zero is None else {"zero": zero})}


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
        InputError: as convert, and if llama.cpp does not compute such a model or GGUF cannot describe its tokenizer.
    """
    directory = resolve(source)
    model = empty_model(load_config(directory))
    config = model.config
    weights, entries = open_weights(directory, model)
    processor = load_processor(directory)
    template = template_of(config.template)
    end = processor.tokenizer.id(template.end)
    eos = end if end in config.eos_token_ids else config.eos_token_ids[0]
    vocabulary = gguf_vocabulary(processor.tokenizer, eos=eos, pad=config.pad_token_id)
    stored = {entry.ours: entry for entry in entries}
    kind = STORAGE[storage] if storage else STORAGE.get(str(weights.main_dtype).removeprefix("torch."), "F32")

    def get(name: str) -> torch.Tensor:
        return read(stored[name], weights)

    with new_directory(target, force=force, mark=LANGUAGE_GGUF) as out:
        chat_template = jinja(template, config.system_message)
        wider = write_language(
            out / LANGUAGE_GGUF, model, get, vocabulary, chat_template=chat_template, storage=kind, progress=progress
        )
        return wider + write_vision(out / VISION_GGUF, model, get, storage=kind, progress=progress)
