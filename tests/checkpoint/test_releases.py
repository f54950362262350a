"""InternVL3 and InternVL3.5: directories as their repositories have them, and what is refused by name."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ivl.checkpoint import load_config, load_model, save_model
from ivl.checkpoint.config_json import to_json
from ivl.checkpoint.config_table import Dialect
from ivl.checkpoint.releases import MODELS
from ivl.config import INTERNVIT_300M, TilingConfig
from ivl.errors import InputError
from ivl.processing.image import num_tiles
from ivl.utils.files import write_json
from tests.checkpoint.test_checkpoint import DIALECTS
from tests.helpers.checkpoints import random_model, remove_head, same_weights, tiny_like

CHAT = {
    "architectures": ["InternVLChatModel"], "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
    "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": 448, "max_dynamic_patch": 12,
    "min_dynamic_patch": 1, "model_type": "internvl_chat", "pad2square": False, "ps_version": "v2", "select_layer": -1,
    "system_message": None, "template": "internvl2_5", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_backbone_lora": 0, "use_llm_lora": 0, "use_thumbnail": True,
    "vision_config": {
        "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "drop_path_rate": 0.1, "dropout": 0.0,
        "hidden_act": "gelu", "hidden_size": 1024, "image_size": 448, "initializer_factor": 0.1, "initializer_range": 0.02,
        "intermediate_size": 4096, "layer_norm_eps": 1e-06, "model_type": "intern_vit_6b", "norm_type": "layer_norm",
        "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14, "qk_normalization": False,
        "qkv_bias": True, "use_flash_attn": True,
    },
}  # fmt: skip
"""config.json of the original dialect, but for the language model."""
LANGUAGE = {
    "3-1B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 70, "model_type": "qwen2", "moe_config": None, "num_attention_heads": 14, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151674,
    },
    "3.5-8B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
        "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "3-9B": {
        "architectures": ["InternLM3ForCausalLM"], "attention_dropout": 0.0, "bias": False, "bos_token_id": 1,
        "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10240,
        "max_position_embeddings": 32768, "model_type": "internlm3", "num_attention_heads": 32, "num_hidden_layers": 48,
        "num_key_value_heads": 2, "pad_token_id": 2, "qkv_bias": False, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "rope_theta": 50000000, "vocab_size": 128512,
    },
}  # fmt: skip
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n    {{- '<|im_start|>system\\nYou\\'re \"Q\".\\nBe kind.<|im_end|>\\n' }}\n{%- endif %}\n"
)
NO_SYSTEM = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}{{ message['content'] }}{{'<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_directory(where: Path, name: str, **changes: Any) -> Path:
    """The JSON files of a repository in the original dialect."""
    config = CHAT | {"llm_config": LANGUAGE[name]} | changes
    write_json(where / "config.json", config)
    image_token = MODELS[name].config.image_token_id
    write_json(where / "added_tokens.json", {"<IMG_CONTEXT>": image_token} | ({"<|im_end|>": 151645} if name != "3-9B" else {}))
    return where


@pytest.mark.parametrize("name", LANGUAGE)
def test_original_directories_parse_at_full_size(name: str, tmp_path: Path) -> None:
    config, expected = load_config(chat_directory(tmp_path, name)), MODELS[name].config
    assert config.vision == INTERNVIT_300M and config.decoder == expected.decoder
    assert replace(config, eos_token_ids=(), bos_token_id=None, pad_token_id=None) == replace(
        expected, eos_token_ids=(), bos_token_id=None, pad_token_id=None
    )
    assert set(config.eos_token_ids) >= {151645} if name != "3-9B" else config.eos_token_ids == (2,)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_tied_head_is_read_from_the_embeddings(dialect: Dialect, tmp_path: Path) -> None:
    model = random_model(tiny_like("3.5-1B"))
    model.decoder.head.weight.data = model.decoder.embeddings.weight.data.clone()
    save_model(model, tmp_path, dialect=dialect)
    remove_head(tmp_path)
    write_json(tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True})
    assert same_weights(model, load_model(tmp_path))


def test_a_head_size_that_is_not_written_is_that_of_the_class(tmp_path: Path) -> None:
    language = LANGUAGE["3.5-8B"] | {"hidden_size": 2560}
    del language["head_dim"]
    assert load_config(chat_directory(tmp_path, "3.5-8B", llm_config=language)).decoder.head_dim == 128  # 2560 / 32 would be 80


# -- templates and system messages


def test_system_messages_of_original_directories(tmp_path: Path) -> None:
    """InternVL3 keeps the template's; 3.5 has none but what config.json or its own chat template says."""
    assert load_config(chat_directory(tmp_path, "3-1B")).system_message is None
    (tmp_path / "chat_template.jinja").write_text(QWEN)  # the language model's; the original library does not use it either
    assert load_config(tmp_path).system_message is None
    assert load_config(chat_directory(tmp_path, "3.5-8B")).system_message == 'You\'re "Q".\nBe kind.'
    (tmp_path / "chat_template.jinja").write_text(NO_SYSTEM)
    assert load_config(tmp_path).system_message == ""
    (tmp_path / "chat_template.jinja").unlink()
    assert load_config(tmp_path).system_message == ""
    assert load_config(chat_directory(tmp_path, "3.5-8B", system_message="Be brief.")).system_message == "Be brief."


