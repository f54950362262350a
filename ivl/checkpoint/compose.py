"""A model directory composed of the parts of other model directories.

Composing is how progressive scaling works (InternVL2.5, arXiv:2412.05271, section 3.2): a ViT that was trained beside a small
language model moves to a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch

from ivl.checkpoint.config_json import decoder_from, family_of, load_config, token_ids, vision_from
from ivl.checkpoint.config_table import Dialect, StoredDtype
from ivl.checkpoint.files import new_directory
from ivl.checkpoint.gguf.reader import GgufModel
from ivl.checkpoint.gguf.tokenizer import tokenizer_from_gguf
from ivl.checkpoint.hub import resolve
from ivl.checkpoint.keymaps import TensorEntry, decoder_map, vision_map
from ivl.checkpoint.model_dir import empty_model, open_weights, read_finite, save_model, tensors_of, untie
from ivl.checkpoint.processor_files import save_processor
from ivl.checkpoint.sections import TOKEN_ID, open_section
from ivl.checkpoint.vocabulary import check_spelling, load_tokenizer, refusing_damage
from ivl.checkpoint.weights import OnMegabytes, StoredWeights, TensorSource, check_entries
from ivl.config import SPECIAL_TOKENS, DecoderConfig, ModelConfig, published_config
from ivl.errors import InputError
from ivl.model.projector import Projector
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


@dataclass(frozen=True)
class SourcePart:
    """A part of a model: its checkpoint, and the configuration of the InternVL that it is a part of.

    A ViT or a language model alone is described as a part of the published 1B.
    """

    whole: ModelConfig
    weights: TensorSource
    entries: Sequence[TensorEntry]

    def readers(self, prefix: str) -> TensorReaders:
        """Return readers of the parameters whose name starts with the prefix."""
        return {e.ours: lambda e=e: read_finite(e, self.weights) for e in self.entries if e.ours.startswith(prefix)}


def compose(
    vit: str | Path,
    llm: str | Path,
    projector: str | Path | None,
    out: str | Path,
    *,
    to: Dialect = "internvl_chat",
    dtype: StoredDtype = "keep",
    seed: int = 0,
    force: bool = False,
    progress: OnMegabytes | None = None,
) -> ModelConfig:
    """Write a complete model made of a ViT, a language model and a projector.

    The special tokens that the language model lacks are added to its tokenizer, and the vocabulary becomes exactly that of
    the tokenizer: embedding rows that exist are kept, others are drawn with deviation 0.02; the output rows of added tokens
    are the mean of all rows before them. Weights are streamed, one shard at a time.

    Args:
        vit: an InternViT or an InternVL, directory or hub id.
        llm: a Qwen2.5, Qwen3, InternLM2.5, LLaMA-shaped or InternVL model, directory or hub id; or a GGUF file.
        projector: an InternVL to take it from; None draws a fresh one.
        to: dialect to write.
        dtype: of the written weights; keep is the narrowest that holds every part unchanged.
        seed: of every drawn number.
        force: replace out if it is a model directory.

    Raises:
        InputError: if a part is unreadable, parts do not fit each other, or out exists.
    """
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed is {seed}, must be from 0 to 2**63 - 1")
    vit_part = _vision_part(resolve(vit))
    llm_part, tokenizer = _language_part(llm)
    tokenizer, added = _extended(tokenizer, llm_part.whole.decoder.vocab_size, llm)
    config = _composed_config(vit_part.whole, llm_part.whole, tokenizer)
    parts = [vit_part, llm_part]
    tensors = vit_part.readers("vision.") | _resized(llm_part.readers("decoder."), config.decoder, added, seed)
    if projector is None:
        tensors |= _fresh_projector(config, seed)
    else:
        parts.append(_projector_part(resolve(projector), config))
        tensors |= parts[-1].readers("projector.")
    kept = reduce(torch.promote_types, (part.weights.main_dtype for part in parts))
    written = kept if dtype == "keep" else getattr(torch, dtype)
    sources = [source for source in (vit, llm, projector) if source is not None]
    with new_directory(out, force=force, sources=sources) as target:
        model = empty_model(config)
        save_model(model, target, dialect=to, dtype=written, get=lambda name: tensors[name](), progress=progress)
        save_processor(Processor(config, tokenizer), target)
    return config


def _composed_config(vit: ModelConfig, llm: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    chat_end = tokenizer.id(CHATML[1])
    return replace(
        vit,
        decoder=replace(llm.decoder, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.id(SPECIAL_TOKENS[2]),
        eos_token_ids=llm.eos_token_ids if chat_end in llm.eos_token_ids else (chat_end, *llm.eos_token_ids),
        pad_token_id=llm.pad_token_id,
        bos_token_id=tokenizer.bos,
        template=llm.template,
        system_message=llm.system_message,
    )


# -- reading parts


def _internvl(directory: Path) -> SourcePart:
    config = load_config(directory)
    return SourcePart(config, *open_weights(directory, empty_model(config)))


def _alone(whole: ModelConfig, weights: TensorSource, entries: Sequence[TensorEntry]) -> SourcePart:
    """A part that is a checkpoint of its own, after comparing names and shapes."""
    check_entries(entries, {name: tensor.shape for name, tensor in tensors_of(empty_model(whole)).items()}, weights)
    return SourcePart(whole, weights, entries)


def _vision_part(directory: Path) -> SourcePart:
    top = open_section(directory / "config.json")
    kind = top.values.get("model_type")
    if kind in _INTERNVL:
        return _internvl(directory)
    if kind not in _VISION_ALONE:
        known = ", ".join((*_VISION_ALONE, *_INTERNVL))
        raise InputError(f"{top.place}: model_type is {kind!r}; a ViT comes from one of {known}")
    config = vision_from(top)
    whole = replace(_DEFAULTS, vision=config, tiling=replace(_DEFAULTS.tiling, tile_size=config.image_size))
    return _alone(whole, StoredWeights(directory), vision_map(empty_model(whole).vision, _VISION_ALONE[kind]))


def _language_part(llm: str | Path) -> tuple[SourcePart, Tokenizer]:
    if str(llm).endswith(".gguf"):
        return _gguf_part(Path(llm).expanduser())
    directory = resolve(llm)
    top = open_section(directory / "config.json")
    tokenizer = load_tokenizer(directory)
    if top.values.get("model_type") in _INTERNVL:
        return _internvl(directory), tokenizer
    generation = open_section(directory / "generation_config.json", optional=True)
    eos_ids = token_ids(generation, "eos_token_id", TOKEN_ID) or token_ids(top, "eos_token_id", TOKEN_ID)
    whole = _language_alone(decoder_from(top, family_of(top)), tokenizer, tuple(eos_ids))
    weights = StoredWeights(directory)
    entries = decoder_map(empty_model(whole).decoder, internlm2=whole.decoder.family == "internlm2")
    untie(entries, weights, top)
    return _alone(whole, weights, entries), tokenizer


def _gguf_part(path: Path) -> tuple[SourcePart, Tokenizer]:
    file = GgufModel(path)
    vocabulary = file.vocabulary()
    with refusing_damage(path):
        tokenizer = check_spelling(tokenizer_from_gguf(vocabulary))
    eos_ids = () if vocabulary.eos_token_id is None else (vocabulary.eos_token_id,)
    whole = _language_alone(file.config, tokenizer, eos_ids)
    return _alone(whole, file, file.key_map(empty_model(whole).decoder)), tokenizer


def _language_alone(decoder: DecoderConfig, tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> ModelConfig:
    pad = token_text(tokenizer.config.get("pad_token"))
    pad_id = None if pad is None else tokenizer.id(pad)
    system = "" if decoder.family == "qwen3" else None  # as InternVL3.5
    ids = {"image_token_id": 0, "eos_token_ids": eos_ids, "pad_token_id": pad_id}
    return replace(_DEFAULTS, decoder=decoder, system_message=system, **ids)


# -- the projector, and rows of new tokens


def _projector_part(directory: Path, config: ModelConfig) -> SourcePart:
    """The InternVL of a directory, if its projector fits the two parts."""
    part = _internvl(directory)
    theirs = part.whole
    have, need = ((4 * whole.vision.width, whole.decoder.width) for whole in (theirs, config))
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
