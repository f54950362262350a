"""Small models that every test may use."""

from __future__ import annotations

import signal

import pytest
import torch

from ivl.config import DecoderConfig, ModelConfig, TilingConfig, VisionConfig
from ivl.model.vlm import VLM

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell ignores it for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def tiny_config(*, family: str = "qwen2", norm: str = "layer_norm", qk_norm: bool = False) -> ModelConfig:
    """A model of a few thousand parameters with the structure of a published one: 28 px tiles, one vision token each."""
    vision = VisionConfig(
        width=32, num_layers=2, mlp_width=64, num_heads=4, norm=norm, qkv_bias=not qk_norm, qk_norm=qk_norm,
        patch_size=7, image_size=28,
    )  # fmt: skip
    decoder = DecoderConfig(
        family=family, vocab_size=96, width=48, num_layers=2, mlp_width=80, num_heads=4, num_kv_heads=2, head_dim=16,
        qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
    )  # fmt: skip
    return ModelConfig(
        vision=vision, decoder=decoder, tiling=TilingConfig(tile_size=28), image_token_id=90, eos_token_ids=(91,)
    )


@pytest.fixture
def tiny() -> VLM:
    torch.manual_seed(0)
    model = VLM(tiny_config()).eval()
    model.init_weights()
    return model


@pytest.fixture(params=[False, True], ids=["plain", "accelerated"])
def accelerated(request: pytest.FixtureRequest) -> bool:
    """Whether a law is checked on a model that `ivl.cpu.accelerate` has changed."""
    return request.param
