"""A written directory has every name that the loaders of vLLM and LMDeploy ask for (docs/hand_over.md), and none besides.

The lists are what their sources read in November 2026: vLLM's InternVLChatModel and InternS1ForConditionalGeneration (which
it takes for InternVLForConditionalGeneration), LMDeploy's models of the same names. Both stop at a name they do not know.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import models

from ivl.checkpoint import load_config, save_model, save_processor
from ivl.checkpoint.config_json import to_json
from ivl.checkpoint.config_table import Dialect
from ivl.checkpoint.convert import convert
from ivl.checkpoint.vocabulary import load_tokenizer, save_tokenizer
from ivl.config import ModelConfig, published_config
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import CHATML_TOKENS, Tokenizer, byte_letters, byte_level, train_tokenizer
from tests.helpers.checkpoints import random_model, sentencepiece_model, tiny_like

CHAT_KEYS = {
    "architectures", "auto_map", "downsample_ratio", "dynamic_image_size", "force_image_size", "llm_config",
    "max_dynamic_patch", "min_dynamic_patch", "model_type", "ps_version", "select_layer", "template", "use_thumbnail",
    "vision_config",
}  # fmt: skip
CHAT_VISION_KEYS = {
    "hidden_act", "hidden_size", "image_size", "initializer_factor", "intermediate_size", "layer_norm_eps", "norm_type",
    "num_attention_heads", "num_hidden_layers", "patch_size", "qk_normalization", "qkv_bias",
}  # fmt: skip
HF_KEYS = {
    "architectures", "downsample_ratio", "image_token_id", "model_type", "projector_hidden_act", "text_config",
    "vision_config", "vision_feature_layer", "vision_feature_select_strategy",
}  # fmt: skip
HF_VISION_KEYS = {
    "attention_bias", "hidden_act", "hidden_size", "image_size", "intermediate_size", "layer_norm_eps",
    "layer_scale_init_value", "norm_type", "num_attention_heads", "num_channels", "num_hidden_layers", "patch_size",
    "use_absolute_position_embeddings", "use_mask_token", "use_mean_pooling", "use_qk_norm",
}  # fmt: skip
LANGUAGE_KEYS = {
    "architectures", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "vocab_size",
}  # fmt: skip
FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
    "processor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "video_preprocessor_config.json",
}  # fmt: skip


def both(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def chat_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the internvl_chat dialect."""
    v, d = config.vision, config.decoder
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, v.width),
        "vision_model.embeddings.position_embedding": (1, v.grid**2 + 1, v.width),
        "vision_model.embeddings.patch_embedding.weight": (v.width, 3, v.patch_size, v.patch_size),
        "vision_model.embeddings.patch_embedding.bias": (v.width,),
        "mlp1.0.weight": (4 * v.width,), "mlp1.0.bias": (4 * v.width,),
        "mlp1.1.weight": (d.width, 4 * v.width), "mlp1.1.bias": (d.width,),
        "mlp1.3.weight": (d.width, d.width), "mlp1.3.bias": (d.width,),
    }  # fmt: skip
    for n in range(v.num_layers):
        block = f"vision_model.encoder.layers.{n}"
        shapes |= {f"{block}.attn.qkv.weight": (3 * v.width, v.width), f"{block}.attn.proj.weight": (v.width, v.width)}
        shapes |= {f"{block}.attn.proj.bias": (v.width,), f"{block}.ls1": (v.width,), f"{block}.ls2": (v.width,)}
        shapes |= {f"{block}.mlp.fc1.weight": (v.mlp_width, v.width), f"{block}.mlp.fc1.bias": (v.mlp_width,)}
        shapes |= {f"{block}.mlp.fc2.weight": (v.width, v.mlp_width), f"{block}.mlp.fc2.bias": (v.width,)}
        if v.qkv_bias:
            shapes[f"{block}.attn.qkv.bias"] = (3 * v.width,)
        norms = [f"{block}.norm1", f"{block}.norm2"]
        shapes |= {name: (v.width,) for norm in norms for name in both(norm)[: 2 if v.norm == "layer_norm" else 1]}
        if v.qk_norm:
            shapes |= {f"{block}.attn.{x}_norm.weight": (v.width,) for x in "qk"}
    q, kv = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    body = "language_model.model"
    if d.family != "internlm2":
        language = llama_shapes(config)
        return shapes | {f"language_model.{name}": shape for name, shape in language.items()}
    shapes |= {
        f"{body}.tok_embeddings.weight": (d.vocab_size, d.width),
        "language_model.output.weight": (d.vocab_size, d.width),
    }
    shapes[f"{body}.norm.weight"] = (d.width,)
    for n in range(d.num_layers):
        block = f"{body}.layers.{n}"
        shapes |= {f"{block}.attention.wqkv.weight": (q + 2 * kv, d.width), f"{block}.attention.wo.weight": (d.width, q)}
        shapes |= {f"{block}.feed_forward.{x}.weight": (d.mlp_width, d.width) for x in ("w1", "w3")}
        shapes[f"{block}.feed_forward.w2.weight"] = (d.width, d.mlp_width)
        shapes |= {f"{block}.{x}.weight": (d.width,) for x in ("attention_norm", "ffn_norm")}
    return shapes


