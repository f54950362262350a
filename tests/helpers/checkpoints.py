"""What the checkpoint tests share: models with the structure of each published size, random in every value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivl.checkpoint.releases import MODELS
from ivl.config import ModelConfig
from ivl.model.vlm import VLM
from tests.conftest import tiny_config


def tiny_like(size: str) -> ModelConfig:
    """A published configuration with small dimensions: its flags, families, rope and ids' kinds, 28 px tiles."""
    config, tiny = MODELS[size].config, tiny_config()
    vision = replace(
        config.vision, width=32, num_layers=2, mlp_width=64, num_heads=4, patch_size=7, image_size=28, layer_scale_init=0.3
    )
    head_dim = 16 if config.decoder.qk_norm else 8  # Qwen3's heads do not fill the width
    decoder = replace(
        config.decoder, vocab_size=96, width=64, num_layers=2, mlp_width=80, num_heads=8, num_kv_heads=2, head_dim=head_dim
    )
    return replace(config, vision=vision, decoder=decoder, tiling=tiny.tiling, **_ids(config))


def _ids(config: ModelConfig) -> dict:
    eos = tuple(range(91, 91 + len(config.eos_token_ids)))
    bos = None if config.bos_token_id is None else 1
    return {"image_token_id": 90, "eos_token_ids": eos, "pad_token_id": 2, "bos_token_id": bos}


def random_model(config: ModelConfig, seed: int = 0) -> VLM:
    """No two tensors alike, norms, biases and layer scales included, so that a swapped tensor cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    model = VLM(config).eval()
    for parameter in model.parameters():
        around = 0.5 if parameter.ndim == 1 else 0.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + around
    return model


def same_weights(a: VLM, b: VLM) -> bool:
    """Bit-equal parameters under equal names."""
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def remove_head(directory: Path) -> None:
    """Remove the output head from stored weights, as where it is tied to the embeddings."""
    file = directory / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}, file)


def sentencepiece_model(folder: Path, normalization: str) -> Path:
    """Train a small tokenizer.model; skips the test without sentencepiece."""
    spm = pytest.importorskip("sentencepiece")
    (folder / "text").write_text("what is this\na red circle\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=280,
        byte_fallback=True, normalization_rule_name=normalization, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"
