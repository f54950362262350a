"""The published models: InternVL2.5, InternVL3 (arXiv:2504.10479) and the dense models of InternVL3.5 (arXiv:2508.18265).

Later releases keep the ViT, the projector and the processing of InternVL2.5. A model is named by its size, with the release
before it unless that is 2.5: `8B`, `3-8B`, `3.5-8B`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ivl.config import INTERNVIT_6B, ModelConfig, published_config


class PublishedModel(NamedTuple):
    """A published model."""

    hub_id: str
    """Repository of the final model."""
    versions: tuple[str, ...]
    """What the ids of all its repositories have behind that, the final model's first."""
    language: str
    """The language model that it was trained from."""
    config: ModelConfig


_QWEN2_5, _INTERNLM2_5 = published_config("1B"), published_config("2B")
_INTERNLM3 = replace(_INTERNLM2_5.decoder, family="internlm3", vocab_size=128512, rope_theta=5e7, rope_dynamic_factor=6.0)
_QWEN3 = replace(_QWEN2_5.decoder, family="qwen3", vocab_size=151936, qkv_bias=False, qk_norm=True, max_positions=40960)
_BASES = {
    "Qwen2.5": replace(
        _QWEN2_5, eos_token_ids=(151643, 151645), decoder=replace(_QWEN2_5.decoder, rope_dynamic_factor=2.0)
    ),
    # How many rows its image tokens add is not known: the last row of InternLM3 stands for the placeholder.
    "InternLM3": replace(_INTERNLM2_5, image_token_id=128511, eos_token_ids=(2,), decoder=_INTERNLM3),
    "Qwen3": replace(_QWEN2_5, image_token_id=151671, system_message="", decoder=_QWEN3),
}  # fmt: skip
"""What models with a language model share; the dimensions are those of 2.5's 1B or 2B."""
_FIRST = {
    "1B": "Qwen2.5-0.5B-Instruct", "2B": "internlm2_5-1_8b-chat", "4B": "Qwen2.5-3B-Instruct", "8B": "internlm2_5-7b-chat",
    "26B": "internlm2_5-20b-chat", "38B": "Qwen2.5-32B-Instruct", "78B": "Qwen2.5-72B-Instruct",
}  # fmt: skip
_LATER = {
    "3-1B": ("Qwen2.5-0.5B", 896, 24, 4864, 14, 2),
    "3-2B": ("Qwen2.5-1.5B", 1536, 28, 8960, 12, 2),
    "3-8B": ("Qwen2.5-7B", 3584, 28, 18944, 28, 4),
    "3-9B": ("InternLM3-8B", 4096, 48, 10240, 32, 2),
    "3-14B": ("Qwen2.5-14B", 5120, 48, 13824, 40, 8),
    "3-38B": ("Qwen2.5-32B", 5120, 64, 27648, 40, 8),
    "3-78B": ("Qwen2.5-72B", 8192, 80, 29568, 64, 8),
    "3.5-1B": ("Qwen3-0.6B", 1024, 28, 3072, 16, 8),
    "3.5-2B": ("Qwen3-1.7B", 2048, 28, 6144, 16, 8),
    "3.5-4B": ("Qwen3-4B", 2560, 36, 9728, 32, 8),
    "3.5-8B": ("Qwen3-8B", 4096, 36, 12288, 32, 8),
    "3.5-14B": ("Qwen3-14B", 5120, 40, 17408, 40, 8),
    "3.5-38B": ("Qwen3-32B", 5120, 64, 25600, 64, 8),
}
"""Language model; width, layers, MLP width, heads, key/value heads."""
_VERSIONS = {"3": ("", "-Instruct", "-Pretrained", "-hf"), "3.5": ("", "-MPO", "-Instruct", "-Pretrained", "-HF")}


def _later(key: str) -> PublishedModel:
    release, size = key.split("-")
    language, width, num_layers, mlp_width, num_heads, num_kv_heads = _LATER[key]
    base = _BASES[language.split("-")[0]]
    decoder = replace(
        base.decoder, width=width, num_layers=num_layers, mlp_width=mlp_width, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=64 if language == "Qwen2.5-0.5B" else 128,
    )  # fmt: skip
    config = replace(base, decoder=decoder, vision=INTERNVIT_6B if size in ("38B", "78B") else base.vision)
    return PublishedModel(f"OpenGVLab/InternVL{release.replace('.', '_')}-{size}", _VERSIONS[release], language, config)


MODELS = {
    size: PublishedModel(f"OpenGVLab/InternVL2_5-{size}", ("", "-MPO"), language, published_config(size))
    for size, language in _FIRST.items()
} | {key: _later(key) for key in _LATER}


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of vision, projector, language model and all of them, without building a model."""
    v, d = config.vision, config.decoder
    v_norm = v.width * (2 if v.norm == "layer_norm" else 1)
    v_attention = 4 * v.width**2 + v.width * (1 + 3 * v.qkv_bias + 2 * v.qk_norm)
    v_layer = v_attention + 2 * v.width * v.mlp_width + v.mlp_width + v.width + 2 * v_norm + 2 * v.width
    vision = v.width * (2 + v.grid**2 + 3 * v.patch_size**2 + 1) + v.num_layers * v_layer
    shuffled = 4 * v.width
    projector = 2 * shuffled + (shuffled + 1) * d.width + (d.width + 1) * d.width
    q_rows, kv_rows = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    d_attention = (d.width + d.qkv_bias) * (q_rows + 2 * kv_rows) + q_rows * d.width + 2 * d.head_dim * d.qk_norm
    d_layer = d_attention + 3 * d.width * d.mlp_width + 2 * d.width
    language = 2 * d.vocab_size * d.width + d.width + d.num_layers * d_layer
    return {"vision": vision, "projector": projector, "language": language, "all": vision + projector + language}