def llama_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a language model with the names that Qwen2 and LLaMA share."""
    d = config.decoder
    rows = {"q_proj": d.num_heads * d.head_dim, "k_proj": d.num_kv_heads * d.head_dim, "v_proj": d.num_kv_heads * d.head_dim}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (d.vocab_size, d.width),
        "model.norm.weight": (d.width,),
        "lm_head.weight": (d.vocab_size, d.width),
    }
    for n in range(d.num_layers):
        block = f"model.layers.{n}"
        for name, count in rows.items():
            shapes[f"{block}.self_attn.{name}.weight"] = (count, d.width)
            if d.qkv_bias:
                shapes[f"{block}.self_attn.{name}.bias"] = (count,)
        if d.qk_norm:
            shapes |= {f"{block}.self_attn.{x}_norm.weight": (d.head_dim,) for x in "qk"}
        shapes[f"{block}.self_attn.o_proj.weight"] = (d.width, rows["q_proj"])
        shapes |= {f"{block}.mlp.{x}.weight": (d.mlp_width, d.width) for x in ("gate_proj", "up_proj")}
        shapes[f"{block}.mlp.down_proj.weight"] = (d.width, d.mlp_width)
        shapes |= {f"{block}.{x}.weight": (d.width,) for x in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the transformers dialect."""
    v, d = config.vision, config.decoder
    tower, mlp = "model.vision_tower", "model.multi_modal_projector"
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}.embeddings.cls_token": (1, 1, v.width),
        f"{tower}.embeddings.position_embeddings": (1, v.grid**2 + 1, v.width),
        f"{tower}.embeddings.patch_embeddings.projection.weight": (v.width, 3, v.patch_size, v.patch_size),
        f"{tower}.embeddings.patch_embeddings.projection.bias": (v.width,),
        f"{mlp}.layer_norm.weight": (4 * v.width,), f"{mlp}.layer_norm.bias": (4 * v.width,),
        f"{mlp}.linear_1.weight": (d.width, 4 * v.width), f"{mlp}.linear_1.bias": (d.width,),
        f"{mlp}.linear_2.weight": (d.width, d.width), f"{mlp}.linear_2.bias": (d.width,),
    }  # fmt: skip
    for n in range(v.num_layers):
        block = f"{tower}.encoder.layer.{n}"
        for name in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            shapes[f"{block}.attention.{name}.weight"] = (v.width, v.width)
            if v.qkv_bias or name == "projection_layer":
                shapes[f"{block}.attention.{name}.bias"] = (v.width,)
        shapes |= {f"{block}.lambda_1": (v.width,), f"{block}.lambda_2": (v.width,)}
        shapes |= {f"{block}.mlp.fc1.weight": (v.mlp_width, v.width), f"{block}.mlp.fc1.bias": (v.mlp_width,)}
        shapes |= {f"{block}.mlp.fc2.weight": (v.width, v.mlp_width), f"{block}.mlp.fc2.bias": (v.width,)}
        norms = [f"{block}.layernorm_before", f"{block}.layernorm_after"]
        shapes |= {name: (v.width,) for norm in norms for name in both(norm)[: 2 if v.norm == "layer_norm" else 1]}
        if v.qk_norm:
            shapes |= {f"{block}.attention.{x}_norm.weight": (v.width,) for x in "qk"}
    language = llama_shapes(config)
    prefix = "model.language_model."
    return shapes | {
        name if name == "lm_head.weight" else prefix + name.removeprefix("model."): shape for name, shape in language.items()
    }


