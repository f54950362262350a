"""The laws of the model hold for the plain model and for the accelerated one."""

from __future__ import annotations

import pytest
import torch

from ivl.cpu import accelerate
from ivl.model.vlm import VLM
from tests.conftest import tiny_config


@pytest.fixture(params=["qwen2", "qwen3"])
def tiny(request: pytest.FixtureRequest, accelerated: bool) -> VLM:
    torch.manual_seed(0)
    model = VLM(tiny_config(family=request.param)).eval()
    model.init_weights()
    return accelerate(model) if accelerated else model
