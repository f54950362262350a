"""Key maps: which checkpoint tensors make up each of our parameters, in every dialect.

Our modules fuse query/key/value and gate/up into one matrix (`Linear.parts`); checkpoints store them apart, or, InternLM2,
interleaved by key/value group. A TensorEntry joins on reading and splits on writing, and one is the inverse of the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from ivl.checkpoint.config_table import Dialect
from ivl.model.decoder import Decoder
from ivl.model.linear import Linear
from ivl.model.vit import VisionTransformer
from ivl.model.vlm import VLM

Form = Literal["same", "table", "words", "signed", "zeros"]
Names = dict[str, str]
"""Our names of modules and parameters, and a checkpoint's; names of tensors that ours joins have spaces between them."""
Table = dict[str, tuple[str, str, str]]
"""Our names, and those in internvl_chat, in transformers and in GGUF files."""

IGNORED = re.compile(r".*(rotary_emb\.inv_freq|\.weight_shape)|.*\.(original_module|modules_to_save)\..*")
"""Stored by some libraries though they follow from the configuration, or PEFT keeps them beside the copies that trained."""


@dataclass(frozen=True)
class TensorEntry:
    """One of our parameters and the checkpoint tensors it is made of."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    """Rows of each tensor, when several lie one after another in ours."""
    groups: tuple[int, int, int] | None = None
    """InternLM2 wqkv: key/value groups, query heads per group, head size. A group's rows are its queries, key, value."""
    form: Form = "same"
    """A table is stored with a dimension of 1 in front. The others are how the integers of a quantized weight are stored: our
    bytes as int32 words, as int8 less 128, or, for zero points, 8 rows of 4 bits to an int32 word, the first row lowest."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Checkpoint tensors to our parameter."""
        if self.form != "same":
            counts = self.rows or [len(tensor) for tensor in tensors]
            tensors = [_from_form(tensor, self.form, count) for tensor, count in zip(tensors, counts, strict=True)]
        if self.groups is not None:
            num_groups, num_queries, head_dim = self.groups
            blocks = tensors[0].unflatten(0, (num_groups, num_queries + 2, head_dim))
            return torch.cat([part.flatten(0, 2) for part in blocks.split((num_queries, 1, 1), dim=1)])
        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Our parameter to checkpoint tensors."""
        tensors = ours.split(self.rows) if self.rows else (ours,)
        if self.groups is not None:
            num_groups, num_queries, head_dim = self.groups
            rows = [num_groups * heads * head_dim for heads in (num_queries, 1, 1)]
            parts = [part.unflatten(0, (num_groups, -1, head_dim)) for part in ours.split(rows)]
            tensors = (torch.cat(parts, dim=1).flatten(0, 2),)
        return tensors if self.form == "same" else tuple(_to_form(tensor, self.form) for tensor in tensors)

    def runs(self, count: int) -> list[tuple[str, int, int]]:
        """Where our rows lie: name of the tensor, first row in it, and how many follow one another, in the order of ours.

        Args:
            count: rows of our parameter. Rows of integers that are stored in another form are not found so.
        """
        if self.groups is None:
            return [(name, 0, rows) for name, rows in zip(self.theirs, self.rows or (count,), strict=True)]
        num_groups, num_queries, head_dim = self.groups
        parts = ((0, num_queries), (num_queries, 1), (num_queries + 1, 1))  # queries, key and value of a group, in heads
        size, (name,) = (num_queries + 2) * head_dim, self.theirs
        return [(name, group * size + at * head_dim, heads * head_dim) for at, heads in parts for group in range(num_groups)]

    def shapes(self, ours: Iterable[int]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the checkpoint tensors, from the shape of our parameter."""
        shape = tuple(ours)
        if self.form == "table":
            return ((1, *shape),)
        if self.form == "words":
            shape = (shape[0], shape[1] // 4)
        shapes = tuple((rows, *shape[1:]) for rows in self.rows) if self.rows else (shape,)
        return tuple((-(-rows // 8), *rest) for rows, *rest in shapes) if self.form == "zeros" else shapes


def _to_form(ours: torch.Tensor, form: Form) -> torch.Tensor:
    if form == "table":
        return ours.unsqueeze(0)
    if form == "words":
        return ours.contiguous().view(torch.int32)
    if form == "signed":
        return (ours ^ 128).view(torch.int8)
    padded = torch.nn.functional.pad(ours, (0, 0, 0, -len(ours) % 8)).unflatten(0, (-1, 4, 2))
    octets = (padded[:, :, 0] | padded[:, :, 1] << 4).transpose(1, 2)
    return octets.reshape(-1).view(torch.int32).view(octets.shape[:2])


def _from_form(theirs: torch.Tensor, form: Form, rows: int) -> torch.Tensor:
    if form == "table":
        return theirs[0]
    if form == "words":
        return theirs.contiguous().view(torch.uint8)
    if form == "signed":
        return theirs.view(torch.uint8) ^ 128
    octets = theirs.reshape(-1).view(torch.uint8).view(*theirs.shape, 4).transpose(1, 2)
    return torch.stack([octets & 15, octets >> 4], dim=2).flatten(0, 2)[:rows]


VISION: Table = {
    "embeddings.class_token": ("embeddings.class_embedding", "embeddings.cls_token", "class_embd"),
    "embeddings.positions": ("embeddings.position_embedding", "embeddings.position_embeddings", "position_embd.weight"),
    "embeddings.patch": ("embeddings.patch_embedding", "embeddings.patch_embeddings.projection", "patch_embd"),
    "layers": ("encoder.layers", "encoder.layer", "blk"),
    "attention.qkv": ("attn.qkv", "attention.q_proj attention.k_proj attention.v_proj", "attn_q attn_k attn_v"),
    "attention.q_norm": ("attn.q_norm", "attention.q_norm", "attn_q_norm"),
    "attention.k_norm": ("attn.k_norm", "attention.k_norm", "attn_k_norm"),
    "attention.out": ("attn.proj", "attention.projection_layer", "attn_out"),
    "norm1": ("norm1", "layernorm_before", "ln1"),
    "norm2": ("norm2", "layernorm_after", "ln2"),
    "scale1": ("ls1", "lambda_1", "ls1.weight"),
    "scale2": ("ls2", "lambda_2", "ls2.weight"),
    "fc1": ("mlp.fc1", "mlp.fc1", "ffn_up"),
    "fc2": ("mlp.fc2", "mlp.fc2", "ffn_down"),
}
PROJECTOR: Table = {"norm": ("0", "layer_norm", "0"), "fc1": ("1", "linear_1", "1"), "fc2": ("3", "linear_2", "3")}
DECODER: Table = {
    "embeddings": ("tok_embeddings", "embed_tokens", "token_embd"),
    "norm": ("norm", "norm", "output_norm"),
    "head": ("output", "lm_head", "output"),
    "layers": ("layers", "layers", "blk"),
    "qkv": ("attention.wqkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn_q attn_k attn_v"),
    "q_norm": ("attention.q_norm", "self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("attention.k_norm", "self_attn.k_norm", "attn_k_norm"),
    "out": ("attention.wo", "self_attn.o_proj", "attn_output"),
    "gate_up": ("feed_forward.w1 feed_forward.w3", "mlp.gate_proj mlp.up_proj", "ffn_gate ffn_up"),
    "down": ("feed_forward.w2", "mlp.down_proj", "ffn_down"),
    "norm1": ("attention_norm", "input_layernorm", "attn_norm"),
    "norm2": ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
}
"""The first column has the names of InternLM2 (which norms no heads), the second those that all other families share."""
_PREFIXES: dict[Dialect, tuple[str, str, str, str]] = {
    "internvl_chat": ("vision_model.", "mlp1.", "language_model.model.", "language_model."),
    "transformers": ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", ""),
}
"""What leads the names of the ViT, the projector, the decoder, and its head."""


def vision_map(vision: VisionTransformer, dialect: Dialect, prefix: str = "") -> list[TensorEntry]:
    """Entries of InternViT. `prefix` leads the checkpoint's names; for a ViT alone it is empty."""
    entries = build_entries(vision, names_in(VISION, dialect), prefix, "vision.")
    return [replace(e, form="table") if e.ours == "vision.embeddings.positions" else e for e in entries]


def decoder_map(decoder: Decoder, *, internlm2: bool, body: str = "model.", head: str = "") -> list[TensorEntry]:
    """Entries of the language model, with InternLM2's names and wqkv or with the names that all other families share.

    `body` leads the names of embeddings, layers and norm, `head` that of the output head; the defaults are those of a
    checkpoint of the language model alone.
    """
    config = decoder.config
    groups = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim) if internlm2 else None
    names = names_in(DECODER, "internvl_chat" if internlm2 else "transformers")
    entries = {entry.ours: entry for entry in build_entries(decoder, names, body, "decoder.", groups)}
    entries["decoder.head.weight"] = replace(entries["decoder.head.weight"], theirs=(f"{head}{names['head']}.weight",))
    return list(entries.values())


def key_map(model: VLM, dialect: Dialect) -> list[TensorEntry]:
    """Entries of a whole model (on any device, meta included), in the order of its parameters."""
    internlm2 = dialect == "internvl_chat" and model.config.decoder.family == "internlm2"
    vision, projector, body, head = _PREFIXES[dialect]
    return [
        *vision_map(model.vision, dialect, vision),
        *build_entries(model.projector, names_in(PROJECTOR, dialect), projector, "projector."),
        *decoder_map(model.decoder, internlm2=internlm2, body=body, head=head),
    ]


_OLDER = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def current_name(name: str) -> str:
    """Translate a name of the transformers dialect's older, unprefixed layout; current names stay."""
    for old, new in _OLDER:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


_WRAPPER = re.compile(
    r"(?<![^.])(module|_forward_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|base_layer"
    r"|modules_to_save\.[^.]+)\."
)
"""What DDP, DeepSpeed, torch.compile, FSDP, checkpointing and PEFT write into names of tensors."""
_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.[^.]+(?=\.(?:weight|bias)$)|(\.lora_embedding_[AB])\.[^.]+$")
_ALONE = ("", "language_model.", "language_model.model.", "vision_model.", "vision_tower.")


def known_name(name: str, modules: Collection[str], *, alone: bool = False) -> str:
    """Translate a tensor's name that other programs wrapped into that of one of the known modules' tensors.

    Low-rank matrices become `MODULE.lora_A.weight` and the like. A name of no known module comes back without wrappers.

    Args:
        modules: paths of the modules that are known.
        alone: whether a name may be that of a language model or a ViT alone.
    """
    plain = _ADAPTER_NAME.sub(r"\1\2", _WRAPPER.sub("", name))
    for spelling in (plain, plain.removeprefix("model.")):
        for lead in _ALONE if alone else ("",):
            for candidate in (lead + spelling, current_name(lead + spelling)):
                if candidate.partition(".lora_")[0] in modules or candidate.rpartition(".")[0] in modules:
                    return candidate
    return plain


def foreign_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names that some dialect uses, by a part or by what leads them, but none of the known names."""
    known = list(known)
    columns = [names_in(table, dialect).values() for table in (VISION, DECODER) for dialect in _PREFIXES]
    words = {word for column in columns for spelled in column for word in spelled.split()}
    words |= {prefix.split(".")[-2] for prefixes in _PREFIXES.values() for prefix in prefixes[:2]}
    used = "".join(f".{name}." for name in known)
    foreign = [f".{word}." for word in words if f".{word}." not in used]
    leads = {"lm_head.", *(prefix for prefixes in _PREFIXES.values() for prefix in prefixes[:3])}
    strange = tuple(lead for lead in leads if not any(name.startswith(lead) for name in known))
    return [name for name in names if name.startswith(strange) or any(word in f".{name}." for word in foreign)]


def names_in(table: Table, layout: Dialect | Literal["gguf"]) -> Names:
    """Return one column of a table."""
    column = ("internvl_chat", "transformers", "gguf").index(layout)
    return {ours: theirs[column] for ours, theirs in table.items()}


def build_entries(
    module: nn.Module, names: Names, prefix: str, ours: str, groups: tuple[int, int, int] | None = None
) -> list[TensorEntry]:
    """Make one entry per parameter of the module; a parameter that no name covers is a KeyError, not a silent gap."""
    entries = []
    for path, _ in module.named_parameters():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
        lead, stem = (f"{names['layers']}.{match[1]}.", match[2]) if match else ("", path)
        leaf = ""
        if stem not in names:  # a parameter of a named module, not a named parameter
            stem, leaf = stem[: stem.rindex(".")], stem[stem.rindex(".") :]
        theirs = tuple(f"{prefix}{lead}{name}{leaf}" for name in names[stem].split())
        rows: tuple[int, ...] = ()
        if len(theirs) > 1:
            owner = module.get_submodule(path.rpartition(".")[0])
            assert isinstance(owner, Linear)
            rows = tuple(count for _, count in owner.parts)
        entries.append(TensorEntry(ours + path, theirs, rows, groups if groups and stem == "qkv" else None))
    return entries