def written(directory: Path, size: str, dialect) -> ModelConfig:
    tokenizer = train_tokenizer(["what is this", "a red circle"] * 5, 300)
    config = tiny_like(size)
    config = replace(
        config,
        decoder=replace(config.decoder, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        eos_token_ids=(tokenizer.id("<|im_end|>"),),
        bos_token_id=None,
        pad_token_id=None,
    )
    save_model(random_model(config), directory, dialect=dialect)
    save_processor(Processor(config, tokenizer), directory)
    return config


def stored(directory: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("size", ["1B", "8B", "26B", "38B", "3.5-8B"])  # all language families of names, both ViTs
@pytest.mark.parametrize("dialect", ["internvl_chat", "transformers"])
def test_every_name_and_shape_is_there(tmp_path: Path, size: str, dialect: str) -> None:
    config = written(tmp_path, size, dialect)
    assert stored(tmp_path) == (chat_shapes(config) if dialect == "internvl_chat" else hf_shapes(config))
    read = json.loads((tmp_path / "config.json").read_text())
    keys, vision, language = (CHAT_KEYS, CHAT_VISION_KEYS, "llm_config")
    if dialect == "transformers":
        keys, vision, language = (HF_KEYS, HF_VISION_KEYS, "text_config")
    assert keys <= read.keys() and vision <= read["vision_config"].keys()
    assert read[language].keys() >= LANGUAGE_KEYS
    assert {path.name for path in tmp_path.iterdir()} == FILES
    if dialect == "transformers":
        assert read["architectures"] == ["InternVLForConditionalGeneration"] and "auto_map" not in read
        assert read["vision_config"]["image_size"] == [28, 28] and read["vision_config"]["patch_size"] == [7, 7]
        assert (read["vision_feature_layer"], read["vision_feature_select_strategy"]) == (-1, "default")
        assert read["vision_config"]["use_mean_pooling"]  # or both would add a last norm
    else:
        assert read["architectures"] == ["InternVLChatModel"] and read["select_layer"] == -1


def test_the_processor_files_name_what_they_ask(tmp_path: Path) -> None:
    written(tmp_path, "1B", "transformers")
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "GotOcr2ImageProcessorFast"  # vLLM takes no other
    assert (images["crop_to_patches"], images["min_patches"], images["max_patches"]) == (True, 1, 12)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "InternVLProcessor"
    tokens = json.loads((tmp_path / "tokenizer_config.json").read_text())["extra_special_tokens"]
    assert tokens == {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip


# -- what the original library needs of the files (transformers 4.37, tokenizers 0.15), without that library


@pytest.mark.parametrize("size", ["1B", "8B"])
def test_merges_have_the_form_that_every_version_reads(tmp_path: Path, size: str) -> None:
    written(tmp_path, size, "internvl_chat")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert model["merges"] and all(isinstance(merge, str) and len(merge.split(" ")) == 2 for merge in model["merges"])
    first = model["merges"][0]
    assert first.replace(" ", "") in model["vocab"]
    again = load_tokenizer(tmp_path)
    assert again.decode(again.encode("a red circle")) == "a red circle" and len(again.encode("a red circle")) < 8


def test_merges_of_tokens_with_spaces_stay_pairs(tmp_path: Path) -> None:
    pieces = [*byte_letters(), "a b", "a bc"]
    backend = byte_level(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("a b", "c")]))
    save_tokenizer(Tokenizer(backend), tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"] == [["a b", "c"]]


@pytest.mark.parametrize("dialect", ["internvl_chat", "transformers"])
@pytest.mark.parametrize(("size", "bos"), [("1B", 2), ("38B", 2), ("8B", 1)])
def test_the_language_model_has_a_bos_id_to_generate_from_embeddings(tmp_path: Path, size: str, bos: int, dialect) -> None:
    config = tiny_like(size)
    save_model(random_model(config), tmp_path, dialect=dialect)
    read = json.loads((tmp_path / "config.json").read_text())
    assert read["llm_config" if dialect == "internvl_chat" else "text_config"]["bos_token_id"] == bos
    assert read["bos_token_id"] == (1 if size == "8B" else None)
    assert load_config(tmp_path) == config  # Qwen's prompts start with no token, here as before


def test_the_bos_id_of_a_qwen_whose_files_name_no_pad_token() -> None:
    """Published configurations name 151643 for bos and nothing for pad."""
    config = replace(published_config("1B"), pad_token_id=None)
    assert to_json(config, "internvl_chat", "bfloat16")["llm_config"]["bos_token_id"] == 151643
    tiny = replace(tiny_like("1B"), pad_token_id=None)
    assert to_json(tiny, "internvl_chat", "float32")["llm_config"]["bos_token_id"] == tiny.eos_token_ids[-1]


@pytest.mark.parametrize(("dialect", "named"), [("internvl_chat", True), ("transformers", False)])
def test_internlm2s_tokenizer_model_travels(tmp_path: Path, dialect: Dialect, named: bool) -> None:
    """The original training code strips a turn's `<s>` by an attribute that only InternLM2's own class has."""
    (tmp_path / "source").mkdir()
    pieces = sentencepiece_model(tmp_path / "source", "identity")
    (tmp_path / "source" / "text").unlink()
    words = load_tokenizer(tmp_path / "source")
    words.add_special(CHATML_TOKENS)
    words.add_special()
    config = replace(
        tiny_like("8B"), image_token_id=words.id("<IMG_CONTEXT>"), eos_token_ids=(words.id("<|im_end|>"),), pad_token_id=None,
        decoder=replace(tiny_like("8B").decoder, vocab_size=len(words)),
    )  # fmt: skip
    save_model(random_model(config), tmp_path / "model", dialect=dialect)
    save_processor(Processor(config, words), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "chat", to="internvl_chat")
    convert(tmp_path / "chat", tmp_path / "again", to=dialect)
    for directory in ("model", "again"):
        assert (tmp_path / directory / "tokenizer.model").read_bytes() == pieces.read_bytes()
        read = json.loads((tmp_path / directory / "tokenizer_config.json").read_text())
        assert read["tokenizer_class"] == ("InternLM2Tokenizer" if named else "PreTrainedTokenizerFast")
        slow = ["OpenGVLab/InternVL2_5-8B--tokenization_internlm2.InternLM2Tokenizer", None]
        assert read.get("auto_map") == ({"AutoTokenizer": slow} if named else None)
        assert read["add_bos_token"] is True
        assert read["added_tokens_decoder"][str(words.id("<img>"))]["content"] == "<img>"
        assert load_tokenizer(tmp_path / directory).encode("what is this") == words.encode("what is this")
    convert(tmp_path / "model", tmp_path / "again", to=dialect, force=True)  # a file of ours is replaced
