"""A model as the two files llama.cpp reads: the language model with its tokenizer, and the vision part (mmproj).

Names and keys are those of llama.cpp's converter and of its clip.cpp (version of November 2026, ggml 0.25).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ivl.checkpoint.gguf import INTERLEAVED_ROTARY, NAMES, GgufVocabulary
from ivl.checkpoint.keymaps import Entry, Names, build_entries
from ivl.checkpoint.weights import ByteProgress
from ivl.config import DecoderConfig, ModelConfig
from ivl.errors import InputError
from ivl.model.vlm import PIXEL_MEAN, PIXEL_STD, VLM

if TYPE_CHECKING:
    from gguf import GGUFWriter

Storage = Literal["F32", "F16", "BF16", "Q8_0"]
"""Of the matrices; vectors are always float32."""
STORAGE: dict[str, Storage] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
Read = Callable[[str], torch.Tensor]
"""One of our parameters by its name in VLM."""

_UNUSED = 5
_Q8_BLOCK = 32
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_VISION: Names = {
    "embeddings.class_token": ("class_embd",),
    "embeddings.positions": ("position_embd.weight",),
    "embeddings.patch": ("patch_embd",),
    "layers": ("blk",),
    "attention.qkv": ("attn_q", "attn_k", "attn_v"),
    "attention.q_norm": ("attn_q_norm",),
    "attention.k_norm": ("attn_k_norm",),
    "attention.out": ("attn_out",),
    "norm1": ("ln1",),
    "norm2": ("ln2",),
    "scale1": ("ls1.weight",),
    "scale2": ("ls2.weight",),
    "fc1": ("ffn_up",),
    "fc2": ("ffn_down",),
}
_PROJECTOR: Names = {"norm": ("0",), "fc1": ("1",), "fc2": ("3",)}
_RMS_SHAPE = (3200, 45)
"""clip.cpp takes RMSNorm for a ViT of this width and depth (InternViT-6B), and LayerNorm for every other."""


def write_language(
    path: Path,
    model: VLM,
    read: Read,
    vocabulary: GgufVocabulary,
    *,
    chat_template: str,
    storage: Storage,
    progress: ByteProgress | None = None,
) -> int:
    """The decoder with its tokenizer. Dynamic NTK has no form in GGUF: beyond max_positions llama.cpp does not rescale.

    Args:
        model: on any device, meta included; numbers come from read, tensor by tensor.

    Returns:
        How many matrices were stored wider (F16) because their rows are not made of Q8_0's blocks of 32.

    Raises:
        InputError: if llama.cpp does not compute such a decoder, or the tokenizer has more tokens than the model.
    """
    config = model.config.decoder
    if config.family != "llama" and config.num_heads * config.head_dim != config.width:
        raise InputError(
            f"llama.cpp wants {config.family} heads to fill the width: {config.num_heads} heads of {config.head_dim} "
            f"are not {config.width}"
        )
    writer = _writer(path, config.family)
    for key, value in _decoder_fields(config).items():
        _add(writer, f"{config.family}.{key}", value)
    _add_vocabulary(writer, vocabulary, config.vocab_size, path)
    writer.add_chat_template(chat_template)

    def arrange(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if config.family in INTERLEAVED_ROTARY and (".attn_q." in name or ".attn_k." in name):
            return tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        return tensor

    entries = build_entries(model.decoder, NAMES, "", "decoder.")
    return _write(writer, _tensors(entries, model, storage), read, arrange, progress)


def write_vision(path: Path, model: VLM, read: Read, *, storage: Storage, progress: ByteProgress | None = None) -> int:
    """InternViT and the projector, as the file that llama.cpp takes as --mmproj. Layers after the selected one are left out.

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
    for key, value in _vision_fields(config, depth).items():
        _add(writer, f"clip.{key}", value)
    left_out = tuple(f"vision.layers.{n}." for n in range(depth, vision.num_layers))
    entries = [
        *(e for e in build_entries(model.vision, _VISION, "v.", "vision.") if not e.ours.startswith(left_out)),
        *build_entries(model.projector, _PROJECTOR, "mm.model.mlp.", "projector."),
    ]

    def arrange(name: str, tensor: torch.Tensor) -> torch.Tensor:
        # clip.cpp puts the class token behind the patches and adds the table row by row, so its row comes last.
        return tensor.roll(-1, dims=0) if name == "v.position_embd.weight" else tensor

    return _write(writer, _tensors(entries, model, storage), read, arrange, progress)


