"""Laws of LoRA: an untrained adapter changes nothing, merging changes nothing, PEFT reads and writes the same adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivl.checkpoint import load_model, save_model
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.lora.layers import LoraLinear, adapters_disabled, add_lora, load_adapter, lora_parameters, merge_lora, save_adapter
from ivl.model.linear import Linear
from ivl.model.vlm import VLM
from ivl.types import Layout
from tests.conftest import tiny_config
from tests.helpers.checkpoints import random_model, tiny_like

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


def theirs(directory: Path):
    from transformers import InternVLForConditionalGeneration

    return InternVLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def their_logits(model) -> torch.Tensor:
    """transformers has a batch axis, so each sequence goes alone with its tile."""
    rows = []
    for tokens_T, tile in zip(TOKENS_T.split((8, 6)), pixels().split(1), strict=True):
        rows.append(model(input_ids=tokens_T.unsqueeze(0), pixel_values=tile).logits[0])
    return torch.cat(rows)


@pytest.mark.parametrize("size", ["1B", "26B"])
def test_peft_loads_our_adapter(tmp_path: Path, size: str) -> None:
    """Qwen2 beside a LayerNorm ViT, InternLM2 (LLaMA over there) beside an RMSNorm ViT with QK norm."""
    from peft import PeftModel

    model = random_model(tiny_like(size))
    save_model(model, tmp_path / "model", dialect="transformers")
    add_lora(model, EVERYWHERE)
    stir(model)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "model"))
    wrapped = PeftModel.from_pretrained(theirs(tmp_path / "model"), str(tmp_path / "adapter")).eval()
    expected = logits(model)
    with adapters_disabled(model):
        assert (logits(model) - expected).abs().max() > 0.1
    torch.testing.assert_close(their_logits(wrapped), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_loads_here(tmp_path: Path, rslora: bool) -> None:
    import peft

    model = random_model(tiny_like("1B"))
    save_model(model, tmp_path / "model", dialect="transformers")
    kinds = ["q_proj", "v_proj", "up_proj", "fc1", "projection_layer", "linear_2"]
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=kinds, lora_dropout=0.1, use_rslora=rslora)
    wrapped = peft.get_peft_model(theirs(tmp_path / "model"), config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    load_adapter(model, tmp_path / "adapter")
    assert {name.split(".")[-2] for name in lora_parameters(model)} == {"lora_A", "lora_B"}
    torch.testing.assert_close(logits(model), their_logits(wrapped), atol=1e-4, rtol=1e-5)


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    model = build()
    add_lora(model, LoraConfig(rank=2))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    stranger = "base_model.model.model.language_model.layers.7.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {stranger: torch.zeros(2, 48)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"layers\.7"):
        load_adapter(build(), tmp_path)
    tensors.pop("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"q_proj\.lora_B.*nothing"):
        load_adapter(build(), tmp_path)


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
