"""config.json of both dialects: ModelConfig in and out, both by the one table of config_table.

A value that would change the computation and is not supported is refused, never dropped. Keys that only one dialect knows
(tiling, template, the language model's original family) are written to both, so that nothing is lost on the way and back.
Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ivl.checkpoint import config_table as table
from ivl.checkpoint.config_table import Dialect, FieldKey
from ivl.checkpoint.files import read_object
from ivl.config import DecoderConfig, Family, ModelConfig, TilingConfig, VisionConfig
from ivl.errors import InputError

T = TypeVar("T")
IMAGE_TOKEN = "<IMG_CONTEXT>"
CHAT_END = "<|im_end|>"
_PUBLISHED_IMAGE_TOKENS = {("qwen2", 151674): 151667, ("internlm2", 92553): 92546}
"""Id of IMAGE_TOKEN in the published models, by family and vocabulary, for directories without tokenizer files."""


@dataclass(frozen=True)
class Section:
    """A JSON object of a configuration file, with errors that name the place."""

    values: dict[str, Any]
    place: str

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default if it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def value(self, key: str, default: Any = None) -> Any:
        """Return a truth value, a text or a number, whichever the default is; without a default there must be a number.

        A text is one of CHOICES if that has the key. A number is above 0, within LIMITS, and whole if LIMITS has the key; a
        list of equal numbers counts as one.
        """
        value = self.get(key, default)
        if isinstance(default, bool):
            return bool(value)
        if isinstance(default, str):
            if not isinstance(value, str) or value not in table.CHOICES.get(key, (value,)):
                known = " or ".join(table.CHOICES.get(key, ("a text",)))
                raise InputError(f"{self.place}: {key} is {value!r}, expected {known}")
            return value
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if value is None:
            raise InputError(f"{self.place}: {key} is missing")
        limit = table.LIMITS.get(key)
        if isinstance(value, bool) or not isinstance(value, int if limit else (int, float)):
            raise InputError(f"{self.place}: {key} is {value!r}, expected a {'whole ' if limit else ''}number")
        if not 0 < value <= (limit or 1e30):
            raise InputError(f"{self.place}: {key} is {value}, expected above 0 and at most {limit or 1e30}")
        return value

    def require(self, constants: Mapping[str, Any]) -> None:
        """Refuse another value of a key that is there and changes the computation."""
        for key, expected in constants.items():
            value = self.get(key, expected)
            if key in table.CHECKED and value != expected:
                raise InputError(f"{self.place}: {key} is {value!r}; only {expected!r} is supported")

    def section(self, key: str) -> Section:
        """Return an object inside this one."""
        value = self.get(key)
        if not isinstance(value, dict):
            raise InputError(f"{self.place}: {key} is {value!r}, expected an object")
        return Section(value, f"{self.place}: {key}")

    def read(self, kind: type[T], keys: Sequence[FieldKey], dialect: Dialect, **known: Any) -> T:
        """Build a configuration of ours from its keys and from fields that are known already."""
        known |= {key.field: self.value(*key.of(dialect)) for key in keys}
        try:
            return kind(**known)
        except ValueError as error:
            raise InputError(f"{self.place}: {error}") from None


def open_section(path: Path, *, optional: bool = False) -> Section:
    """Read a JSON file as a section; an optional one that is not there is empty."""
    return Section({} if optional and not path.exists() else read_object(path), str(path))


# -- reading


def dialect_of(directory: Path) -> Dialect:
    """Return the dialect of a model directory, by `model_type`.

    Raises:
        InputError: if it is neither.
    """
    top = open_section(directory / "config.json")
    model_type = top.get("model_type")
    for dialect, known in table.MODEL_TYPE.items():
        if model_type == known:
            return dialect
    raise InputError(f"{top.place}: model_type is {model_type!r}; expected internvl_chat, or internvl of transformers")


def tied(directory: Path) -> bool:
    """Return whether the output head of a checkpoint without one is its embedding table."""
    values = read_object(directory / "config.json")
    inner = values.get("llm_config") or values.get("text_config") or {}
    # transformers' own default for an InternVL configuration is true.
    default = values.get("model_type") == "internvl"
    return bool(values.get("tie_word_embeddings", inner.get("tie_word_embeddings", default)))


def load_config(directory: Path | str) -> ModelConfig:
    """Read the configuration of a model directory of either dialect from its JSON files.

    Drop path is a matter of the training run and not read.

    Raises:
        InputError: naming file and key, if something is missing, out of bounds or not supported.
    """
    directory = Path(directory)
    top = open_section(directory / "config.json")
    dialect = dialect_of(directory)
    top.require(table.CONSTANTS["internvl_chat"] | table.CONSTANTS[table.MODEL_TYPE[dialect]])
    try:
        return _model_config(top, dialect, directory)
    except InputError:
        raise
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # values of the wrong kind
        raise InputError(f"{top.place}: {error}") from None


def _model_config(top: Section, dialect: Dialect, directory: Path) -> ModelConfig:
    vision = vision_from(top.section("vision_config"))
    text = top.section(table.TEXT_CONFIG[dialect])
    family = family_of(text)
    if dialect == "internvl_chat":
        # The stored position table is that of the ViT's own size; interpolating it here would be a guess.
        top.require({"force_image_size": vision.image_size})
    elif family == "llama":
        # InternLM2 is stored as LLaMA here; ours say so, and the published ones have its vocabulary.
        published = text.get("vocab_size") == 92553 and top.get("image_token_id") == 92546
        family = top.value("original_family", "internlm2" if published else "llama")
    decoder = decoder_from(text, family)
    generation = open_section(directory / "generation_config.json", optional=True)
    # Qwen names a bos token that its tokenizer never writes.
    bos = None if family == "qwen2" else text.get("bos_token_id")
    return ModelConfig(
        vision=vision,
        decoder=decoder,
        tiling=_tiling(top, directory, vision.image_size),
        image_token_id=_image_token(top, directory, decoder),
        eos_token_ids=_eos_tokens(top, generation, text, directory),
        pad_token_id=top.get("pad_token_id", generation.get("pad_token_id", text.get("pad_token_id"))),
        bos_token_id=top.get("bos_token_id", bos),
        select_layer=top.get(table.SELECT_LAYER[dialect], -1),
        pixel_shuffle=top.value("ps_version", "v1") if dialect == "internvl_chat" else "v2",
        template=top.value("template", "internvl2_5"),
        system_message=top.get("system_message"),
    )


def vision_from(section: Section) -> VisionConfig:
    """Read InternViT from the vision part of either dialect, or from the config.json of a ViT alone."""
    transformers = section.get("model_type") == "internvl_vision" or "use_qk_norm" in section.values
    dialect: Dialect = "transformers" if transformers else "internvl_chat"
    section.require(table.CONSTANTS[table.VISION_TYPE[dialect]])
    return section.read(VisionConfig, table.VISION_KEYS, dialect)


def decoder_from(section: Section, family: Family) -> DecoderConfig:
    """Read a decoder from the language part of either dialect, or from the config.json of a language model alone."""
    width, num_heads = section.value("hidden_size"), section.value("num_attention_heads")
    defaults = {
        "num_key_value_heads": num_heads,
        "head_dim": width // num_heads,
        "bias": section.get("model_type") == "internlm2",  # its class has biases unless told otherwise
    }
    section = Section(defaults | {key: value for key, value in section.values.items() if value is not None}, section.place)
    biased = family == "qwen2"
    section.require(
        table.CONSTANTS["qwen2"] | table.CONSTANTS["internlm2"] | table.CONSTANTS["llama"] | {"attention_bias": biased}
    )
    theta, factor = _rope(section)
    return section.read(
        DecoderConfig, table.DECODER_KEYS, "internvl_chat",
        family=family, rope_theta=theta, rope_dynamic_factor=factor, qkv_bias=biased,
    )  # fmt: skip


def family_of(section: Section) -> Family:
    """Return the family of a language model's configuration.

    Raises:
        InputError: if it is none that the decoder computes.
    """
    names, model_type = section.get("architectures", []), section.get("model_type")
    for architecture, family in table.ARCHITECTURES.items():
        if architecture in names or (not names and model_type == family):
            return family
    raise InputError(f"{section.place}: language model {names or model_type!r} is not one of {', '.join(table.ARCHITECTURES)}")


def _rope(section: Section) -> tuple[float, float | None]:
    """Rotary base and dynamic factor, from the older keys (rope_theta, rope_scaling) or the newer (rope_parameters)."""
    scaling = Section(section.get("rope_parameters") or section.get("rope_scaling") or {}, section.place)
    theta = scaling.value("rope_theta", section.value("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "dynamic"):
        raise InputError(f"{section.place}: rope scaling {kind!r} is not supported; default and dynamic are")
    return float(theta), float(scaling.value("factor")) if kind == "dynamic" else None


def _tiling(top: Section, directory: Path, size: int) -> TilingConfig:
    if "max_dynamic_patch" in top.values:
        return top.read(TilingConfig, table.TILING_KEYS, "internvl_chat", tile_size=size)
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = open_section(directory / name, optional=True)
        image = Section(values.get("image_processor", values.values), values.place)
        if "max_patches" in image.values:
            low, high = image.value("min_patches", 1), image.value("max_patches")
            return TilingConfig(tile_size=size, min_tiles=low, max_tiles=high)
    return TilingConfig(tile_size=size)


def _added_token(directory: Path, token: str) -> int | None:
    """Id of an added token, from whichever tokenizer file tells it; None if none does."""
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        section = open_section(directory / name, optional=True)
        if name == "added_tokens.json":
            ids = section.values
        elif name == "tokenizer.json":
            ids = {row.get("content"): row.get("id") for row in section.get("added_tokens", ())}
        else:
            ids = {row.get("content"): int(key) for key, row in section.get("added_tokens_decoder", {}).items()}
        if isinstance(ids.get(token), int):
            return ids[token]
    return None


def _image_token(top: Section, directory: Path, decoder: DecoderConfig) -> int:
    token = top.get("image_token_id", _added_token(directory, IMAGE_TOKEN))
    if token is None:
        token = _PUBLISHED_IMAGE_TOKENS.get((decoder.family, decoder.vocab_size))
    if not isinstance(token, int):
        raise InputError(
            f"{top.place}: the id of {IMAGE_TOKEN} is in neither config.json nor the tokenizer's files; copy those"
        )
    return token


def _eos_tokens(top: Section, generation: Section, text: Section, directory: Path) -> tuple[int, ...]:
    listed = generation.get("eos_token_id", top.get("eos_token_id", ()))
    eos: list[Any] = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    chat_end = _added_token(directory, CHAT_END)
    if chat_end is not None and chat_end not in eos:
        eos.append(chat_end)  # A ChatML reply ends here, whatever the base model's list says.
    if not eos:
        eos = [text.get("eos_token_id")]
    if not all(isinstance(token, int) for token in eos):
        raise InputError(f"{generation.place}: eos_token_id is {eos}, expected one id or a list of ids")
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
    if config.decoder.qkv_bias != (family == "qwen2"):
        raise InputError(f"family {family} with qkv_bias {config.decoder.qkv_bias} has no checkpoint format")
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
        family = "qwen2" if family == "qwen2" else "llama"
    else:
        raise InputError(f"pixel_shuffle {config.pixel_shuffle} cannot be written for transformers, which computes v2 only")
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
        **({} if config.system_message is None else {"system_message": config.system_message}),
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
    return {key.of(dialect)[0]: getattr(config, key.field) for key in keys}


def _end_tokens(config: ModelConfig) -> dict[str, Any]:
    first, *rest = config.eos_token_ids
    eos = [first, *rest] if rest else first
    return {"eos_token_id": eos, "bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}


def _decoder_json(config: ModelConfig, model_type: Family) -> dict[str, Any]:
    factor = config.decoder.rope_dynamic_factor
    # Both spellings of the same key would be refused by older libraries, so each model type gets the one it knows.
    kind = "type" if model_type == "internlm2" else "rope_type"
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
        "eos_token_id": config.eos_token_ids[-1],
    }
