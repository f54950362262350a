"""Laws of captured steps: the numbers of the model's usual way, whatever the lengths, and never on weights that are gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from ivl.cpu import accelerate, captured_step
from ivl.cpu.captured_step import SHORTEST, CapturedStep
from ivl.cpu.kernels import features
from ivl.cpu.kernels.launch import Workspace
from ivl.cpu.layers import FastDecoder
from ivl.lora.layers import LoraConfig, LoraLinear
from ivl.model.cache import CachedSequence, PagedCache
from ivl.model.decoder import Decoder, DecoderLayer
from ivl.quant.layers import QuantConfig, quantize, quantize_layers, quantized_layers
from tests.conftest import tiny_config

pytestmark = pytest.mark.skipif(not features.at_least("avx2"), reason="no kernels on this platform")
LENS = (5, SHORTEST - 3, 1, 40)
"""Prompts, one of which grows past the shortest length that calls are made for."""


def quantized(bits: int) -> Callable[[Decoder], None]:
    def change(decoder: Decoder) -> None:
        weights = {path: module.weight for path, module in decoder.named_modules() if isinstance(module, nn.Linear)}
        scheme = QuantConfig(bits=bits, group=None if bits == 8 else 32)
        quantize_layers(decoder, lambda path, layer: scheme if path != "head" else None)
        for path, layer in quantized_layers(decoder).items():
            layer.weight, layer.scale, layer.zero = quantize(weights[path].float(), layer.config)

    return change


@pytest.fixture(params=["qwen2", "qwen3"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    monkeypatch.setattr(captured_step, "PATIENCE", 0)
    torch.manual_seed(0)
    config = replace(
        tiny_config(family=request.param).decoder, width=128, mlp_width=256, num_heads=4, num_kv_heads=2, head_dim=64
    )
    made = Decoder(config).eval()
    for name, weight in made.named_parameters():
        weight.data.normal_(std=0.2, mean=float("norm" in name))
    return accelerate(made.to(torch.bfloat16))


class Both:
    """The same sequences twice: by captured steps, and by the layers."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.caches = [PagedCache(decoder.config, num_tokens=1024, block_size=16, dtype=torch.bfloat16) for _ in range(2)]
        self.sequences = [[CachedSequence() for _ in LENS] for _ in range(2)]
        x = torch.randn(sum(LENS), decoder.config.width).bfloat16()
        for cache, sequences in zip(self.caches, self.sequences, strict=True):
            step = cache.step(sequences, LENS)
            self.decoder(x, step.layout, step)

    @property
    def captured(self) -> dict[tuple[int, int, int], CapturedStep | None]:
        assert isinstance(self.decoder, FastDecoder)
        return self.decoder._captured(self.caches[0]).steps

    def step(self, which: list[int]) -> None:
        x = torch.randn(len(which), self.decoder.config.width).bfloat16()
        steps = [c.step([s[i] for i in which], (1,) * len(which)) for c, s in zip(self.caches, self.sequences, strict=True)]
        captured = self.decoder(x, steps[0].layout, steps[0])
        direct = Decoder.forward(self.decoder, x, steps[1].layout, steps[1])
        assert torch.equal(captured, direct) and direct.isfinite().all()
        for a, b in ((self.caches[0].keys, self.caches[1].keys), (self.caches[0].values, self.caches[1].values)):
            for one, other in zip(*self.sequences, strict=True):
                for mine, theirs in zip(one.blocks, other.blocks, strict=True):
                    assert torch.equal(a[:, 16 * mine :][:, :16], b[:, 16 * theirs :][:, :16])


@torch.inference_mode()
@pytest.mark.parametrize("change", [None, quantized(8), quantized(4)], ids=["bfloat16", "int8", "int4"])
def test_a_captured_step_equals_the_layers(decoder: Decoder, change: Callable[[Decoder], None] | None) -> None:
    if change is not None:
        change(decoder)
        accelerate(decoder)
    both = Both(decoder)
    for which in ([0, 1, 2, 3], [1], [0, 3], [0, 1, 2, 3], [2, 1, 0], [1], [1], [3, 2, 1, 0]):
        both.step(which)
    steps, threads = both.captured, torch.get_num_threads()
    assert {key[:2] for key in steps} >= {(1, 128), (2, 64), (4, 64), (4, 128)}
    assert steps[1, 128, threads] is not None
    assert (steps[4, 64, threads] is not None) == features.at_least("amx")


@torch.inference_mode()
def test_weights_that_are_replaced_are_used_and_what_is_no_kernel_is_left_to_the_decoder(decoder: Decoder) -> None:
    both = Both(decoder)
    both.step([0])
    layer = decoder.layers[1]
    assert isinstance(layer, DecoderLayer)
    for weight in (layer.qkv.weight, decoder.norm.weight):
        weight.data = torch.randn_like(weight)
        both.step([0])
    layer.out.weight.mul_(2)  # in place
    both.step([0])
    layer.norm1 = accelerate(nn.RMSNorm(128, eps=1e-6).bfloat16())
    both.step([0])
    assert None not in both.captured.values()
    layer.down = LoraLinear(layer.down, ["down_proj"], LoraConfig(rank=4)).bfloat16()
    both.step([0])
    layer.down.enabled = False
    both.step([0])
    both.step([0, 1])
    assert set(both.captured.values()) == {None}


@torch.inference_mode()
def test_another_type_goes_the_decoders_way(decoder: Decoder) -> None:
    decoder.float()
    cache, sequence = PagedCache(decoder.config, num_tokens=512, block_size=16), CachedSequence()
    step = cache.step([sequence], (1,))
    assert decoder(torch.randn(1, 128), step.layout, step).dtype is torch.float32
    assert isinstance(decoder, FastDecoder) and not decoder._captured(cache).steps


def test_a_workspace_hands_out_each_byte_once_until_it_is_rewound() -> None:
    space = Workspace()
    sizes = [1, 64, 100, 2 << 20, 3, 1 << 20]
    first = [space.take(size) for size in sizes]
    spans = sorted((piece.data_ptr(), piece.data_ptr() + len(piece)) for piece in first)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(len(piece) >= size and piece.data_ptr() % 64 == 0 for piece, size in zip(first, sizes, strict=True))
    again = [space.rewound().take(1).data_ptr(), *(space.take(size).data_ptr() for size in sizes[1:])]
    assert again == [piece.data_ptr() for piece in first]
