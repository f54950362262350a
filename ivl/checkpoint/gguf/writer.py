"""A model as the two files llama.cpp reads: the language model with its tokenizer, and the vision part (mmproj).

Names and keys are those of llama.cpp's converter and of its clip.cpp (version of November 2026, ggml 0.25).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ivl.checkpoint.gguf.reader import ARCHITECTURES, DECODER_FIELDS, INTERLEAVED_ROTARY, NAMES
from ivl.checkpoint.gguf.tokenizer import UNUSED, GgufVocabulary
from ivl.checkpoint.keymaps import PROJECTOR, VISION, TensorEntry, build_entries, names_in
from ivl.checkpoint.weights import OnMegabytes
from ivl.config import DecoderConfig, ModelConfig
from ivl.errors import InputError
from ivl.model.vlm import PIXEL_MEAN, PIXEL_STD, VLM

if TYPE_CHECKING:
    from gguf import GGUFWriter

Storage = Literal["F32", "F16", "BF16", "Q8_0"]
"""Of the matrices; vectors are always float32."""
STORAGE: dict[str, Storage] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
ReadParameter = Callable[[str], torch.Tensor]
"""Returns one of our parameters by its name in VLM."""

_Q8_BLOCK = 32
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_RMS_SHAPE = (3200, 45)
"""clip.cpp takes RMSNorm for a ViT of this width and depth (InternViT-6B), and LayerNorm for every other."""


def write_language(
    path: Path,
    model: VLM,
    read: ReadParameter,
    vocabulary: GgufVocabulary,
    *,
    chat_template: str,
    storage: Storage,
    progress: OnMegabytes | None = None,
) -> int:
    """Write the decoder with its tokenizer. GGUF knows no dynamic NTK: beyond max_positions llama.cpp does not rescale.

    Args:
        model: on any device, meta included; numbers come from `read`, tensor by tensor.

    Returns:
        How many matrices were stored wider (F16) because their rows are not made of Q8_0's blocks of 32.

    Raises:
        InputError: if llama.cpp does not compute such a decoder, or the tokenizer has more tokens than the model.
    """
    config = model.config.decoder
    architecture = ARCHITECTURES[config.family]
    if architecture not in ("llama", "qwen3") and config.num_heads * config.head_dim != config.width:
        raise InputError(
            f"llama.cpp wants {config.family} heads to fill the width: {config.num_heads} heads of {config.head_dim} "
            f"are not {config.width}"
        )
    writer = _writer(path, architecture)
    _add(writer, architecture, _decoder_fields(config))
    _add(writer, "tokenizer.ggml", _vocabulary_fields(vocabulary, config.vocab_size, path))
    writer.add_chat_template(chat_template)

    entries = build_entries(model.decoder, NAMES, "", "decoder.")
    return _write(writer, entries, model, storage, read, progress)


def write_vision(path: Path, model: VLM, read: ReadParameter, *, storage: Storage, progress: OnMegabytes | None = None) -> int:
    """Write InternViT and the projector, llama.cpp's `--mmproj` file. Layers after the selected one are left out.

    Returns:
        As write_language.

    Raises:
        InputError: if clip.cpp does not compute such a vision part.
    """
    config = model.config
    vision = config.vision
    if (vision.norm == "rms_norm") != ((vision.width, vision.num_layers) == _RMS_SHAPE):
        raise InputError(
            f"llama.cpp computes RMSNorm for a ViT of width {_RMS_SHAPE[0]} and {_RMS_SHAPE[1]} layers and LayerNorm for every "
            f"other; this one has {vision.norm}, width {vision.width} and {vision.num_layers} layers"
        )
    if config.pixel_shuffle != "v2":
        raise InputError(f"llama.cpp computes pixel shuffle v2 only, this model has {config.pixel_shuffle}")
    depth = config.select_layer % (vision.num_layers + 1)
    if vision.norm == "rms_norm" and depth != vision.num_layers:
        raise InputError(f"llama.cpp computes RMSNorm for {vision.num_layers} layers only, this model selects layer {depth}")
    writer = _writer(path, "clip")
    writer.add_type("mmproj")
    _add(writer, "clip", _vision_fields(config, depth))
    left_out = tuple(f"vision.layers.{n}." for n in range(depth, vision.num_layers))
    entries = [
        *(e for e in build_entries(model.vision, names_in(VISION, "gguf"), "v.", "vision.") if not e.ours.startswith(left_out)),
        *build_entries(model.projector, names_in(PROJECTOR, "gguf"), "mm.model.mlp.", "projector."),
    ]
    return _write(writer, entries, model, storage, read, progress)


def _write(
    writer: GGUFWriter,
    entries: Sequence[TensorEntry],
    model: VLM,
    storage: Storage,
    read: ReadParameter,
    progress: OnMegabytes | None,
) -> int:
    """Write the whole file, one of our parameters in memory at a time; returns how many tensors are wider."""
    import gguf

    parameters = dict(model.named_parameters())
    plan: dict[str, tuple[tuple[int, ...], Storage]] = {}
    for entry in entries:
        shapes = entry.shapes(parameters[entry.ours].shape)
        plan |= {name: _layout(name, shape, storage) for name, shape in zip(entry.theirs, shapes, strict=True)}
    total, done = 0, 0
    for name, (shape, own) in plan.items():
        kind = gguf.GGMLQuantizationType[own]
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        total += size
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            for name, tensor in zip(entry.theirs, entry.split(read(entry.ours).detach()), strict=True):
                shape, own = plan[name]
                rows = _arranged(name, tensor.reshape(shape), model.config.decoder)
                data = _stored(rows, own, f"{writer.path}: tensor {name}")
                writer.write_tensor_data(data)
                done += data.nbytes
            if progress:
                progress(done // 10**6, total // 10**6)
    except OSError as error:
        raise InputError(f"{writer.path}: cannot be written: {error}") from error
    finally:
        writer.close()
    return sum(storage == "Q8_0" and own == "F16" for _, own in plan.values())


def _layout(name: str, shape: tuple[int, ...], storage: Storage) -> tuple[tuple[int, ...], Storage]:
    """The shape and the type that a tensor has in the file."""
    if name == "v.position_embd.weight":
        return shape, "F32"
    if name == "v.class_embd":
        return shape[2:], "F32"
    if name == "v.patch_embd.weight":  # a convolution, which llama.cpp has in these two types
        return shape, "F16" if storage == "F16" else "F32"
    if len(shape) == 1:
        return shape, "F32"
    return shape, "F16" if storage == "Q8_0" and shape[-1] % _Q8_BLOCK else storage


def _arranged(name: str, tensor: torch.Tensor, config: DecoderConfig) -> torch.Tensor:
    """A tensor with its rows in the order of llama.cpp."""
    if name == "v.position_embd.weight":
        # clip.cpp puts the class token behind the patches and adds the table row by row, so its row comes last.
        return tensor.roll(-1, dims=0)
    interleaved = ARCHITECTURES[config.family] in INTERLEAVED_ROTARY
    if interleaved and name.startswith("blk.") and (".attn_q." in name or ".attn_k." in name):
        return tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return tensor


def _stored(tensor: torch.Tensor, storage: Storage, place: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor."""
    from gguf import GGMLQuantizationType, quantize

    if storage == "Q8_0":
        return quantize(tensor.float().contiguous().numpy(), GGMLQuantizationType.Q8_0)
    stored = tensor.to(_FLOATS[storage]).contiguous()
    if storage == "F16" and not stored.isfinite().all():
        raise InputError(f"{place} holds {tensor.abs().max():g}, which float16 cannot express; take bfloat16")
    return stored.flatten().view(torch.uint8).numpy()


