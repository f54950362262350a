"""Laws of LoRA: an untrained adapter changes nothing, merging changes nothing, PEFT reads and writes the same adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.model.linear import Linear
from ivl.model.lora import LoraLinear, adapters_disabled, add_lora, load_adapter, lora_parameters, merge_lora, save_adapter
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


def test_initialisation_and_scale() -> None:
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


@pytest.mark.parametrize("targets", [EVERYWHERE.targets, ("*.q_proj", "vision.layers.1", "projector.fc2")])
def test_round_trip(tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = build()
    add_lora(model, LoraConfig(rank=3, alpha=5, dropout=0.1, targets=targets))
    stir(model)
    save_adapter(model, tmp_path / "a")
    other = build()
    config = load_adapter(other, tmp_path / "a")
    assert (config.rank, config.scale, config.dropout) == (3, 5 / 3, 0.1)
    assert torch.equal(logits(other), logits(model))
    save_adapter(other, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_bad_adapters_are_refused(tmp_path: Path, tiny: VLM) -> None:
    with pytest.raises(InputError, match=r"'decoder.layer'.*decoder\.layers\.\*\.qkv\.q_proj"):
        add_lora(tiny, LoraConfig(targets=("decoder.layers", "decoder.layer")))
    with pytest.raises(InputError, match="no LoRA adapters"):
        save_adapter(tiny, tmp_path)
    with pytest.raises(InputError, match=r"no adapter_config.json"):
        load_adapter(tiny, tmp_path)
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        LoraConfig(rank=0)
    wide = build()
    add_lora(wide, LoraConfig(rank=4))
    save_adapter(wide, tmp_path)
    with pytest.raises(InputError, match="already"):
        load_adapter(wide, tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 2}, r"should be \(2, 48\).*\(4, 48\)"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(described | change))
        with pytest.raises(InputError, match=message):
            load_adapter(build(), tmp_path)
