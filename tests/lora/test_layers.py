"""Laws of LoRA: an untrained adapter changes nothing, merging changes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ivl.checkpoint import load_model, save_model
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.lora.layers import LoraLinear, adapters_disabled, add_lora, lora_parameters, merge_lora
from ivl.model.linear import Linear
from ivl.model.vlm import VLM
from tests.helpers.adapters import EVERYWHERE, LAYOUT, TOKENS_T, build, logits, pixels, stir
from tests.helpers.checkpoints import random_model, tiny_like


def test_an_untrained_adapter_changes_nothing_and_only_adapters_train(tiny: VLM) -> None:
    before, names = logits(tiny), set(tiny.state_dict())
    add_lora(tiny, LoraConfig())
    assert torch.equal(logits(tiny), before)
    assert names < set(tiny.state_dict())
    adapters = lora_parameters(tiny)
    assert len(adapters) == 2 * 2 * 7  # A and B, two layers, q k v out gate up down
    assert all(p.requires_grad for p in adapters.values())
    assert not any(
        p.requires_grad for n, p in tiny.named_parameters() if "decoder.layers" in n and "proj" in n and n not in adapters
    )
    tiny.train()
    hidden = tiny(TOKENS_T, LAYOUT, tiny.encode_pixels(pixels()))
    tiny.head(hidden).square().sum().backward()
    layer = tiny.decoder.layers[0].qkv
    assert isinstance(layer, LoraLinear)
    assert layer.weight.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.lora_B.values())


def test_initialization_and_scale() -> None:
    model = build()
    add_lora(model, LoraConfig(rank=8, targets=("*.down",)))
    layer = model.decoder.layers[1].down
    assert isinstance(layer, LoraLinear)
    assert layer.config.scale == 2
    bound = 1 / math.sqrt(layer.in_features)
    A = layer.lora_A["weight"]
    assert 0.8 * bound < A.abs().max() <= bound and layer.lora_B["weight"].abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"family": "llama", "norm": "rms_norm", "qk_norm": True}])
def test_merged_equals_adapted_and_disabled_equals_base(options: dict) -> None:
    model = build(**options)
    base = logits(model)
    add_lora(model, EVERYWHERE)
    stir(model)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 0.1
    with adapters_disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    merge_lora(model)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert all(
        type(m) is not LoraLinear and p.requires_grad for m in model.modules() if isinstance(m, Linear) for p in m.parameters()
    )
    torch.testing.assert_close(logits(model), adapted, atol=1e-4, rtol=0)


def test_the_matrix_of_an_adapted_head_is_what_it_multiplies_by(tiny: VLM) -> None:
    """The loss takes the head's matrix, not its forward, and must train the adapters on it."""
    add_lora(tiny, EVERYWHERE)
    stir(tiny)
    head, x_TD = tiny.decoder.head, torch.randn(3, 48)
    torch.testing.assert_close(x_TD @ head.matrix().T, head(x_TD))
    head.matrix().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in head.named_parameters() if "lora" in n)
    with adapters_disabled(tiny):
        assert head.matrix() is head.weight


@pytest.mark.parametrize("targets", [("projector",), ("vision.layers",)])
def test_adapters_learn_above_frozen_layers(targets: tuple[str, ...]) -> None:
    """Nothing below them carries a gradient."""
    model = build()
    model.requires_grad_(False)
    add_lora(model, LoraConfig(targets=targets))
    stir(model)
    model.encode_pixels(pixels()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora_parameters(model).values())


def test_a_merged_model_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    model = random_model(tiny_like("2B"))
    add_lora(model, EVERYWHERE)
    stir(model)
    expected = logits(model)
    with pytest.raises(InputError, match="merge"):
        save_model(model, tmp_path / "unmerged")
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(logits(load_model(tmp_path / "merged")), logits(model))
