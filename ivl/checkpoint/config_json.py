"""config.json of both dialects: ModelConfig in and out, both by the one table of config_table.

A value that would change the computation and is not supported is refused, never dropped. Keys that only one dialect knows
(tiling, template, the language model's original family) are written to both, so that nothing is lost on the way and back.
Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, TypeVar

from ivl.checkpoint import config_table as table
from ivl.checkpoint.chat_template import default_system
from ivl.checkpoint.config_table import Dialect, FieldKey
from ivl.checkpoint.sections import FLAG, TEXT, TOKEN_ID, Section, Values, added_tokens, open_section
from ivl.config import DecoderConfig, Family, ModelConfig, TilingConfig, VisionConfig
from ivl.errors import InputError, short
from ivl.processing.chat import template_of

T = TypeVar("T")
IMAGE_TOKEN = "<IMG_CONTEXT>"
CHAT_END = "<|im_end|>"
QWEN_END_OF_TEXT = 151643
_PUBLISHED_IMAGE_TOKENS = {("qwen2", 151674): 151667, ("internlm2", 92553): 92546, ("qwen3", 151936): 151671}
"""Id of IMAGE_TOKEN in the published models, by family and vocabulary, for directories without tokenizer files."""


# -- reading


def dialect_of(directory: Path) -> Dialect:
    """Return the dialect of a model directory, by `model_type`.

    Raises:
        InputError: if it is neither.
    """
    return _dialect(open_section(directory / "config.json"))


def _dialect(top: Section) -> Dialect:
    model_type = top.values.get("model_type")
    for dialect, known in table.MODEL_TYPE.items():
        if model_type == known:
            if table.TEXT_CONFIG[dialect] not in top.values and (other := {*table.TEXT_CONFIG.values()} & top.values.keys()):
                raise InputError(
                    f"{top.place}: is half converted: model_type is {known}, but it has {other.pop()} of the other dialect"
                )
            return dialect
    raise top.refusal("model_type", model_type, "internvl_chat, or internvl of transformers")


def tie_flags(top: Section) -> list[bool]:
    """Return what config.json says about the output head being the embedding table: at its top, then for the language model."""
    inner = top.section("llm_config" if top.values.get("llm_config") else "text_config", {})
    flags = (section.read("tie_word_embeddings", FLAG, None) for section in (top, inner))
    return [flag for flag in flags if flag is not None]


def load_config(directory: Path | str) -> ModelConfig:
    """Read the configuration of a model directory of either dialect from its JSON files.

    Drop path is a matter of the training run and not read.

    Raises:
        InputError: naming file and key, if something is missing, out of bounds or not supported.
    """
    directory = Path(directory)
    if not (directory / "config.json").exists():
        _name_another(directory)
    generation = open_section(directory / "generation_config.json", optional=True)
    return model_config(open_section(directory / "config.json"), generation, directory)


def _name_another(directory: Path) -> None:
    """Raise InputError for a directory that is known to be something else than a model."""
    if (directory / "adapter_config.json").exists():
        raise InputError(f"{directory}: is a LoRA adapter, not a model; 'ivl merge MODEL {directory} OUT' makes one")
    if any(directory.glob("*.gguf")):
        raise InputError(f"{directory}: has GGUF files; 'ivl compose' makes a model with the language model of one")
    if inside := sorted(directory.glob("*/config.json")):
        raise InputError(f"{directory}: has no config.json; {inside[-1].parent} has one")


def model_config(top: Section, generation: Section, directory: Path) -> ModelConfig:
    """Read a configuration from the sections of config.json and generation_config.json.

    Args:
        directory: has the tokenizer and preprocessor files, which say what those two leave out.
    """
    dialect = _dialect(top)
    top.require(_checked("internvl_chat") | _checked(table.MODEL_TYPE[dialect]))
    _refuse_flash(top)
    vision = vision_from(top.section("vision_config"))
    text = top.section(table.TEXT_CONFIG[dialect])
    family = family_of(text)
    if dialect == "internvl_chat":
        # The stored position table is that of the ViT's own size; interpolating it here would be a guess.
        top.require({"force_image_size": vision.image_size})
    elif family == "llama":
        # InternLM2 is stored as LLaMA here; ours say so, and the published ones have its vocabulary.
        published = text.values.get("vocab_size") == 92553 and top.values.get("image_token_id") == 92546
        families = Values(str, choices=("llama", "internlm2", "internlm3"))
        family = top.read("original_family", families, "internlm2" if published else "llama")
    decoder = decoder_from(text, family)
    ids = Values(int, 0, decoder.vocab_size - 1)
    # Qwen names a bos token that its tokenizer never writes.
    bos = None if family.startswith("qwen") else text.read("bos_token_id", ids, None)
    pad = generation.read("pad_token_id", ids, text.read("pad_token_id", ids, None))
    shuffles = Values(str, choices=("v1", "v2"))
    return _built(
        ModelConfig,
        top.place,
        vision=vision,
        decoder=decoder,
        tiling=_tiling(top, directory, vision.image_size),
        image_token_id=_image_token(top, directory, decoder),
        eos_token_ids=_eos_tokens((generation, top), text, ids, directory),
        pad_token_id=top.read("pad_token_id", ids, pad),
        bos_token_id=top.read("bos_token_id", ids, bos),
        select_layer=top.read(table.SELECT_LAYER[dialect], Values(int, -1025, 1024), -1),
        pixel_shuffle=top.read("ps_version", shuffles, "v1") if dialect == "internvl_chat" else "v2",
        template=top.read("template", TEXT, "internvl2_5"),
        system_message=_system_message(top, family, directory),
    )


def vision_from(section: Section) -> VisionConfig:
    """Read InternViT from the vision part of either dialect, or from the config.json of a ViT alone."""
    transformers = section.values.get("model_type") == "internvl_vision" or "use_qk_norm" in section.values
    dialect: Dialect = "transformers" if transformers else "internvl_chat"
    section.require(_checked(table.VISION_TYPE[dialect]))
    return _read(VisionConfig, section, table.VISION_KEYS, dialect)


def decoder_from(section: Section, family: Family) -> DecoderConfig:
    """Read a decoder from the language part of either dialect, or from the config.json of a language model alone."""
    width, num_heads = section.read("hidden_size", table.WIDTH), section.read("num_attention_heads", table.HEADS)
    defaults = {
        "num_key_value_heads": num_heads,
        "head_dim": 128 if family == "qwen3" else width // num_heads,  # as their classes take it
        "bias": section.values.get("model_type") == "internlm2",  # its class has biases unless told otherwise
    }
    section = Section(defaults | {key: value for key, value in section.values.items() if value is not None}, section.place)
    biased = family == "qwen2"
    constants = reduce(or_, map(_checked, table.FAMILIES))
    section.require(constants | {"attention_bias": biased, "qkv_bias": biased})
    if others := set(section.items("layer_types", TEXT, [])) - {"full_attention", "sliding_attention"}:
        raise InputError(f"{section.place}: layer_types has {short(min(others))}; only full attention is supported")
    theta, factor = _rope(section)
    return _read(
        DecoderConfig, section, table.DECODER_KEYS, "internvl_chat",
        family=family, rope_theta=theta, rope_dynamic_factor=factor, qkv_bias=biased, qk_norm=family == "qwen3",
    )  # fmt: skip


EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of the configurations of mixtures of experts."""


