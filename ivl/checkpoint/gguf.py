"""Language models from GGUF files: LLaMA-shaped, Qwen2 and InternLM2, dequantised, with the vocabulary they carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ivl.checkpoint.gguf_file import GgufFile
from ivl.checkpoint.keymaps import Entry, Names, build_entries
from ivl.config import DecoderConfig, Family
from ivl.errors import InputError
from ivl.model.decoder import Decoder

_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "internlm2": "internlm2"}
INTERLEAVED_ROTARY = ("llama", "internlm2")
"""Architectures whose files rotate neighbouring rows of a head; ours, like the originals, rotates its two halves."""
_EXACT = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES: Names = {
    "embeddings": ("token_embd",),
    "norm": ("output_norm",),
    "head": ("output",),
    "layers": ("blk",),
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
    "norm1": ("attn_norm",),
    "norm2": ("ffn_norm",),
}


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """The tokenizer as a GGUF file describes it: plain data, made into a tokenizer by ivl.processing."""

    kind: str
    """gpt2 (byte-level BPE with merges) or llama (SentencePiece pieces with scores)."""
    pre: str
    """Name of the rule that splits text before BPE, such as qwen2 or smollm."""
    tokens: list[str]
    types: list[int]
    """1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte."""
    scores: list[float]
    merges: list[str]
    bos: int | None
    eos: int | None
    pad: int | None
    unknown: int | None
    add_bos: bool
    add_space_prefix: bool


class Gguf:
    """One GGUF file: configuration, vocabulary, and tensors under their own names, dequantised when asked for.

    Raises:
        InputError: if the file is damaged, of another architecture, or uses what the decoder does not compute.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGML_QUANT_SIZES
        except ImportError:
            raise InputError(f"{path}: reading GGUF files needs the gguf package: pip install 'ivl[gguf]'") from None
        self.directory = self.path = path
        self._file = GgufFile(path)
        self.architecture = str(self._file.fields.get("general.architecture"))
        if self.architecture not in _FAMILIES:
            raise InputError(f"{path}: architecture {self.architecture!r}; supported are {', '.join(_FAMILIES)}")
        self.shapes = {name: tensor.shape for name, tensor in self._file.tensors.items()}
        self._kinds: dict[str, Any] = {}
        sizes = {kind.value: (kind, *size) for kind, size in GGML_QUANT_SIZES.items()}
        for name, tensor in self._file.tensors.items():
            if tensor.kind not in sizes or not tensor.shape:
                raise InputError(f"{path}: tensor {name} has shape {tensor.shape} and unknown storage type {tensor.kind}")
            kind, block_size, block_bytes = sizes[tensor.kind]
            if tensor.shape[-1] % block_size:
                raise InputError(f"{path}: tensor {name} of {tensor.shape} is not made of {kind.name} blocks of {block_size}")
            self._file.slice(name, block_size, block_bytes)
            self._kinds[name] = kind
        self.config = self._config()

    def _field(self, key: str, default: Any = None) -> Any:
        return self._file.fields.get(key, default)

    def _number(self, key: str, default: float | None = None) -> Any:
        value = self._field(f"{self.architecture}.{key}", default)
        if not isinstance(value, (int, float)):
            raise InputError(f"{self.path}: {self.architecture}.{key} should be one number, found {value!r}")
        return value

    def _config(self) -> DecoderConfig:
        scaling = self._field(f"{self.architecture}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.shapes:
            raise InputError(
                f"{self.path}: rotary scaling {scaling!r} is not supported in GGUF files; use the safetensors model"
            )
        if self._number("expert_count", 0):
            raise InputError(f"{self.path}: a mixture of experts, which is not supported")
        if "token_embd.weight" not in self.shapes:
            raise InputError(f"{self.path}: no tensor token_embd.weight")
        width, num_heads = self._number("embedding_length"), self._number("attention.head_count")
        head_dim = self._number("attention.key_length", width // num_heads)
        if (rotated := self._number("rope.dimension_count", head_dim)) != head_dim:
            raise InputError(f"{self.path}: rotates {rotated} of {head_dim} numbers per head; only whole heads are supported")
        return DecoderConfig(
            family=_FAMILIES[self.architecture],
            vocab_size=self.shapes["token_embd.weight"][0],
            width=width,
            num_layers=self._number("block_count"),
            mlp_width=self._number("feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=self._number("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rope_theta=self._number("rope.freq_base", 10000.0),
            norm_eps=float(np.float32(self._number("attention.layer_norm_rms_epsilon")).astype(str)),
            qkv_bias="blk.0.attn_q.bias" in self.shapes,
            max_positions=self._number("context_length"),
        )

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype that holds the matrices exactly: their own, or float32 when they are quantised or differ."""
        kinds = {self._kinds[name].name for name, shape in self.shapes.items() if len(shape) > 1}
        return _EXACT.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    def get(self, name: str) -> torch.Tensor:
        """One tensor, float32 when it was quantised. Query and key rows come in our rotary order."""
        from gguf import GGML_QUANT_SIZES, dequantize

        kind, shape = self._kinds[name], self.shapes[name]
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        stored = np.frombuffer(self._file.slice(name, block_size, block_bytes), np.uint8)
        if kind.name in _EXACT:
            tensor = torch.frombuffer(bytearray(stored), dtype=_EXACT[kind.name]).view(shape)
        else:
            blocks = stored.reshape(*shape[:-1], shape[-1] // block_size * block_bytes)
            try:
                tensor = torch.from_numpy(dequantize(blocks, kind)).view(shape)
            except NotImplementedError:
                raise InputError(
                    f"{self.path}: tensor {name} is stored as {kind.name}, which the gguf package cannot undo"
                ) from None
        if self.architecture in INTERLEAVED_ROTARY and (".attn_q." in name or ".attn_k." in name):
            half = self.config.head_dim // 2
            tensor = tensor.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        return tensor

    def key_map(self, decoder: Decoder) -> list[Entry]:
        """Entries of the decoder; without an output matrix the head is the embedding matrix (tied models)."""
        names = NAMES if "output.weight" in self.shapes else {**NAMES, "head": NAMES["embeddings"]}
        return build_entries(decoder, names, "", "")

    def vocabulary(self) -> GgufVocabulary:
        """The tokenizer's parts.

        Raises:
            InputError: if the file carries no vocabulary, or lists of different lengths.
        """
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        if not tokens:
            raise InputError(f"{self.path}: carries no vocabulary (tokenizer.ggml.tokens)")
        types = self._field("tokenizer.ggml.token_type", [1] * len(tokens))
        scores = self._field("tokenizer.ggml.scores", [])
        if len(types) != len(tokens) or (scores and len(scores) != len(tokens)):
            raise InputError(f"{self.path}: {len(tokens)} tokens but {len(types)} types and {len(scores)} scores")
        kind = self._field("tokenizer.ggml.model", "")
        return GgufVocabulary(
            kind=kind,
            pre=self._field("tokenizer.ggml.pre", "default"),
            tokens=tokens,
            types=types,
            scores=scores,
            merges=self._field("tokenizer.ggml.merges", []),
            bos=self._field("tokenizer.ggml.bos_token_id"),
            eos=self._field("tokenizer.ggml.eos_token_id"),
            pad=self._field("tokenizer.ggml.padding_token_id"),
            unknown=self._field("tokenizer.ggml.unknown_token_id"),
            add_bos=self._field("tokenizer.ggml.add_bos_token", kind == "llama"),
            add_space_prefix=self._field("tokenizer.ggml.add_space_prefix", kind == "llama"),
        )
