"""A tiny model, its logits, and adapters as if they were trained."""

from __future__ import annotations

import torch

from ivl.config import LoraConfig
from ivl.lora.layers import lora_parameters
from ivl.model.vlm import VLM
from ivl.types import Layout
from tests.conftest import tiny_config

EVERYWHERE = LoraConfig(rank=4, dropout=0.0, targets=("decoder.layers", "vision.layers", "projector", "decoder.head"))
TOKENS_T = torch.tensor([3, 90, 90, 90, 90, 5, 7, 11, 2, 90, 90, 90, 90, 8])
LAYOUT = Layout.packed((8, 6))


def build(**options: str) -> VLM:
    torch.manual_seed(0)
    model = VLM(tiny_config(**options)).eval()
    model.init_weights()
    return model


def stir(model: VLM, seed: int = 1) -> None:
    """As if trained: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: VLM) -> torch.Tensor:
    return model.head(model(TOKENS_T, LAYOUT, model.encode_pixels(pixels())))
