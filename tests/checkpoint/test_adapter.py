"""Laws of adapters in files: what is written is read, and PEFT reads and writes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivl.checkpoint import save_model
from ivl.checkpoint.adapter import load_adapter, save_adapter
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.lora.layers import adapters_disabled, add_lora, lora_parameters
from ivl.model.vlm import VLM
from tests.helpers.adapters import EVERYWHERE, TOKENS_T, build, logits, pixels, stir
from tests.helpers.checkpoints import random_model, tiny_like


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
        ({"r": 2}, r"should be \(2, \d+\).*\(4, \d+\)"),
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


KINDS = ["q_proj", "v_proj", "up_proj", "fc1", "projection_layer", "linear_2"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": KINDS},
        {"target_modules": KINDS, "use_rslora": True},
        {"target_modules": ["lm_head", "embed_tokens", *KINDS]},  # of which PEFT writes the base layers as well
        {"target_modules": KINDS, "bias": "all", "modules_to_save": ["multi_modal_projector", "layernorm_after"]},
        {"target_modules": KINDS, "rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {"fc1": 5}},
    ],
    ids=["plain", "rslora", "head and table", "biases and whole parts", "patterns"],
)
def test_an_adapter_of_peft_loads_here(tmp_path: Path, options: dict) -> None:
    import peft

    model = random_model(tiny_like("1B"))
    save_model(model, tmp_path / "model", dialect="transformers")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, **options})
    wrapped = peft.get_peft_model(theirs(tmp_path / "model"), config).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    before = logits(model)
    load_adapter(model, tmp_path / "adapter")
    assert (logits(model) - before).abs().max() > 0.1
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