def family_of(section: Section) -> Family:
    """Return the family of a language model's configuration.

    Raises:
        InputError: if it is none that the decoder computes.
    """
    names, model_type = section.items("architectures", TEXT, []), section.values.get("model_type")
    told = [key for key in EXPERT_COUNTS if section.values.get(key)] + ["model_type"] * ("moe" in str(model_type))
    for architecture, family in table.ARCHITECTURES.items():
        if architecture in names or (not names and model_type == family):
            if told:
                raise InputError(f"{section.place}: {told[0]} tells of a mixture of experts, which is not supported")
            return family
    known, given = ", ".join(table.ARCHITECTURES), str(names or model_type).lower().replace("_", "")
    kind = " (a mixture of experts)" if "moe" in given else " (gpt-oss)" if "gptoss" in given else ""
    raise InputError(f"{section.place}: language model {short(names or model_type)}{kind} is not one of {known}")


def token_ids(section: Section, key: str, kind: Values) -> list[int]:
    """Return the token ids of a key, which has one or a list of them; none if it is absent."""
    value = section.values.get(key)
    listed = {} if value is None else {key: value if isinstance(value, list) else [value]}
    return Section(listed, section.place).items(key, kind, [])


def _checked(model_type: str) -> dict[str, Any]:
    """The constants of a model_type that change the computation."""
    return {key: value for key, value in table.CONSTANTS[model_type].items() if key in table.CHECKED}