@pytest.mark.parametrize("name", ["3-1B", "3.5-1B"])
def test_system_messages_of_transformers_directories(name: str, tmp_path: Path) -> None:
    config = to_json(MODELS[name].config, "transformers", "bfloat16")
    for key in ("template", "system_message", "max_dynamic_patch", "use_thumbnail", "dynamic_image_size", "min_dynamic_patch"):
        config.pop(key, None)
    write_json(tmp_path / "config.json", config)
    assert load_config(tmp_path).system_message == (None if name == "3-1B" else "")
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": [{"name": "default", "template": QWEN}]})
    assert load_config(tmp_path).system_message == 'You\'re "Q".\nBe kind.'
    write_json(tmp_path / "chat_template.json", {"chat_template": NO_SYSTEM})  # the processor's counts more
    assert load_config(tmp_path).system_message == ""
    (tmp_path / "chat_template.jinja").write_text("{% set default_system = 'Mine.' %}" + NO_SYSTEM)
    assert load_config(tmp_path).system_message == "Mine."
    # -hf releases say that pictures are not cut. InternVL cuts them, and so does ivl.
    pixels = {
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 12,
        "image_processor_type": "GotOcr2ImageProcessorFast",
    }
    write_json(tmp_path / "preprocessor_config.json", pixels)
    tiling = load_config(tmp_path).tiling
    assert tiling == TilingConfig() and num_tiles(800, 600, tiling) == 13


def test_a_model_without_a_system_message_of_its_own_is_written_as_it_renders(tmp_path: Path) -> None:
    config = replace(MODELS["3.5-1B"].config, system_message=None)  # internvl2_5 with its message, as a composed model has it
    write_json(tmp_path / "config.json", to_json(config, "internvl_chat", "bfloat16"))
    message = load_config(tmp_path).system_message
    assert message is not None and message.startswith("你是书生·万象")


def test_templates_of_strangers_take_no_time_and_are_named(tmp_path: Path) -> None:
    """Texts that make a careless pattern try every pair of places."""
    chat_directory(tmp_path, "3.5-8B")
    for text in ("set system", "<|im_start|>system\\n", "set system = '", "set ", "system", "'+"):
        (tmp_path / "chat_template.jinja").write_text("{% set " + text * (200_000 // len(text)))
        start = time.process_time()
        load_config(tmp_path)
        assert time.process_time() - start < 5
    (tmp_path / "chat_template.jinja").write_text("x" * 300_000)
    with pytest.raises(InputError, match="chat template has more than 262,144 characters"):
        load_config(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path)


# -- refused by name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm_config": {"architectures": ["Qwen3MoeForCausalLM"]}}, r"Qwen3MoeForCausalLM.* \(a mixture of experts\)"),
        ({"llm_config": {"model_type": "qwen3_moe"}}, r"'qwen3_moe' \(a mixture of experts\)"),
        ({"llm_config": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3_moe"}}, "model_type tells of a mixture"),
        ({"llm_config": {"architectures": ["Qwen2ForCausalLM"], "num_experts": 64}}, "num_experts tells of a mixture"),
        ({"llm_config": {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}}, r"GptOssForCausalLM.* \(gpt-oss\)"),
        ({"flash_mode": True}, "flash_mode is set: InternVL3.5-Flash is not supported"),
        ({"flash_mode": "x", "flash_relative_threshold": 0.5}, "flash_mode is set: InternVL3.5-Flash"),
        ({"flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.7}, "flash_relative_threshold is set: InternVL3.5"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else str(next(iter(value.values())))[:20],
)  # fmt: skip
def test_experts_gpt_oss_and_flash_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_config(chat_directory(tmp_path, "3.5-8B", **changes))


def test_flash_that_is_switched_off_is_no_flash(tmp_path: Path) -> None:
    assert load_config(chat_directory(tmp_path, "3.5-8B", flash_mode=False, flash_relative_threshold=0.5)).decoder.qk_norm


@pytest.mark.parametrize(
    ("name", "key"), [("3.5-8B", "attention_bias"), ("3-9B", "qkv_bias"), ("3-9B", "bias"), ("3.5-8B", "use_sliding_window")]
)
def test_flags_that_the_decoder_does_not_compute_are_refused(name: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{key} is True; only False is supported"):
        load_config(chat_directory(tmp_path, name, llm_config=LANGUAGE[name] | {key: True}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e6}}}, "'full_attention' has a rotary base of its own"),
        ({"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; only 1.0"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25; only 1.0"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types has 'linear_attention'; only full attention"),
    ],
)
def test_what_turns_or_attends_otherwise_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_config(chat_directory(tmp_path, "3.5-8B", llm_config=LANGUAGE["3.5-8B"] | changes))


def test_keys_that_change_nothing_are_taken(tmp_path: Path) -> None:
    changes = {"layer_types": ["full_attention"] * 36, "partial_rotary_factor": 1.0, "rope_parameters": {"rope_theta": 5e6}}
    config = load_config(chat_directory(tmp_path, "3.5-8B", llm_config=LANGUAGE["3.5-8B"] | changes, max_dynamic_patch=None))
    assert config.decoder.rope_theta == 5e6 and config.tiling == TilingConfig()
