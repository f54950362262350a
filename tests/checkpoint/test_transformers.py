"""A tiny random model computes what transformers' InternVLForConditionalGeneration computes, converted either way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ivl.checkpoint import load_model, save_model
from ivl.checkpoint.config_table import Dialect
from ivl.config import ModelConfig
from ivl.model.vlm import VLM
from ivl.types import Layout
from tests.helpers.checkpoints import random_model, same_weights, tiny_like

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-4


def grown(config: ModelConfig) -> ModelConfig:
    """Of so few positions that the rotary base grows."""
    return replace(config, decoder=replace(config.decoder, max_positions=10, rope_theta=100.0))


def variants() -> dict[str, ModelConfig]:
    qwen2, internlm2, large = tiny_like("1B"), tiny_like("8B"), tiny_like("26B")
    llama = replace(internlm2, decoder=replace(internlm2.decoder, family="llama", rope_dynamic_factor=None))
    return {
        "LayerNorm ViT, Qwen2": qwen2,
        "LayerNorm ViT, LLaMA": llama,
        "RMSNorm and QK-norm ViT, Qwen2": tiny_like("78B"),
        "RMSNorm and QK-norm ViT, InternLM2": large,
        "dynamic rotary base beyond its length": grown(internlm2),
        "Qwen3 (InternVL3.5)": tiny_like("3.5-8B"),
        "RMSNorm and QK-norm ViT, Qwen3": tiny_like("3.5-38B"),
        "Qwen2 with a dynamic rotary base (InternVL3)": grown(tiny_like("3-1B")),
        "InternLM3 with a dynamic rotary base (InternVL3-9B)": grown(tiny_like("3-9B")),
        "an inner ViT layer": replace(qwen2, select_layer=-2),
        "the first ViT layer, counted from the front": replace(qwen2, select_layer=1),
    }


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with two placeholder runs, for three tiles of 4 vision tokens (28 px tiles of 7 px patches)."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 90, (20,), generator=generator)
    image = torch.full((4,), 90)
    tokens = torch.cat([text[:5], image, image, text[5:11], image, text[11:]])
    return tokens, torch.randn(3, 3, 28, 28, generator=generator)


@torch.no_grad()
def our_logits(model: VLM, tokens: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    return model.head(model(tokens, Layout.packed((len(tokens),)), model.encode_pixels(pixels)))


@torch.no_grad()
def their_logits(model: Any, tokens: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens[None], pixel_values=pixels).logits[0]


@pytest.mark.parametrize("name", variants())
def test_ours_in_transformers(name: str, inputs: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    model = random_model(variants()[name])
    save_model(model, tmp_path / "ours", dialect="transformers")
    theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == "InternVLForConditionalGeneration"
    logits = our_logits(model, *inputs)
    assert logits.std() > 0.5
    assert (logits - their_logits(theirs.eval(), *inputs)).abs().max() <= TOLERANCE
    assert (logits - our_logits(load_model(tmp_path / "ours"), *inputs)).abs().max() == 0
    # The library writes its own form of the configuration, and loses nothing either.
    theirs.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == model.config and same_weights(model, again)


@pytest.mark.parametrize("vision", ("layer_norm", "rms_norm"))
@pytest.mark.parametrize("text", ("qwen2", "llama", "qwen3"))
def test_theirs_in_ours(text: str, vision: str, inputs: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    """A model that the library made, with a configuration that only the library wrote."""
    language = {
        "model_type": text, "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 80,
        "num_attention_heads": 8, "num_key_value_heads": 4, "eos_token_id": 91, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    tower = {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 7, "norm_type": vision, "use_qk_norm": vision == "rms_norm", "attention_bias": vision == "layer_norm",
    }  # fmt: skip
    if text == "qwen3":
        language["head_dim"] = 16  # apart from 64 / 8
    config = transformers.InternVLConfig(
        vision_config=tower, text_config=language, image_token_id=90, image_seq_length=4, tie_word_embeddings=False
    )
    theirs = transformers.InternVLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + (0.5 if parameter.ndim == 1 else 0)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.config.decoder.family == text
    logits = our_logits(model, *inputs)
    assert logits.std() > 0.5
    assert (logits - their_logits(theirs, *inputs)).abs().max() <= TOLERANCE
    save_model(model, tmp_path / "chat")
    save_model(load_model(tmp_path / "chat"), tmp_path / "back", dialect="transformers")
    back = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back").eval()
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dialect", ("internvl_chat", "transformers"))
@pytest.mark.parametrize("name", ("3-1B", "3-9B", "3.5-8B", "3.5-38B"))
def test_later_releases_in_both_dialects(
    name: str, dialect: Dialect, inputs: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    """Logits to 1e-5 and greedy text, at a spread of logits as trained models have it. 30 tokens grow the base of InternVL3."""
    config = tiny_like(name)
    config = replace(config, decoder=replace(config.decoder, max_positions=30, vocab_size=160))  # rows beyond the vocabulary
    model = VLM(config).eval()
    torch.manual_seed(3)
    model.init_weights()
    for parameter in model.decoder.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    save_model(model, tmp_path / "stored", dialect=dialect)
    save_model(load_model(tmp_path / "stored"), tmp_path / "theirs", dialect="transformers")
    ours = load_model(tmp_path / "stored")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs").eval()
    tokens, pixels = inputs
    with torch.no_grad():
        text = theirs.generate(
            input_ids=tokens[None], pixel_values=pixels, attention_mask=torch.ones_like(tokens[None]), max_new_tokens=16,
            do_sample=False, eos_token_id=None, use_cache=False,  # cached keys would keep the bases of shorter texts
        )[0, len(tokens) :]  # fmt: skip
        said: list[int] = []
        for _ in text:
            logits = our_logits(ours, torch.cat([tokens, torch.tensor(said, dtype=torch.long)]), pixels)
            said.append(int(logits[-1].argmax()))
    assert said == text.tolist() and len(set(said)) > 1
    whole = torch.cat([tokens, text[:-1]])
    logits = our_logits(ours, whole, pixels)
    assert logits.std() > 0.3
    assert (logits - their_logits(theirs, whole, pixels)).abs().max() <= 1e-5