def _read(kind: type[T], section: Section, keys: Sequence[FieldKey], dialect: Dialect, **known: Any) -> T:
    """Build a configuration of ours from its keys and from fields that are known already."""
    return _built(kind, section.place, **known, **{key.field: key.read(section, dialect) for key in keys})


def _built(kind: type[T], place: str, **values: Any) -> T:
    try:
        return kind(**values)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None


def _rope(section: Section) -> tuple[float, float | None]:
    """Rotary base and dynamic factor, from the older keys (rope_theta, rope_scaling) or the newer (rope_parameters)."""
    newer = section.values.get("rope_parameters") is not None
    scaling = section.section("rope_parameters" if newer else "rope_scaling", {})
    if nested := [key for key, value in scaling.values.items() if isinstance(value, dict)]:
        raise InputError(f"{scaling.place}: {short(nested[0])} has a rotary base of its own; all layers must share one")
    for part in (section, scaling):
        part.require({"partial_rotary_factor": 1.0})
    theta = scaling.read("rope_theta", table.ROTARY_BASE, section.read("rope_theta", table.ROTARY_BASE, 10000.0))
    kind = scaling.read("rope_type", TEXT, scaling.read("type", TEXT, "default"))
    if kind not in ("default", "dynamic"):
        raise InputError(f"{section.place}: rope scaling {short(kind)} is not supported; default and dynamic are")
    return float(theta), float(scaling.read("factor", Values(float, 1, 1e6))) if kind == "dynamic" else None


def _refuse_flash(top: Section) -> None:
    """InternVL3.5-Flash takes 64 tokens for a simple tile; its router and second projector are not computed here."""
    keys = [key for key in table.FLASH_KEYS if top.values.get(key) not in (None, False)]
    if keys and top.values.get("flash_mode") is not False:
        raise InputError(f"{top.place}: {keys[0]} is set: InternVL3.5-Flash is not supported; take the model without Flash")


def _system_message(top: Section, family: Family, directory: Path) -> str | None:
    """The system message that replaces the template's; None to keep that.

    The chat template of the directory says it where config.json names no template, as in transformers' files, and for
    InternVL3.5, whose config.json names that of InternVL2.5. Without one InternVL3.5 has no system message.
    """
    message = top.read("system_message", TEXT, None)
    if message is not None or ("template" in top.values and family != "qwen3"):
        return message
    message = default_system(directory)
    return "" if message is None and family == "qwen3" else message


def _tiling(top: Section, directory: Path, size: int) -> TilingConfig:
    if top.values.get("max_dynamic_patch") is not None:
        return _read(TilingConfig, top, table.TILING_KEYS, "internvl_chat", tile_size=size)
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = open_section(directory / name, optional=True)
        image = values.section("image_processor", values.values)
        if "max_patches" in image.values:
            low, high = image.read("min_patches", table.TILES, 1), image.read("max_patches", table.TILES)
            return _built(TilingConfig, image.place, tile_size=size, min_tiles=low, max_tiles=high)
    return TilingConfig(tile_size=size)


def _added_token(directory: Path, text: str) -> int | None:
    """Id of an added token, from whichever tokenizer file tells it; None if none does."""
    for files in (("added_tokens.json", "tokenizer_config.json"), ("tokenizer.json",)):
        for i, token in added_tokens(directory, *files).items():
            if token.values["content"] == text:
                return i
    return None


def _image_token(top: Section, directory: Path, decoder: DecoderConfig) -> int:
    token = top.read("image_token_id", TOKEN_ID, None)
    if token is None:
        token = _added_token(directory, IMAGE_TOKEN)
    if token is None:
        token = _PUBLISHED_IMAGE_TOKENS.get((decoder.family, decoder.vocab_size))
    if token is None:
        raise InputError(
            f"{top.place}: the id of {IMAGE_TOKEN} is in neither config.json nor the tokenizer's files; copy those"
        )
    return token


def _eos_tokens(sections: Sequence[Section], text: Section, kind: Values, directory: Path) -> tuple[int, ...]:
    eos = list(next((ids for section in sections if (ids := token_ids(section, "eos_token_id", kind))), []))
    chat_end = _added_token(directory, CHAT_END)
    if chat_end is not None and chat_end <= kind.high and chat_end not in eos:
        eos.append(chat_end)  # A ChatML reply ends here, whatever the base model's list says.
    if not (eos := eos or token_ids(text, "eos_token_id", kind)):
        raise InputError(f"{sections[0].place}: eos_token_id is missing, and {text.place} has none; expected one id or a list")
    return tuple(eos)


