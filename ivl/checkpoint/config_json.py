"""`config.json` of both dialects to ModelConfig (spec 1.1, 1.3, 1.4, 1.6).

A value that would change the computation and is not supported is refused, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ivl.checkpoint.files import read_object
from ivl.config import DecoderConfig, Family, ModelConfig, TilingConfig, VisionConfig
from ivl.errors import InputError

Dialect = Literal["internvl_chat", "transformers"]
IMAGE_TOKEN = "<IMG_CONTEXT>"
CHAT_END = "<|im_end|>"
LIMITS = {
    "hidden_size": 1 << 16, "num_hidden_layers": 1024, "intermediate_size": 1 << 20, "num_attention_heads": 1024,
    "num_key_value_heads": 1024, "head_dim": 1 << 12, "vocab_size": 1 << 22, "image_size": 1 << 13, "patch_size": 1 << 9,
    "max_position_embeddings": 1 << 30, "min_dynamic_patch": 1 << 10, "max_dynamic_patch": 1 << 10, "min_patches": 1 << 10,
    "max_patches": 1 << 10,
}  # fmt: skip
"""Larger values are nonsense or an attack, and refused before anything is built."""
ARCHITECTURES: dict[str, Family] = {
    "Qwen2ForCausalLM": "qwen2", "InternLM2ForCausalLM": "internlm2", "LlamaForCausalLM": "llama",
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A JSON object of a configuration file, with errors that name the place."""

    values: dict[str, Any]
    place: str

    def number(self, key: str, default: float | None = None) -> Any:
        """A number above 0, within LIMITS and whole if LIMITS has the key; a list of equal numbers counts as one."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if value is None:
            raise InputError(f"{self.place}: {key} is missing")
        limit = LIMITS.get(key)
        if isinstance(value, bool) or not isinstance(value, int if limit else (int, float)):
            raise InputError(f"{self.place}: {key} is {value!r}, expected a {'whole ' if limit else ''}number")
        if not 0 < value <= (limit or 1e30):
            raise InputError(f"{self.place}: {key} is {value}, expected above 0 and at most {limit or 1e30}")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or the default if it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def require(self, key: str, expected: Any, default: Any) -> None:
        """Refuse any value but the one that the model computes."""
        value = self.get(key, default)
        if value != expected:
            raise InputError(f"{self.place}: {key} is {value!r}; only {expected!r} is supported")

    def section(self, key: str) -> Section:
        value = self.get(key)
        if not isinstance(value, dict):
            raise InputError(f"{self.place}: {key} is {value!r}, expected an object")
        return Section(value, f"{self.place}: {key}")


def dialect_of(directory: Path) -> Dialect:
    """The dialect of a model directory, by `model_type`.

    Raises:
        InputError: if it is neither.
    """
    return _dialect(Section(read_object(directory / "config.json"), str(directory / "config.json")))


def load_config(directory: Path | str) -> ModelConfig:
    """The configuration of a model directory of either dialect, from its JSON files.

    Drop path is a matter of the training run and not read.

    Raises:
        InputError: naming file and key, if something is missing, out of bounds or not supported.
    """
    directory = Path(directory)
    top = Section(read_object(directory / "config.json"), str(directory / "config.json"))
    for key in ("use_backbone_lora", "use_llm_lora"):
        top.require(key, 0, 0)
    top.require("downsample_ratio", 0.5, 0.5)
    top.require("pad2square", False, False)
    try:
        if _dialect(top) == "internvl_chat":
            return _from_internvl_chat(top, directory)
        return _from_transformers(top, directory)
    except InputError:
        raise
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # values of the wrong kind
        raise InputError(f"{top.place}: {error}") from None


def tied(directory: Path) -> bool:
    """Whether the output head of a checkpoint without one is its embedding table."""
    values = read_object(directory / "config.json")
    inner = values.get("llm_config") or values.get("text_config") or {}
    # transformers' own default for an InternVL configuration is true.
    default = values.get("model_type") == "internvl"
    return bool(values.get("tie_word_embeddings", inner.get("tie_word_embeddings", default)))


def vision_from(section: Section) -> VisionConfig:
    """InternViT from the vision part of either dialect, or from the config.json of a ViT alone."""
    transformers = section.get("model_type") == "internvl_vision" or "use_qk_norm" in section.values
    section.require("hidden_act", "gelu", "gelu")
    section.require("num_channels", 3, 3)
    if transformers:
        section.require("use_mean_pooling", True, True)
        section.require("use_mask_token", False, False)
        section.require("use_absolute_position_embeddings", True, True)
    norm = section.get("norm_type", "layer_norm" if transformers else "rms_norm")
    if norm not in ("layer_norm", "rms_norm"):
        raise InputError(f"{section.place}: norm_type is {norm!r}; layer_norm and rms_norm are supported")
    return VisionConfig(
        width=section.number("hidden_size"),
        num_layers=section.number("num_hidden_layers"),
        mlp_width=section.number("intermediate_size"),
        num_heads=section.number("num_attention_heads"),
        norm=norm,
        qkv_bias=bool(section.get("attention_bias" if transformers else "qkv_bias", False)),
        qk_norm=bool(section.get("use_qk_norm", False) if transformers else section.get("qk_normalization", True)),
        patch_size=section.number("patch_size", 14),
        image_size=section.number("image_size", 448),
        norm_eps=section.number("layer_norm_eps", 1e-6),
        layer_scale_init=section.number("layer_scale_init_value" if transformers else "initializer_factor", 0.1),
    )


def decoder_from(section: Section, family: Family) -> DecoderConfig:
    """A decoder from the language part of either dialect, or from the config.json of a language model alone."""
    section.require("hidden_act", "silu", "silu")
    section.require("use_sliding_window", False, False)
    section.require("bias", False, section.get("model_type") == "internlm2")  # its own default is true
    section.require("attention_bias", family == "qwen2", family == "qwen2")
    section.require("mlp_bias", False, False)
    width, num_heads = section.number("hidden_size"), section.number("num_attention_heads")
    theta, factor = _rope(section)
    return DecoderConfig(
        family=family,
        vocab_size=section.number("vocab_size"),
        width=width,
        num_layers=section.number("num_hidden_layers"),
        mlp_width=section.number("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=section.number("num_key_value_heads", num_heads),
        head_dim=section.number("head_dim", width // num_heads),
        rope_theta=theta,
        rope_dynamic_factor=factor,
        norm_eps=section.number("rms_norm_eps", 1e-6),
        qkv_bias=family == "qwen2",
        max_positions=section.number("max_position_embeddings", 32768),
    )


def family_of(section: Section) -> Family:
    """The family of a language model's configuration.

    Raises:
        InputError: if it is none that the decoder computes.
    """
    names, model_type = section.get("architectures", []), section.get("model_type")
    for architecture, family in ARCHITECTURES.items():
        if architecture in names or (not names and model_type == family):
            return family
    raise InputError(f"{section.place}: language model {names or model_type!r} is not one of {', '.join(ARCHITECTURES)}")


def token_id(directory: Path, token: str) -> int | None:
    """Id of an added token, from whichever tokenizer file tells it; None if none does."""
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        if not (directory / name).exists():
            continue
        values = read_object(directory / name)
        if name == "added_tokens.json":
            found = values
        elif name == "tokenizer.json":
            found = {row.get("content"): row.get("id") for row in values.get("added_tokens") or ()}
        else:
            found = {row.get("content"): int(key) for key, row in (values.get("added_tokens_decoder") or {}).items()}
        if isinstance(found.get(token), int):
            return found[token]
    return None


def _dialect(top: Section) -> Dialect:
    model_type = top.get("model_type")
    if model_type == "internvl_chat":
        return "internvl_chat"
    if model_type == "internvl":
        return "transformers"
    raise InputError(f"{top.place}: model_type is {model_type!r}; expected internvl_chat, or internvl of transformers")


def _rope(section: Section) -> tuple[float, float | None]:
    """Rotary base and dynamic factor, from the older keys (rope_theta, rope_scaling) or the newer (rope_parameters)."""
    scaling = Section(section.get("rope_parameters") or section.get("rope_scaling") or {}, section.place)
    theta = scaling.number("rope_theta", section.number("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind == "dynamic":
        return float(theta), float(scaling.number("factor"))
    raise InputError(f"{section.place}: rope scaling {kind!r} is not supported; default and dynamic are")


def _common(top: Section, directory: Path, vision: VisionConfig, decoder: DecoderConfig) -> ModelConfig:
    """What both dialects keep at the top or in other files of the directory."""
    text = top.section("llm_config" if "llm_config" in top.values else "text_config")
    path = directory / "generation_config.json"
    generation = Section(read_object(path) if path.exists() else {}, str(path))
    image_token = top.get("image_token_id", token_id(directory, IMAGE_TOKEN))
    if image_token is None:
        published = {("qwen2", 151674): 151667, ("internlm2", 92553): 92546}
        image_token = published.get((decoder.family, decoder.vocab_size))
    if not isinstance(image_token, int):
        raise InputError(
            f"{top.place}: the id of {IMAGE_TOKEN} is in neither config.json nor the tokenizer's files; copy those"
        )
    template = top.get("template", "internvl2_5")
    listed = generation.get("eos_token_id", top.get("eos_token_id", ()))
    eos: list[Any] = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    chat_end = token_id(directory, CHAT_END)
    if chat_end is not None and chat_end not in eos:
        eos.append(chat_end)  # A ChatML reply ends here, whatever the base model's list says.
    if not eos:
        eos = [text.get("eos_token_id")]
    if not all(isinstance(token, int) for token in eos):
        raise InputError(f"{path}: eos_token_id is {eos}, expected one id or a list of ids")
    # Qwen names a bos token that its tokenizer never writes.
    bos = top.get("bos_token_id", None if decoder.family == "qwen2" else text.get("bos_token_id"))
    return ModelConfig(
        vision=vision,
        decoder=decoder,
        tiling=_tiling(top, directory, vision.image_size),
        image_token_id=image_token,
        eos_token_ids=tuple(eos),
        pad_token_id=top.get("pad_token_id", generation.get("pad_token_id", text.get("pad_token_id"))),
        bos_token_id=bos,
        template=template,
        system_message=top.get("system_message"),
    )


def _tiling(top: Section, directory: Path, size: int) -> TilingConfig:
    if "max_dynamic_patch" in top.values:
        return TilingConfig(
            tile_size=size,
            min_tiles=top.number("min_dynamic_patch", 1),
            max_tiles=top.number("max_dynamic_patch"),
            thumbnail=bool(top.get("use_thumbnail", False)),
            dynamic=bool(top.get("dynamic_image_size", False)),
        )
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).exists():
            values = read_object(directory / name)
            image = Section(values.get("image_processor", values), str(directory / name))
            if "max_patches" in image.values:
                low, high = image.number("min_patches", 1), image.number("max_patches")
                return TilingConfig(tile_size=size, min_tiles=low, max_tiles=high)
    return TilingConfig(tile_size=size)


def _from_internvl_chat(top: Section, directory: Path) -> ModelConfig:
    vision = vision_from(top.section("vision_config"))
    if top.get("force_image_size") is not None:
        # The stored position table is that of the ViT's own size; interpolating it here would be a guess.
        top.require("force_image_size", vision.image_size, vision.image_size)
    text = top.section("llm_config")
    config = _common(top, directory, vision, decoder_from(text, family_of(text)))
    version = top.get("ps_version", "v1")
    if version not in ("v1", "v2"):
        raise InputError(f"{top.place}: ps_version is {version!r}, expected v1 or v2")
    return replace(config, pixel_shuffle=version, select_layer=top.get("select_layer", -1))


def _from_transformers(top: Section, directory: Path) -> ModelConfig:
    top.require("projector_hidden_act", "gelu", "gelu")
    top.require("vision_feature_select_strategy", "default", "default")
    text = top.section("text_config")
    family = family_of(text)
    if family == "llama":
        # InternLM2 is stored as LLaMA here; ours say so, and the published ones have its vocabulary.
        known = text.get("vocab_size") == 92553 and top.get("image_token_id") == 92546
        family = top.get("original_family", "internlm2" if known else "llama")
        if family not in ("llama", "internlm2"):
            raise InputError(f"{top.place}: original_family is {family!r}, expected llama or internlm2")
    config = _common(top, directory, vision_from(top.section("vision_config")), decoder_from(text, family))
    return replace(config, select_layer=top.get("vision_feature_layer", -1))