def _writer(path: Path, architecture: str) -> GGUFWriter:
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise InputError(f"{path}: writing GGUF files needs the gguf package: pip install 'ivl[gguf]'") from None
    return GGUFWriter(path, architecture)


def _add(writer: GGUFWriter, prefix: str, fields: dict[str, Any]) -> None:
    """Add fields with the types that llama.cpp asks for."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in fields.items():
        adders.get(type(value), writer.add_array)(f"{prefix}.{key}", value)


def _decoder_fields(config: DecoderConfig) -> dict[str, Any]:
    return {
        **{key: getattr(config, field) for field, key in DECODER_FIELDS.items()},
        "vocab_size": config.vocab_size,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }


def _vision_fields(config: ModelConfig, depth: int) -> dict[str, Any]:
    vision, tiling = config.vision, config.tiling
    return {
        "has_vision_encoder": True,
        "projector_type": "internvl",
        "use_gelu": True,
        "vision.image_size": vision.image_size,
        "vision.patch_size": vision.patch_size,
        "vision.embedding_length": vision.width,
        "vision.feed_forward_length": vision.mlp_width,
        "vision.block_count": depth,
        "vision.attention.head_count": vision.num_heads,
        "vision.attention.layer_norm_epsilon": vision.norm_eps,
        "vision.projection_dim": config.decoder.width,
        "vision.projector.scale_factor": 2,
        "vision.image_mean": list(PIXEL_MEAN),
        "vision.image_std": list(PIXEL_STD),
        "vision.preproc_min_tiles": tiling.min_tiles if tiling.dynamic else 1,
        "vision.preproc_max_tiles": tiling.max_tiles if tiling.dynamic else 1,
    }


def _vocabulary_fields(vocabulary: GgufVocabulary, size: int, path: Path) -> dict[str, Any]:
    """The tokenizer; unused tokens fill it up to as many as the model has rows."""
    count = len(vocabulary.tokens)
    if (spare := size - count) < 0:
        raise InputError(f"{path}: the tokenizer has {count} tokens but the model {size} rows")
    filled = replace(
        vocabulary,
        tokens=[*vocabulary.tokens, *(f"[PAD{i}]" for i in range(count, size))],
        token_type=vocabulary.token_type + [UNUSED] * spare,
        scores=vocabulary.scores and [*vocabulary.scores, *[0.0] * spare],
    )
    fields = {**vars(filled), "eot_token_id": vocabulary.eos_token_id, "add_eos_token": False}
    return {key: value for key, value in fields.items() if value is not None and value != []}
