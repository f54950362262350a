"""A model directory composed of the parts of other model directories.

Composing is how progressive scaling works (InternVL2.5, arXiv:2412.05271, section 3.2): a ViT that was trained beside a small
language model moves to a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ivl.checkpoint.config_json import decoder_from, family_of, load_config, open_section, tied, vision_from
from ivl.checkpoint.config_table import Dialect
from ivl.checkpoint.files import read_object, refuse_sources
from ivl.checkpoint.gguf.reader import GgufModel
from ivl.checkpoint.gguf.tokenizer import tokenizer_from_gguf
from ivl.checkpoint.hub import resolve
from ivl.checkpoint.keymaps import TensorEntry, decoder_map, vision_map
from ivl.checkpoint.model_dir import empty_model, open_weights, read, untie, write_model
from ivl.checkpoint.processor_files import save_processor
from ivl.checkpoint.vocabulary import load_tokenizer
from ivl.checkpoint.weights import ByteProgress, StoredWeights, TensorSource, check_entries
from ivl.config import SPECIAL_TOKENS, DecoderConfig, ModelConfig, VisionConfig, published_config
from ivl.errors import InputError
from ivl.model.decoder import Decoder
from ivl.model.projector import Projector
from ivl.model.vit import VisionTransformer
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer, token_text

CHATML = ("<|im_start|>", "<|im_end|>")
NEW_ROW_STD = 0.02
"""Deviation of embedding rows that no checkpoint has: `initializer_range` of the published config.json."""
_DEFAULTS = published_config("1B")
"""Tiling, layer, template and pixel shuffle of parts that are no InternVL and say nothing about them."""
_INTERNVL = ("internvl_chat", "internvl")
_VISION_ALONE: dict[str, Dialect] = {"intern_vit_6b": "internvl_chat", "internvl_vision": "transformers"}

TensorReaders = dict[str, Callable[[], torch.Tensor]]
"""Functions that read our parameters, by name."""


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """A part of a model, and where its tensors come from."""

    place: Path
    dtype: torch.dtype
    tensors: TensorReaders
    whole: ModelConfig = _DEFAULTS
    """Configuration of the InternVL that it is a part of."""


@dataclass(frozen=True, kw_only=True)
class VisionPart(ModelPart):
    """A ViT."""

    vision: VisionConfig


@dataclass(frozen=True, kw_only=True)
class LanguagePart(ModelPart):
    """A language model with its tokenizer."""

    decoder: DecoderConfig
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    pad_id: int | None


def compose(
    vit: str | Path,
    llm: str | Path,
    projector: str | Path | None,
    out: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    dialect: Dialect = "internvl_chat",
    progress: ByteProgress | None = None,
) -> ModelConfig:
    """Write a complete model made of a ViT, a language model and a projector.

    The special tokens that the language model lacks are added to its tokenizer, and the vocabulary becomes exactly that of
    the tokenizer: embedding rows that exist are kept, others are drawn with deviation 0.02; the output rows of added tokens
    are the mean of all rows before them. Weights are streamed, one shard at a time.

    Args:
        vit: an InternViT or an InternVL, directory or hub id.
        llm: a Qwen2.5, InternLM2.5, LLaMA-shaped or InternVL model, directory or hub id; or a GGUF file.
        projector: an InternVL to take it from; None draws a fresh one.
        seed: of every drawn number.
        dtype: of the written weights; None is the narrowest that holds every part unchanged.

    Raises:
        InputError: if a part is unreadable, parts do not fit each other, or out is one of the sources.
    """
    vit_part = _vision_part(resolve(vit))
    llm_part = _language_part(llm)
    tokenizer, added = _extended(llm_part.tokenizer, llm_part.decoder.vocab_size, llm)
    config = _composed_config(vit_part, llm_part, tokenizer)
    parts = [vit_part, llm_part]
    tensors = vit_part.tensors | _resized(llm_part.tensors, config.decoder, added, seed)
    if projector is None:
        tensors |= _fresh_projector(config, seed)
    else:
        projector_part = _projector_part(resolve(projector), config)
        parts.append(projector_part)
        tensors |= projector_part.tensors
    target = refuse_sources(out, *(part.place for part in parts))
    dtype = dtype or _widest([part.dtype for part in parts])
    write_model(target, empty_model(config), dialect, lambda name: tensors[name](), dtype=dtype, progress=progress)
    save_processor(Processor(config, tokenizer), target)
    return config


def _composed_config(vit_part: VisionPart, llm_part: LanguagePart, tokenizer: Tokenizer) -> ModelConfig:
    vit_config, llm_config, chat_end = vit_part.whole, llm_part.whole, tokenizer.id(CHATML[1])
    return ModelConfig(
        vision=vit_part.vision,
        decoder=replace(llm_part.decoder, vocab_size=len(tokenizer)),
        tiling=replace(vit_config.tiling, tile_size=vit_part.vision.image_size),
        image_token_id=tokenizer.id(SPECIAL_TOKENS[2]),
        eos_token_ids=llm_part.eos_ids if chat_end in llm_part.eos_ids else (chat_end, *llm_part.eos_ids),
        pad_token_id=llm_part.pad_id,
        bos_token_id=tokenizer.bos,
        select_layer=vit_config.select_layer,
        pixel_shuffle=vit_config.pixel_shuffle,
        template=llm_config.template,
        system_message=llm_config.system_message,
    )


# -- reading parts


def _readers(entries: Sequence[TensorEntry], weights: TensorSource, prefix: str = "") -> TensorReaders:
    """Readers of the entries whose parameter name starts with the prefix."""
    return {entry.ours: lambda e=entry: read(e, weights) for entry in entries if entry.ours.startswith(prefix)}


def _checked(module: nn.Module, entries: Sequence[TensorEntry], weights: TensorSource, prefix: str) -> TensorReaders:
    """Readers of a part that is a checkpoint of its own, after comparing names and shapes."""
    check_entries(entries, {f"{prefix}{name}": p.shape for name, p in module.named_parameters()}, weights)
    return _readers(entries, weights)


def _of_internvl(directory: Path, prefix: str) -> ModelPart:
    """One part of an InternVL directory; the whole directory is checked."""
    config = load_config(directory)
    weights, entries = open_weights(directory, empty_model(config))
    tensors = _readers(entries, weights, prefix)
    return ModelPart(place=directory, dtype=weights.main_dtype, tensors=tensors, whole=config)


def _vision_part(directory: Path) -> VisionPart:
    top = open_section(directory / "config.json")
    kind = top.get("model_type")
    if kind in _INTERNVL:
        part = _of_internvl(directory, "vision.")
        return VisionPart(**vars(part), vision=part.whole.vision)
    if kind not in _VISION_ALONE:
        known = ", ".join((*_VISION_ALONE, *_INTERNVL))
        raise InputError(f"{top.place}: model_type is {kind!r}; a ViT comes from one of {known}")
    config = vision_from(top)
    with torch.device("meta"):
        module = VisionTransformer(config)
    weights = StoredWeights(directory)
    tensors = _checked(module, vision_map(module, _VISION_ALONE[kind], ours="vision."), weights, "vision.")
    return VisionPart(place=directory, dtype=weights.main_dtype, tensors=tensors, vision=config)


def _language_part(llm: str | Path) -> LanguagePart:
    if str(llm).endswith(".gguf"):
        return _gguf_part(Path(llm).expanduser())
    directory = resolve(llm)
    top = open_section(directory / "config.json")
    tokenizer = load_tokenizer(directory)
    if top.get("model_type") in _INTERNVL:
        part = _of_internvl(directory, "decoder.")
        ends = {"eos_ids": part.whole.eos_token_ids, "pad_id": part.whole.pad_token_id}
        return LanguagePart(**vars(part), **ends, decoder=part.whole.decoder, tokenizer=tokenizer)
    config = decoder_from(top, family_of(top))
    with torch.device("meta"):
        module = Decoder(config)
    weights = StoredWeights(directory)
    entries = decoder_map(module, internlm2=config.family == "internlm2", ours="decoder.")
    if tied(directory):
        untie(entries, weights, "decoder.")
    return LanguagePart(
        place=directory,
        dtype=weights.main_dtype,
        tensors=_checked(module, entries, weights, "decoder."),
        decoder=config,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(directory),
        pad_id=_pad_id(tokenizer),
    )


def _gguf_part(path: Path) -> LanguagePart:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    file = GgufModel(path)
    with torch.device("meta"):
        module = Decoder(file.config)
    entries = [replace(entry, ours=f"decoder.{entry.ours}") for entry in file.key_map(module)]
    vocabulary = file.vocabulary()
    tokenizer = tokenizer_from_gguf(vocabulary)
    return LanguagePart(
        place=path,
        dtype=file.main_dtype,
        tensors=_checked(module, entries, file, "decoder."),
        decoder=file.config,
        tokenizer=tokenizer,
        eos_ids=() if vocabulary.eos_token_id is None else (vocabulary.eos_token_id,),
        pad_id=_pad_id(tokenizer),
    )


def _pad_id(tokenizer: Tokenizer) -> int | None:
    text = token_text(tokenizer.config.get("pad_token"))
    return None if text is None else tokenizer.id(text)


def _eos_ids(directory: Path) -> tuple[int, ...]:
    """Where the language model alone ends a reply: generation_config.json, else config.json."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        value = read_object(path).get("eos_token_id") if path.exists() else None
        if value is None:
            continue
        ids = tuple(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
        if not ids:
            raise InputError(f"{path}: eos_token_id is {value!r}, expected an id or a list of ids")
        return ids
    return ()


# -- the projector, and rows of new tokens


def _projector_part(directory: Path, config: ModelConfig) -> ModelPart:
    """The projector of an InternVL directory, if it fits the two parts.

    Raises:
        InputError: with both shapes, if it does not.
    """
    kind = open_section(directory / "config.json").get("model_type")
    if kind not in _INTERNVL:
        raise InputError(
            f"{directory}: model_type is {kind!r}; a projector comes from an InternVL model ({', '.join(_INTERNVL)})"
        )
    part = _of_internvl(directory, "projector.")
    theirs = part.whole
    have = (4 * theirs.vision.width, theirs.decoder.width)
    need = (4 * config.vision.width, config.decoder.width)
    if have != need:
        raise InputError(
            f"{directory}: its projector maps {have[0]} to {have[1]} numbers, but these parts need {need[0]} to {need[1]}; "
            "leave the projector out to start a fresh one"
        )
    if theirs.pixel_shuffle != config.pixel_shuffle:
        raise InputError(
            f"{directory}: its projector reads pixel shuffle {theirs.pixel_shuffle}, the ViT's is {config.pixel_shuffle}"
        )
    return part


def _fresh_projector(config: ModelConfig, seed: int) -> TensorReaders:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Projector(config.vision.width, config.decoder.width)
        module.init_weights()
    return {f"projector.{name}": lambda p=p: p.detach() for name, p in module.named_parameters()}


def _extended(tokenizer: Tokenizer, num_rows: int, place: str | Path) -> tuple[Tokenizer, int]:
    """The tokenizer with every special token, and how many were added."""
    if len(tokenizer) > num_rows:
        raise InputError(f"{place}: the tokenizer has {len(tokenizer)} tokens but the model only {num_rows} rows")
    before = len(tokenizer)
    missing = [token for token in (*CHATML, *SPECIAL_TOKENS) if token not in tokenizer]
    added = tokenizer.add_special(missing)
    ids = [tokenizer.id(token) for token in missing]
    if ids != list(range(before, before + added)):
        raise InputError(f"{place}: the vocabulary of {before} tokens has gaps: new tokens get the ids {ids}")
    return tokenizer, added


def _resized(tensors: TensorReaders, config: DecoderConfig, added: int, seed: int) -> TensorReaders:
    """The decoder's tensors with embedding and head of config.vocab_size rows, the last `added` of them new tokens."""
    size = config.vocab_size

    def embeddings() -> torch.Tensor:
        stored = tensors["decoder.embeddings.weight"]()[:size]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(size - len(stored), config.width, generator=generator) * NEW_ROW_STD
        return torch.cat([stored, drawn.to(stored.dtype)])

    def head() -> torch.Tensor:
        known = tensors["decoder.head.weight"]()[: size - added]
        mean = known.float().mean(0, keepdim=True).to(known.dtype)
        return torch.cat([known, mean.expand(added, -1)])

    return {**tensors, "decoder.embeddings.weight": embeddings, "decoder.head.weight": head}


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
