"""ModelConfig to `config.json` of both dialects (spec 1.1, 1.3, 1.4, 1.6).

Keys that only one dialect has (tiling, template, the language model's original family) are written to both, so that nothing
is lost on the way and back.
"""

from __future__ import annotations

from typing import Any

from ivl.checkpoint.config_json import ARCHITECTURES, Dialect
from ivl.config import ModelConfig
from ivl.errors import InputError

_CODE_REPOS = {
    "qwen2": "OpenGVLab/InternVL2_5-1B",
    "internlm2": "OpenGVLab/InternVL2_5-8B",
    "llama": "OpenGVLab/InternVL2_5-8B",
}
"""Where the original library's classes live. Written for that library, which asks its user first; never followed here."""


def to_json(config: ModelConfig, dialect: Dialect, dtype: str) -> dict[str, Any]:
    """`config.json` for a configuration; dtype is torch's name without `torch.`, such as bfloat16.

    Raises:
        InputError: if the dialect cannot express the configuration.
    """
    if config.decoder.qkv_bias != (config.decoder.family == "qwen2"):
        raise InputError(f"family {config.decoder.family} with qkv_bias {config.decoder.qkv_bias} has no checkpoint format")
    if dialect == "internvl_chat":
        return _to_internvl_chat(config, dtype)
    return _to_transformers(config, dtype)


def generation_json(config: ModelConfig) -> dict[str, Any]:
    """`generation_config.json`: where generation ends."""
    values = {"eos_token_id": _eos(config), **_special_ids(config)}
    return {key: value for key, value in values.items() if value is not None}


def _eos(config: ModelConfig) -> int | list[int]:
    first, *rest = config.eos_token_ids
    return [first, *rest] if rest else first


def _special_ids(config: ModelConfig) -> dict[str, Any]:
    return {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}


def _outer(config: ModelConfig) -> dict[str, Any]:
    """Keys that mean the same in both dialects."""
    values = {
        "template": config.template,
        "downsample_ratio": 0.5,
        "dynamic_image_size": config.tiling.dynamic,
        "use_thumbnail": config.tiling.thumbnail,
        "min_dynamic_patch": config.tiling.min_tiles,
        "max_dynamic_patch": config.tiling.max_tiles,
        "image_token_id": config.image_token_id,
        "eos_token_id": _eos(config),
        **_special_ids(config),
        "tie_word_embeddings": False,
    }
    if config.system_message is not None:
        values["system_message"] = config.system_message
    return values


def _decoder_json(config: ModelConfig, model_type: str, architecture: str, dtype: dict[str, str]) -> dict[str, Any]:
    decoder = config.decoder
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.num_layers,
        "intermediate_size": decoder.mlp_width,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": decoder.max_positions,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        "eos_token_id": config.eos_token_ids[-1],
        **_special_ids(config),
        **dtype,
    }
    if decoder.rope_dynamic_factor is not None:
        # Both spellings of the same key would be refused by older libraries, so each model type gets the one it knows.
        key = "type" if model_type == "internlm2" else "rope_type"
        values["rope_scaling"] = {key: "dynamic", "factor": decoder.rope_dynamic_factor}
    if model_type == "qwen2":
        values |= {"attention_dropout": 0.0, "use_sliding_window": False}
    elif model_type == "llama":
        values |= {"attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    else:
        values |= {"bias": False, "attn_implementation": "eager"}
    return values


def _to_internvl_chat(config: ModelConfig, dtype: str) -> dict[str, Any]:
    vision, family = config.vision, config.decoder.family
    architecture = {value: key for key, value in ARCHITECTURES.items()}[family]
    code = _CODE_REPOS[family]
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {
            "AutoConfig": f"{code}--configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": f"{code}--modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": f"{code}--modeling_internvl_chat.InternVLChatModel",
        },
        "select_layer": config.select_layer,
        "ps_version": config.pixel_shuffle,
        "force_image_size": vision.image_size,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "hidden_size": config.decoder.width,
        "torch_dtype": dtype,
        **_outer(config),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": vision.width,
            "num_hidden_layers": vision.num_layers,
            "intermediate_size": vision.mlp_width,
            "num_attention_heads": vision.num_heads,
            "norm_type": vision.norm,
            "qkv_bias": vision.qkv_bias,
            "qk_normalization": vision.qk_norm,
            "num_channels": 3,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "hidden_act": "gelu",
            "layer_norm_eps": vision.norm_eps,
            "initializer_factor": vision.layer_scale_init,
            "initializer_range": 0.02,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "use_flash_attn": False,
            "torch_dtype": dtype,
        },
        "llm_config": _decoder_json(config, family, architecture, {"torch_dtype": dtype}),
    }


def _to_transformers(config: ModelConfig, dtype: str) -> dict[str, Any]:
    if config.pixel_shuffle != "v2":
        raise InputError(f"pixel_shuffle {config.pixel_shuffle} cannot be written for transformers, which computes v2 only")
    vision, family = config.vision, config.decoder.family
    model_type, architecture = ("qwen2", "Qwen2ForCausalLM") if family == "qwen2" else ("llama", "LlamaForCausalLM")
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_seq_length": config.tokens_per_tile,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "original_family": family,
        "dtype": dtype,
        **_outer(config),
        "vision_config": {
            "architectures": ["InternVLVisionModel"],
            "model_type": "internvl_vision",
            "hidden_size": vision.width,
            "num_hidden_layers": vision.num_layers,
            "intermediate_size": vision.mlp_width,
            "num_attention_heads": vision.num_heads,
            "norm_type": vision.norm,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_norm,
            "num_channels": 3,
            "patch_size": [vision.patch_size, vision.patch_size],
            "image_size": [vision.image_size, vision.image_size],
            "hidden_act": "gelu",
            "layer_norm_eps": vision.norm_eps,
            "layer_scale_init_value": vision.layer_scale_init,
            "initializer_range": 0.02,
            "hidden_dropout_prob": 0.0,
            "attention_dropout": 0.0,
            "projection_dropout": 0.0,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "dtype": dtype,
        },
        "text_config": _decoder_json(config, model_type, architecture, {"dtype": dtype}),
    }
