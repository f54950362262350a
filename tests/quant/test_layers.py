"""Quantised layers: what they compute, how little they lose, and the way to a file and back."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ivl.checkpoint import load_model, save_model
from ivl.checkpoint.adapter import merge
from ivl.checkpoint.convert import convert
from ivl.checkpoint.keymaps import TensorEntry
from ivl.config import LoraConfig
from ivl.cpu import accelerate
from ivl.cpu.kernels import features
from ivl.cpu.linear import AmxW8A8Linear, VectorQuantLinear, fused_linear
from ivl.errors import InputError
from ivl.lora.layers import add_lora
from ivl.model.linear import swiglu
from ivl.quant.layers import QuantConfig, QuantLinear, QuantPlan, dequantize, quantize, quantized_layers
from ivl.types import Layout
from tests.helpers.checkpoints import random_model, tiny_like

INT8 = QuantConfig(bits=8)
INT4 = QuantConfig(bits=4, group=32)
SCHEMES = [INT8, *(QuantConfig(bits=4, group=g, symmetric=s) for g in (32, 64, 128) for s in (True, False))]
W8A8 = QuantConfig(bits=8, activations=True)


def layer_of(matrix: torch.Tensor, scheme: QuantConfig, bias: torch.Tensor | None = None) -> QuantLinear:
    layer = QuantLinear(matrix.shape[1], len(matrix), scheme, bias=bias is not None)
    layer.weight, layer.scale, layer.zero = quantize(matrix, scheme)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", [*SCHEMES, W8A8], ids=lambda s: s.name)
def test_every_weight_is_within_half_a_step_unless_its_range_was_cut(scheme: QuantConfig) -> None:
    matrix = normal(24, 256)
    layer = layer_of(matrix, scheme)
    layer.scale = layer.scale.float()
    off = (layer.matrix() - matrix).abs().unflatten(1, (layer.scale.shape[1], -1)) / layer.scale.unsqueeze(2)
    assert (off <= 0.5001).float().mean() > (0.97 if scheme.bits == 4 else 0.995)
    limit = {8: 0.012, 4: 0.13}[scheme.bits]
    assert float((layer.matrix() - matrix).norm() / matrix.norm()) < limit


def test_smaller_groups_and_zero_points_lose_less() -> None:
    matrix = normal(64, 256) + 0.3
    error = {s: float((dequantize(*quantize(matrix, s), s).float() - matrix).norm()) for s in SCHEMES}
    by_group = [error[QuantConfig(bits=4, group=group)] for group in (32, 64, 128)]
    assert by_group == sorted(by_group)
    for group in (32, 64, 128):
        assert error[QuantConfig(bits=4, group=group, symmetric=False)] < error[QuantConfig(bits=4, group=group)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_a_layer_multiplies_by_the_matrix_it_stands_for(scheme: QuantConfig) -> None:
    layer = layer_of(normal(70, 128), scheme, normal(70))
    layer.scale = layer.scale.float()
    x = normal(2, 5, 128, seed=1)
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), x @ layer.matrix().t() + layer.bias)


def test_rounded_activations_cost_little() -> None:
    layer = layer_of(normal(64, 256), W8A8, normal(64))
    x = normal(40, 256, seed=1)
    assert layer.bias is not None
    wanted = x @ layer.matrix().float().t() + layer.bias
    assert float((layer(x) - wanted).norm() / wanted.norm()) < 0.01
    assert torch.equal(layer(torch.zeros(3, 256)), layer.bias.detach().expand(3, -1))  # nothing is divided by 0


def test_zeros_stay_zeros_and_infinities_are_refused() -> None:
    for scheme in SCHEMES:
        assert not dequantize(*quantize(torch.zeros(8, 128), scheme), scheme).any()
        with pytest.raises(ValueError, match="infinite"):
            quantize(torch.full((8, 128), torch.inf), scheme)


def test_packing_is_that_of_compressed_tensors() -> None:
    """Element i of a row in bits 4 i of an int32 word; zero points of 8 rows in a word, the first lowest."""
    matrix = normal(24, 64)
    weight, _, zero = quantize(matrix, QuantConfig(bits=4, group=32, symmetric=False))
    assert zero is not None
    (words,) = TensorEntry("w", ("w",), form="words").split(weight)
    digits = torch.stack([words >> 4 * i & 15 for i in range(8)], dim=2).flatten(1)
    assert torch.equal(digits[:, 0::2].to(torch.uint8) | digits[:, 1::2].to(torch.uint8) << 4, weight)
    parts = TensorEntry("z", ("a", "b"), rows=(10, 14), form="zeros")
    packed = parts.split(zero)
    assert [tuple(part.shape) for part in packed] == [(2, 2), (2, 2)] == [tuple(s) for s in parts.shapes(zero.shape)]
    assert int(packed[0][1, 1] >> 4 & 15) == int(zero[9, 1])
    assert torch.equal(parts.join(packed), zero)
    assert torch.equal(parts.join(parts.split(zero[:, :1])), zero[:, :1])  # a single group


@pytest.fixture(scope="module", params=["1B", "2B", "3.5-8B"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_like(request.param)
    config = replace(config, decoder=replace(config.decoder, mlp_width=96))
    directory = tmp_path_factory.mktemp("source")
    save_model(random_model(config), directory, dtype=torch.bfloat16)
    return directory


@pytest.mark.parametrize("to", ["internvl_chat", "transformers"])
@pytest.mark.parametrize("scheme", [INT8, INT4, QuantConfig(bits=4, group=32, symmetric=False)], ids=lambda s: s.name)
def test_converted_loaded_and_saved_again_in_both_dialects(source: Path, tmp_path: Path, to: str, scheme: QuantConfig) -> None:
    if to == "transformers" and json.loads((source / "config.json").read_text())["ps_version"] == "v1":
        pytest.skip("no such form")
    schemes = QuantPlan(language=scheme, head=INT8)
    losses = convert(source, tmp_path / "q", to=to, schemes=schemes, weights_only=True).losses  # type: ignore[arg-type]
    plain, model = load_model(source, dtype=torch.float32), load_model(tmp_path / "q")
    assert model.dtype is torch.bfloat16
    layers, parameters = quantized_layers(model), dict(plain.named_parameters())
    assert set(layers) == {path for path, m in plain.decoder.named_modules(prefix="decoder") if isinstance(m, torch.nn.Linear)}
    for path, layer in layers.items():
        matrix = parameters[f"{path}.weight"].detach()
        assert layer.config == (INT8 if path == "decoder.head" else scheme)
        wanted = quantize(matrix, layer.config)
        pairs = zip((layer.weight, layer.scale, layer.zero), wanted, strict=True)
        assert all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs), path
        assert layer.parts == plain.get_submodule(path).parts
        loss = next(loss for loss in losses if loss.layer == path)
        error = (dequantize(wanted[0], wanted[1].float(), wanted[2], layer.config) - matrix).norm() / matrix.norm()
        assert loss.error == pytest.approx(float(error), rel=1e-4)
    assert [row["layer"] for row in json.loads((tmp_path / "q" / "quantization.json").read_text())["layers"]] == [
        loss.layer for loss in losses
    ]
    save_model(model, tmp_path / "again", dialect=to)  # type: ignore[arg-type]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("q", "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_the_whole_model_computes_nearly_the_same(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "q", schemes=QuantPlan(language=INT8, head=INT8, vision=W8A8), weights_only=True)
    plain, model = (load_model(path, dtype=torch.float32) for path in (source, tmp_path / "q"))
    assert len(quantized_layers(model)) == 9 + 8  # of decoder and ViT
    tokens, layout = torch.arange(20), Layout(new_lens=(20,), past_lens=(0,))
    tiles = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    with torch.inference_mode():
        a, b = (m.head(m(tokens, layout)) for m in (plain, model))
        assert float((a - b).norm() / a.norm()) < 0.03
        a, b = (m.encode_tiles(tiles) for m in (plain, model))
        assert float((a - b).norm() / a.norm()) < 0.03


def test_what_changes_weights_refuses(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "q", schemes=QuantPlan(language=INT8), weights_only=True)
    with pytest.raises(InputError, match="is quantized"):
        load_model(tmp_path / "q", quantized=False)
    with pytest.raises(InputError, match="is quantized"):
        convert(tmp_path / "q", tmp_path / "other", weights_only=True)
    with pytest.raises(InputError, match="quantized"):
        add_lora(load_model(tmp_path / "q"), LoraConfig(targets=("decoder",)))
    with pytest.raises(InputError, match="--group-size"):
        convert(source, tmp_path / "other", schemes=QuantPlan(language=QuantConfig(bits=4, group=128)), weights_only=True)
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="is quantized"):
        merge(tmp_path / "q", tmp_path, tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (
            {"format": "float-quantized", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}},
            "float-quantized",
        ),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"g": {"format": "pack-quantized", "weights": {"num_bits": 3, "type": "int"}}}}, "4 or 8 bits"),
    ],
)
def test_foreign_schemes_are_refused_by_name(source: Path, tmp_path: Path, change: dict, message: str) -> None:
    convert(source, tmp_path / "q", schemes=QuantPlan(language=INT8), weights_only=True)
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "q")


needs_kernels = pytest.mark.skipif(not features.at_least("avx2"), reason="no kernels")


@needs_kernels
@torch.inference_mode()
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_kernels_equal_the_matrix_they_stand_for(scheme: QuantConfig) -> None:
    """Also where the last step of a row and the last block of rows are not whole."""
    group = scheme.group or 32
    for width, out in ((128, 32), (128 + max(group, 32) * (group < 128), 70), (896, 129)):
        matrix = normal(out, width) + 0.2
        layer = accelerate(layer_of(matrix, scheme, normal(out).bfloat16()))
        exact = dequantize(layer.weight, layer.scale.float(), layer.zero, scheme)
        assert layer.bias is not None
        for tokens in (1, 7, 40):
            x = normal(tokens, width, seed=tokens).bfloat16()
            assert isinstance(layer, VectorQuantLinear)
            wanted = x.float() @ exact.t() + layer.bias.float()
            assert float((layer(x).float() - wanted).norm() / wanted.norm()) < 4e-3


@needs_kernels
@torch.inference_mode()
def test_what_goes_around_one_row_is_part_of_the_kernel() -> None:
    """The norm, the gate and the residual in the product lose about what they do one after another."""
    norm = nn.RMSNorm(128, eps=1e-6).bfloat16()
    norm.weight.data = normal(128, seed=3).bfloat16()
    accelerate(norm)
    for scheme in (INT8, INT4):
        layer = accelerate(layer_of(normal(40, 128), scheme))
        wide, plus = normal(1, 256, seed=1).bfloat16(), normal(1, 40, seed=2).bfloat16()
        for x, before in ((wide[:, :128], norm), (wide, swiglu), (wide[:, :128], None)):
            together = fused_linear(
                layer, x, norm=before if isinstance(before, nn.RMSNorm) else None, gated=before is swiglu, residual=plus
            )
            apart = layer(x if before is None else before(x)) + plus
            around = copy.deepcopy(before).double() if isinstance(before, nn.Module) else before
            exactly = x.double() if around is None else around(x.double())
            exact = exactly @ layer.matrix().double().t() + plus
            assert (together - exact).norm() <= 1.2 * (apart - exact).norm() <= 0.01 * exact.norm()


@needs_kernels
@torch.inference_mode()
def test_numbers_that_are_none_are_not_hidden() -> None:
    for scheme in (INT8, INT4):
        layer = accelerate(layer_of(normal(40, 128), scheme))
        for bad in (torch.nan, torch.inf):
            x = normal(1, 128).bfloat16()
            x[0, 77] = bad
            assert not layer(x).isfinite().any()
        assert not layer(torch.zeros(1, 128, dtype=torch.bfloat16)).any()


@needs_kernels
@torch.inference_mode()
@pytest.mark.parametrize("scheme", [*SCHEMES, W8A8], ids=lambda s: s.name)
def test_every_way_of_computing_gives_nearly_the_same(scheme: QuantConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX, vectors and torch alone, as on processors that have only some of them."""
    layer = layer_of(normal(70, 256), scheme, normal(70).bfloat16())
    inputs = [normal(tokens, 256, seed=tokens).bfloat16() for tokens in (1, 16, 40)]
    ways = [[accelerate(layer)(x) for x in inputs]]
    monkeypatch.setattr(features, "level", lambda: "avx2")
    ways.append([accelerate(layer)(x) for x in inputs])
    monkeypatch.setattr(features, "level", lambda: "any")
    assert type(accelerate(layer)) is QuantLinear
    ways.append([layer(x) for x in inputs])
    for other in ways[:2]:
        for a, b in zip(other, ways[2], strict=True):
            assert float((a - b).norm() / b.norm()) < 6e-3


