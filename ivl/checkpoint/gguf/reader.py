"""Language models from GGUF files: LLaMA-shaped, Qwen2, Qwen3 and InternLM2, dequantized, with their vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ivl.checkpoint.config_table import DECODER_KEYS, FAMILIES, HEADS, ROTARY_BASE, WIDTH
from ivl.checkpoint.gguf.tokenizer import NORMAL, GgufVocabulary
from ivl.checkpoint.keymaps import DECODER, TensorEntry, build_entries, names_in
from ivl.checkpoint.sections import FLAG, REQUIRED, TEXT, Section, Values
from ivl.config import DecoderConfig
from ivl.errors import InputError, short
from ivl.model.decoder import Decoder
from ivl.utils.files import regular

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

ARCHITECTURES: dict[str, str] = {family: family for family in FAMILIES} | {"internlm3": "llama"}
"""The architecture of a file by family; llama.cpp takes InternLM3 for LLaMA."""
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
_KINDS = {key.field: key.kind for key in DECODER_KEYS} | {"rope_theta": ROTARY_BASE}
NAMES = names_in(DECODER, "gguf")
MAX_VALUES = 5_000_000
"""Values of a header that are read. The package takes 100 bytes for each; vocabularies of 256,000 tokens have half as many."""


class GgufModel:
    """The language model of one GGUF file: configuration, vocabulary, and tensors under their own names.

    Raises:
        InputError: if the file is damaged, of another architecture, or asks for what the decoder does not compute.
    """

    def __init__(self, path: Path) -> None:
        self.directory = path
        fields, tensors = _opened(path)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}
        families = Values(str, choices=tuple(family for family in FAMILIES if ARCHITECTURES[family] == family))
        self.architecture = Section(fields, str(path)).read("general.architecture", families)
        self._own = _below(fields, f"{self.architecture}.", path)
        self._words = _below(fields, "tokenizer.ggml.", path)
        self.config = self._config()

    def _config(self) -> DecoderConfig:
        own = self._own
        scaling = own.read("rope.scaling.type", TEXT, "none")
        if scaling != "none" or "rope_freqs.weight" in self.shapes:
            raise InputError(f"{own.place}: rotary scaling {short(scaling)} is not supported; use the safetensors model")
        if own.read("expert_count", Values(int, 0), 0):
            raise InputError(f"{own.place}: a mixture of experts is not supported")
        if len(self.shapes.get("token_embd.weight", ())) != 2:
            raise InputError(f"{own.place}: has no matrix token_embd.weight")
        num_heads = own.read("attention.head_count", HEADS)
        head_dim = own.read("embedding_length", WIDTH) // num_heads
        defaults = {"num_kv_heads": num_heads, "head_dim": head_dim, "rope_theta": 10000.0}
        values = {field: own.read(key, _KINDS[field], defaults.get(field, REQUIRED)) for field, key in DECODER_FIELDS.items()}
        if (rotated := own.read("rope.dimension_count", Values(int), values["head_dim"])) != values["head_dim"]:
            raise InputError(
                f"{own.place}: rotates {rotated} of {values['head_dim']} numbers per head; only whole heads are supported"
            )
        # The file has a float32; its shortest decimal is the number that was meant.
        values["norm_eps"] = float(np.float32(values["norm_eps"]).astype(str))
        try:
            return DecoderConfig(
                family=self.architecture,
                vocab_size=self.shapes["token_embd.weight"][0],
                qkv_bias="blk.0.attn_q.bias" in self.shapes,
                qk_norm="blk.0.attn_q_norm.weight" in self.shapes,
                **values,
            )
        except ValueError as error:
            raise InputError(f"{own.place}: {error}") from None

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

    def place(self, name: str) -> str:
        """Return the file and the name of a tensor, for messages."""
        return f"{self.directory}: tensor {name!r}"

    def key_map(self, decoder: Decoder) -> list[TensorEntry]:
        """Entries of the decoder; without an output matrix the head is the embedding matrix (tied models)."""
        names = NAMES if "output.weight" in self.shapes else {**NAMES, "head": NAMES["embeddings"]}
        return build_entries(decoder, names, "", "decoder.")

    def vocabulary(self) -> GgufVocabulary:
        """The parts of the tokenizer, whose lists are checked to have the same length."""
        words = self._words
        if not (tokens := words.items("tokens", TEXT, [])):
            raise InputError(f"{words.place}: carries no vocabulary (tokenizer.ggml.tokens)")
        count, pieces = len(tokens), words.values.get("model") == "llama"
        types = words.items("token_type", Values(int, 0, 1 << 16), [NORMAL] * count)
        scores = words.items("scores", Values(float), [])
        if len(types) != count or len(scores) not in (0, count):
            raise InputError(f"{words.place}: {count} tokens but {len(types)} types and {len(scores)} scores")
        ids = {f"{name}_token_id": words.read(f"{name}_token_id", Values(int, 0), None) for name in _ENDS}
        return GgufVocabulary(
            model=words.read("model", TEXT, ""),
            pre=words.read("pre", TEXT, "default"),
            tokens=tokens,
            token_type=types,
            scores=scores,
            merges=words.items("merges", TEXT, []),
            add_bos_token=words.read("add_bos_token", FLAG, pieces),
            add_space_prefix=words.read("add_space_prefix", FLAG, pieces),
            **{key: i if i is not None and i < count else None for key, i in ids.items()},  # -1 as a uint32 means none
        )


_ENDS = ("bos", "eos", "padding", "unknown")


def _below(fields: dict[str, Any], prefix: str, path: Path) -> Section:
    """The fields whose key starts with a prefix, without it."""
    values = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    return Section(values, f"{path}: {prefix.removesuffix('.')}")


def _opened(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
    """Read the header of a file, which is untrusted: all that it says is checked to lie in the file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(f"{path}: reading GGUF files needs the gguf package: pip install 'ivl[gguf]'") from None

    class CheckedReader(GGUFReader):
        count = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            # The package takes what lies beyond the end for empty, and reads on through a list of any length that is claimed.
            kind = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            if offset + int(count) * kind.itemsize > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, before its contents do")
            self.count += 1
            if self.count > MAX_VALUES:
                raise ValueError(f"its header has more than {MAX_VALUES:,} values")
            return np.ndarray(int(count), kind, self.data, offset)  # faster than slices of a memmap, which there are many of

    try:
        regular(path)
        reader = CheckedReader(path)
        if reader.byte_order != "I":
            raise ValueError("its byte order is not this machine's")
        return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors
    except InputError:
        raise
    except Exception as error:  # the package raises whatever indexing and converting raise
        raise InputError(f"{path}: not a readable GGUF file: {str(error)[:200]}; fetch it again") from None
