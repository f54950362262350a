"""The table of config.json: fields of ModelConfig with their keys and limits in both dialects, and constants by model_type."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from ivl.checkpoint.sections import FLAG, REQUIRED, Section, Values
from ivl.config import Family

Dialect = Literal["internvl_chat", "transformers"]
"""internvl_chat is that of the original repository, transformers that of transformers' InternVLConfig."""

StoredDtype = Literal["keep", "bfloat16", "float16", "float32"]


class FieldKey(NamedTuple):
    """A field of a configuration of ours, its key in internvl_chat and in transformers, and the values that it may have."""

    field: str
    keys: tuple[str, str]
    kind: Values
    defaults: tuple[Any, Any] = (REQUIRED, REQUIRED)

    def read(self, section: Section, dialect: Dialect) -> Any:
        """Return the checked value in a section of a dialect."""
        column = int(dialect == "transformers")
        return section.read(self.keys[column], self.kind, self.defaults[column])

    def key(self, dialect: Dialect) -> str:
        """Return the key in a dialect."""
        return self.keys[int(dialect == "transformers")]


def _same(field: str, key: str, kind: Values, default: Any = REQUIRED) -> FieldKey:
    return FieldKey(field, (key, key), kind, (default, default))


# Larger values are nonsense or an attack, and refused before anything is built.
WIDTH, LAYERS, HEADS, TILES = Values(int, 1, 1 << 16), Values(int, 1, 1024), Values(int, 1, 1024), Values(int, 1, 1024)
EPSILON, ROTARY_BASE = Values(float, 1e-30, 1), Values(float, 1, 1e30)
VISION_KEYS = (
    _same("width", "hidden_size", WIDTH),
    _same("num_layers", "num_hidden_layers", LAYERS),
    _same("mlp_width", "intermediate_size", Values(int, 1, 1 << 20)),
    _same("num_heads", "num_attention_heads", HEADS),
    FieldKey("norm", ("norm_type", "norm_type"), Values(str, choices=("layer_norm", "rms_norm")), ("rms_norm", "layer_norm")),
    FieldKey("qkv_bias", ("qkv_bias", "attention_bias"), FLAG, (False, False)),
    FieldKey("qk_norm", ("qk_normalization", "use_qk_norm"), FLAG, (True, False)),
    _same("patch_size", "patch_size", Values(int, 1, 1 << 9), 14),
    _same("image_size", "image_size", Values(int, 1, 1 << 13), 448),
    _same("norm_eps", "layer_norm_eps", EPSILON, 1e-6),
    FieldKey("layer_scale_init", ("initializer_factor", "layer_scale_init_value"), Values(float, 1e-30), (0.1, 0.1)),
)
DECODER_KEYS = (
    _same("vocab_size", "vocab_size", Values(int, 1, 1 << 22)),
    _same("width", "hidden_size", WIDTH),
    _same("num_layers", "num_hidden_layers", LAYERS),
    _same("mlp_width", "intermediate_size", Values(int, 1, 1 << 20)),
    _same("num_heads", "num_attention_heads", HEADS),
    _same("num_kv_heads", "num_key_value_heads", HEADS),
    _same("head_dim", "head_dim", Values(int, 1, 1 << 12)),
    _same("norm_eps", "rms_norm_eps", EPSILON, 1e-6),
    _same("max_positions", "max_position_embeddings", Values(int, 1, 1 << 30), 32768),
)
TILING_KEYS = (
    _same("dynamic", "dynamic_image_size", FLAG, False),
    _same("thumbnail", "use_thumbnail", FLAG, False),
    _same("min_tiles", "min_dynamic_patch", TILES, 1),
    _same("max_tiles", "max_dynamic_patch", TILES),
)
TEXT_CONFIG: dict[Dialect, str] = {"internvl_chat": "llm_config", "transformers": "text_config"}
SELECT_LAYER: dict[Dialect, str] = {"internvl_chat": "select_layer", "transformers": "vision_feature_layer"}
DTYPE: dict[Dialect, str] = {"internvl_chat": "torch_dtype", "transformers": "dtype"}
MODEL_TYPE: dict[Dialect, str] = {"internvl_chat": "internvl_chat", "transformers": "internvl"}
VISION_TYPE: dict[Dialect, str] = {"internvl_chat": "intern_vit_6b", "transformers": "internvl_vision"}

CONSTANTS: dict[str, dict[str, Any]] = {
    "internvl_chat": {
        "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5, "pad2square": False, "use_backbone_lora": 0,
        "use_llm_lora": 0,
    },
    "internvl": {
        "architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5, "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
    },
    "intern_vit_6b": {
        "architectures": ["InternVisionModel"], "hidden_act": "gelu", "num_channels": 3, "initializer_range": 0.02,
        "dropout": 0.0, "attention_dropout": 0.0, "drop_path_rate": 0.0, "use_flash_attn": False,
    },
    "internvl_vision": {
        "architectures": ["InternVLVisionModel"], "hidden_act": "gelu", "num_channels": 3, "initializer_range": 0.02,
        "hidden_dropout_prob": 0.0, "attention_dropout": 0.0, "projection_dropout": 0.0, "use_mean_pooling": True,
        "use_mask_token": False, "use_absolute_position_embeddings": True,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_dropout": 0.0, "attention_bias": False,
        "mlp_bias": False, "pretraining_tp": 1,
    },
    "internlm2": {
        "architectures": ["InternLM2ForCausalLM"], "hidden_act": "silu", "bias": False, "attn_implementation": "eager",
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "attention_dropout": 0.0, "attention_bias": False,
        "use_sliding_window": False,
    },
    "internlm3": {
        "architectures": ["InternLM3ForCausalLM"], "hidden_act": "silu", "attention_dropout": 0.0, "bias": False,
        "qkv_bias": False,
    },
}  # fmt: skip
"""What is written by `model_type` whatever the configuration. On reading, keys that change the computation are checked."""
CHECKED = {
    "downsample_ratio", "pad2square", "projector_hidden_act", "num_channels", "bias", "force_image_size",
    "vision_feature_select_strategy", "hidden_act", "use_mean_pooling", "use_mask_token",
    "use_absolute_position_embeddings", "use_sliding_window", "attention_bias", "mlp_bias", "qkv_bias",
}  # fmt: skip
FLASH_KEYS = ("flash_mode", "flash_relative_threshold", "flash_absolute_threshold")
"""Top-level keys of InternVL3.5-Flash."""
FAMILIES: tuple[Family, ...] = ("qwen2", "internlm2", "llama", "qwen3", "internlm3")
ARCHITECTURES: dict[str, Family] = {CONSTANTS[family]["architectures"][0]: family for family in FAMILIES}
CODE_REPOS: dict[Family, str] = {
    "qwen2": "OpenGVLab/InternVL2_5-1B", "internlm2": "OpenGVLab/InternVL2_5-8B", "llama": "OpenGVLab/InternVL2_5-8B",
    "qwen3": "OpenGVLab/InternVL3_5-1B", "internlm3": "OpenGVLab/InternVL3-9B",
}  # fmt: skip
"""Where the original library's classes live. Written for that library, which asks its user first; never followed here."""