@dataclass(frozen=True)
class _Tensor:
    name: str
    entry: Entry
    part: int
    shape: tuple[int, ...]
    storage: Storage
    wider: bool

    @property
    def num_bytes(self) -> int:
        count = math.prod(self.shape)
        return count // _Q8_BLOCK * (_Q8_BLOCK + 2) if self.storage == "Q8_0" else count * _FLOATS[self.storage].itemsize


def _tensors(entries: Sequence[Entry], model: VLM, storage: Storage) -> list[_Tensor]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = []
    for entry in entries:
        for part, (name, full) in enumerate(zip(entry.theirs, entry.shapes(shapes[entry.ours]), strict=True)):
            shape = full[1:] if name == "v.position_embd.weight" else full[2:] if name == "v.class_embd" else full
            own: Storage = storage
            if len(shape) == 1 or name == "v.position_embd.weight":
                own = "F32"
            elif name == "v.patch_embd.weight":  # a convolution, which llama.cpp has in these two types
                own = "F16" if storage == "F16" else "F32"
            wider = own == "Q8_0" and shape[-1] % _Q8_BLOCK != 0
            found.append(_Tensor(name, entry, part, shape, "F16" if wider else own, wider))
    return found


def _write(
    writer: GGUFWriter,
    tensors: Sequence[_Tensor],
    read: Read,
    arrange: Callable[[str, torch.Tensor], torch.Tensor],
    progress: ByteProgress | None,
) -> int:
    """The whole file, one of our parameters in memory at a time."""
    import gguf

    total, done = sum(tensor.num_bytes for tensor in tensors), 0
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.storage]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        parts: tuple[torch.Tensor, ...] = ()
        for tensor in tensors:
            if tensor.part == 0:
                parts = tensor.entry.split(read(tensor.entry.ours).detach())
            rows = arrange(tensor.name, parts[tensor.part].reshape(tensor.shape))
            writer.write_tensor_data(_stored(rows, tensor.storage, f"{writer.path}: tensor {tensor.name}"))
            done += tensor.num_bytes
            if progress:
                progress(done, total)
    except OSError as error:
        raise InputError(f"{writer.path}: cannot be written: {error}") from error
    finally:
        writer.close()
    return sum(tensor.wider for tensor in tensors)


def _stored(tensor: torch.Tensor, storage: Storage, what: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor."""
    from gguf import GGMLQuantizationType, quantize

    if storage == "Q8_0":
        return quantize(tensor.float().contiguous().numpy(), GGMLQuantizationType.Q8_0)
    stored = tensor.to(_FLOATS[storage]).contiguous()
    if storage == "F16" and not stored.isfinite().all():
        raise InputError(f"{what} holds {tensor.abs().max():g}, beyond what float16 can say; take bfloat16")
    return stored.flatten().view(torch.uint8).numpy()


def _writer(path: Path, architecture: str) -> GGUFWriter:
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise InputError(f"{path}: writing GGUF files needs the gguf package: pip install 'ivl[gguf]'") from None
    return GGUFWriter(path, architecture)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A field with the type that llama.cpp asks for."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _decoder_fields(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
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


def _add_vocabulary(writer: GGUFWriter, vocabulary: GgufVocabulary, size: int, path: Path) -> None:
    """The tokenizer; rows of the model that no token names are filled up as unused."""
    if (spare := size - len(vocabulary.tokens)) < 0:
        raise InputError(f"{path}: the tokenizer has {len(vocabulary.tokens)} tokens but the model {size} rows")
    padding = [f"[PAD{i}]" for i in range(len(vocabulary.tokens), size)]
    fields: dict[str, Any] = {
        "model": vocabulary.kind,
        "pre": vocabulary.pre,
        "tokens": vocabulary.tokens + padding,
        "token_type": vocabulary.types + [_UNUSED] * spare,
        "scores": [*vocabulary.scores, *[0.0] * spare] if vocabulary.scores else None,
        "merges": vocabulary.merges or None,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "eot_token_id": vocabulary.eos,
        "padding_token_id": vocabulary.pad,
        "unknown_token_id": vocabulary.unknown,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": False,
        "add_space_prefix": vocabulary.add_space_prefix,
    }
    for key, value in fields.items():
        if value is not None:
            _add(writer, f"tokenizer.ggml.{key}", value)