@needs_kernels
@torch.inference_mode()
@pytest.mark.skipif(not features.at_least("amx"), reason="no AMX on this processor")
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_what_follows_a_rounded_product_may_be_done_in_it(tokens: int) -> None:
    """GELU and the residual, over one and over several panels of tokens: to what rounding in between costs."""
    layer = accelerate(layer_of(3 * normal(96, 4096) / 64, W8A8, 2 * normal(96).bfloat16()))
    assert isinstance(layer, AmxW8A8Linear)
    x, plus, factor = normal(2, tokens, 4096, seed=1).bfloat16(), normal(2, tokens, 96).bfloat16(), normal(96).bfloat16()
    plain = layer(x)
    assert torch.equal(plain[1], layer(x[1]))
    for fused, wanted in (
        (layer.fused(x, gelu=True), F.gelu(plain.double())),
        (layer.fused(x, residual=plus, factor_O=factor), plus + factor.double() * plain),
    ):
        assert fused.shape == plain.shape
        assert float((fused - wanted).norm() / wanted.norm()) < 4e-3
        assert float(((fused - wanted).abs() / (wanted.abs() + 1)).max()) < 2e-2


@needs_kernels
@torch.inference_mode()
def test_in_8_bits_a_token_does_not_depend_on_its_batch() -> None:
    layer = accelerate(layer_of(normal(70, 256), INT8))
    x = normal(16, 256).bfloat16()
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))