# -- writing


def to_json(config: ModelConfig, dialect: Dialect, dtype: str) -> dict[str, Any]:
    """Return `config.json` for a configuration.

    Args:
        dtype: torch's name without `torch.`, such as bfloat16.

    Raises:
        InputError: if the dialect cannot express the configuration.
    """
    family = config.decoder.family
    if (flags := (config.decoder.qkv_bias, config.decoder.qk_norm)) != (family == "qwen2", family == "qwen3"):
        raise InputError("family {} with qkv_bias {} and qk_norm {} has no checkpoint format".format(family, *flags))
    if dialect == "internvl_chat":
        code = table.CODE_REPOS[family]
        chat_model = f"{code}--modeling_internvl_chat.InternVLChatModel"
        auto_config = f"{code}--configuration_internvl_chat.InternVLChatConfig"
        own = {
            "auto_map": {"AutoConfig": auto_config, "AutoModel": chat_model, "AutoModelForCausalLM": chat_model},
            "ps_version": config.pixel_shuffle,
            "force_image_size": config.vision.image_size,
            "hidden_size": config.decoder.width,
        }
    elif config.pixel_shuffle == "v2":
        own = {"image_seq_length": config.tokens_per_tile, "original_family": family}
        family = family if family in ("qwen2", "qwen3") else "llama"
    else:
        raise InputError(f"pixel_shuffle {config.pixel_shuffle} cannot be written for transformers, which computes v2 only")
    system = config.system_message
    if system is None and family == "qwen3":  # read as none without a key
        system = template_of(config.template).system_message
    vision_type = table.VISION_TYPE[dialect]
    vision = {"model_type": vision_type, **table.CONSTANTS[vision_type], **_values(config.vision, table.VISION_KEYS, dialect)}
    if dialect == "transformers":
        vision |= {key: [vision[key], vision[key]] for key in ("patch_size", "image_size")}
    return {
        "model_type": table.MODEL_TYPE[dialect],
        **table.CONSTANTS[table.MODEL_TYPE[dialect]],
        **own,
        **_values(config.tiling, table.TILING_KEYS, dialect),
        table.SELECT_LAYER[dialect]: config.select_layer,
        table.DTYPE[dialect]: dtype,
        "template": config.template,
        **({} if system is None else {"system_message": system}),
        "image_token_id": config.image_token_id,
        **_end_tokens(config),
        "tie_word_embeddings": False,
        "vision_config": vision | {table.DTYPE[dialect]: dtype},
        table.TEXT_CONFIG[dialect]: _decoder_json(config, family) | {table.DTYPE[dialect]: dtype},
    }


def generation_json(config: ModelConfig) -> dict[str, Any]:
    """Return `generation_config.json`, which says where generation ends."""
    return {key: value for key, value in _end_tokens(config).items() if value is not None}


def _values(config: object, keys: Sequence[FieldKey], dialect: Dialect) -> dict[str, Any]:
    return {key.key(dialect): getattr(config, key.field) for key in keys}


def _end_tokens(config: ModelConfig) -> dict[str, Any]:
    first, *rest = config.eos_token_ids
    eos = [first, *rest] if rest else first
    return {"eos_token_id": eos, "bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}


def _decoder_json(config: ModelConfig, model_type: Family) -> dict[str, Any]:
    factor = config.decoder.rope_dynamic_factor
    # Both spellings of the same key would be refused by older libraries, so each model type gets the one it knows.
    kind = "type" if model_type == "internlm2" else "rope_type"
    bos = config.bos_token_id
    if bos is None and model_type.startswith("qwen"):
        # The original library's chat() generates from embeddings, for which its generate() wants some bos id.
        ids = (config.pad_token_id, QWEN_END_OF_TEXT, *config.eos_token_ids)
        bos = next(i for i in ids if i is not None and i < config.decoder.vocab_size)
    return {
        "model_type": model_type,
        **table.CONSTANTS[model_type],
        **_values(config.decoder, table.DECODER_KEYS, "internvl_chat"),
        "rope_theta": config.decoder.rope_theta,
        "rope_scaling": None if factor is None else {kind: "dynamic", "factor": factor},
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        **_end_tokens(config),
        "bos_token_id": bos,
        "eos_token_id": config.eos_token_ids[-1],
    }
