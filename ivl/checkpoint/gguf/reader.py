"""Language models from GGUF files: LLaMA-shaped, Qwen2 and InternLM2, dequantized, with their vocabulary."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ivl.checkpoint.config_table import FAMILIES
from ivl.checkpoint.gguf.tokenizer import NORMAL, GgufVocabulary
from ivl.checkpoint.keymaps import DECODER, TensorEntry, build_entries, names_in
from ivl.config import DecoderConfig
from ivl.errors import InputError
from ivl.model.decoder import Decoder

if TYPE_CHECKING:
    from gguf import GGUFReader

INTERLEAVED_ROTARY = ("llama", "internlm2")
"""Architectures whose files rotate neighboring rows of a head; ours, like the originals, rotates its two halves."""
_EXACT = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DECODER_FIELDS = {
    "num_layers": "block_count",
    "max_positions": "context_length",
    "width": "embedding_length",
    "mlp_width": "feed_forward_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
"""Fields of DecoderConfig and their keys, which follow the architecture's name."""
NAMES = names_in(DECODER, "gguf")


class GgufModel:
    """The language model of one GGUF file: configuration, vocabulary, and tensors under their own names.

    Raises:
        InputError: if the file is damaged, of another architecture, or asks for what the decoder does not compute.
    """

    def __init__(self, path: Path) -> None:
        self.directory = path
        reader = _opened(path)
        self._fields = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}
        self.architecture = str(self._fields.get("general.architecture"))
        if self.architecture not in FAMILIES:
            raise InputError(f"{path}: architecture {self.architecture!r}; supported are {', '.join(FAMILIES)}")
        self.config = self._config()

    def _number(self, key: str, default: float | None = None) -> Any:
        value = self._fields.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, (int, float)):
            raise InputError(f"{self.directory}: {self.architecture}.{key} should be one number, got {value!r}")
        return value

    def _config(self) -> DecoderConfig:
        scaling = self._fields.get(f"{self.architecture}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.shapes:
            raise InputError(
                f"{self.directory}: rotary scaling {scaling!r} is not supported in GGUF files; use the safetensors model"
            )
        if self._number("expert_count", 0):
            raise InputError(f"{self.directory}: a mixture of experts is not supported")
        if len(self.shapes.get("token_embd.weight", ())) != 2:
            raise InputError(f"{self.directory}: has no matrix token_embd.weight")
        width, num_heads = self._number("embedding_length"), self._number("attention.head_count")
        if num_heads < 1:
            raise InputError(f"{self.directory}: has {num_heads} attention heads")
        defaults = {"num_kv_heads": num_heads, "head_dim": width // num_heads, "rope_theta": 10000.0}
        values = {field: self._number(key, defaults.get(field)) for field, key in DECODER_FIELDS.items()}
        if (rotated := self._number("rope.dimension_count", values["head_dim"])) != values["head_dim"]:
            raise InputError(
                f"{self.directory}: rotates {rotated} of {values['head_dim']} numbers per head; only whole heads are supported"
            )
        # The file has a float32; its shortest decimal is the number that was meant.
        values["norm_eps"] = float(np.float32(values["norm_eps"]).astype(str))
        try:
            return DecoderConfig(
                family=self.architecture,  # type: ignore[arg-type]
                vocab_size=self.shapes["token_embd.weight"][0],
                qkv_bias="blk.0.attn_q.bias" in self.shapes,
                **values,
            )
        except ValueError as error:
            raise InputError(f"{self.directory}: {error}") from None

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype that holds the matrices exactly: their own, or float32 when they are quantized or differ."""
        kinds = {self._tensors[name].tensor_type.name for name, shape in self.shapes.items() if len(shape) > 1}
        return _EXACT.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor, as float32 if it is quantized, its query and key rows in our rotary order."""
        from gguf import dequantize

        kind, data = self._tensors[name].tensor_type, np.array(self._tensors[name].data)
        if kind.name in _EXACT:
            tensor = torch.from_numpy(data).view(_EXACT[kind.name]).view(self.shapes[name])
        else:
            try:
                tensor = torch.from_numpy(dequantize(data, kind)).view(self.shapes[name])
            except NotImplementedError:
                raise InputError(
                    f"{self.directory}: tensor {name} is stored as {kind.name}, which the gguf package cannot dequantize"
                ) from None
        if self.architecture in INTERLEAVED_ROTARY and (".attn_q." in name or ".attn_k." in name):
            tensor = tensor.unflatten(0, (-1, self.config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return tensor

    def key_map(self, decoder: Decoder) -> list[TensorEntry]:
        """Entries of the decoder; without an output matrix the head is the embedding matrix (tied models)."""
        names = NAMES if "output.weight" in self.shapes else {**NAMES, "head": NAMES["embeddings"]}
        return build_entries(decoder, names, "", "decoder.")

    def vocabulary(self) -> GgufVocabulary:
        """The parts of the tokenizer, whose lists are checked to have the same length."""
        prefix = "tokenizer.ggml."
        stored = {key.removeprefix(prefix): value for key, value in self._fields.items() if key.startswith(prefix)}
        if not stored.get("tokens"):
            raise InputError(f"{self.directory}: carries no vocabulary ({prefix}tokens)")
        count, pieces = len(stored["tokens"]), stored.get("model") == "llama"
        stored = {"token_type": [NORMAL] * count, "add_bos_token": pieces, "add_space_prefix": pieces, **stored}
        known = {field.name for field in fields(GgufVocabulary)}
        words = GgufVocabulary(**{key: value for key, value in stored.items() if key in known})
        types, scores = len(words.token_type), len(words.scores)
        if types != count or scores not in (0, count):
            raise InputError(f"{self.directory}: {count} tokens but {types} types and {scores} scores")
        return words


def _opened(path: Path) -> GGUFReader:
    """Read the header of a file, which is untrusted: all that it says is checked to lie in the file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(f"{path}: reading GGUF files needs the gguf package: pip install 'ivl[gguf]'") from None

    class CheckedReader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            # The package takes what lies beyond the end for empty, and reads on through a list of any length that is claimed.
            kind = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            if offset + int(count) * kind.itemsize > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, before its contents do")
            return np.ndarray(int(count), kind, self.data, offset)  # faster than slices of a memmap, which there are many of

    try:
        reader = CheckedReader(path)
    except Exception as error:  # the package raises whatever indexing and converting raise
        raise InputError(f"{path}: not a readable GGUF file: {error}; fetch it again") from None
    if reader.byte_order != "I":
        raise InputError(f"{path}: not a readable GGUF file: its byte order is not this machine's")
    return reader
