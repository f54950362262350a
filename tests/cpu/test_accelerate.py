"""Laws of an accelerated model: it equals the plain one, its parameters stay, and a plain model asks for no kernel."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ivl.checkpoint import load_model, save_model
from ivl.config import LoraConfig, ModelConfig
from ivl.cpu import accelerate
from ivl.cpu.attention import CPU_ATTENTION
from ivl.cpu.kernels import features
from ivl.cpu.linear import FastLinear
from ivl.lora.layers import add_lora, merge_lora
from ivl.model.cache import CachedSequence, PagedCache
from ivl.model.linear import Linear
from ivl.model.vlm import VLM
from ivl.types import ImageRef, Layout, SamplingParams
from tests.conftest import tiny_config
from tests.helpers.engines import ask, lively_model, picture, tiny_engine

LENS = (20, 3, 70)


def sized(family: str = "qwen2") -> ModelConfig:
    """A tiny model whose shapes all kernels take."""
    config = tiny_config(family=family)
    vision = replace(config.vision, width=64, mlp_width=96, num_layers=3)
    decoder = replace(config.decoder, width=64, mlp_width=96, num_heads=4, num_kv_heads=2, head_dim=64)
    return replace(config, vision=vision, decoder=decoder)


def made(dtype: torch.dtype, config: ModelConfig | None = None) -> VLM:
    torch.manual_seed(0)
    model = VLM(config or sized()).eval()
    model.init_weights()
    return model.to(dtype)


def outputs(model: VLM) -> dict[str, torch.Tensor]:
    """What a model computes for tiles, a training pack, a prefill, replies beside a prompt, and replies."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8, generator=generator)
    tokens = [torch.randint(0, 90, (length + 8,), generator=generator) for length in LENS]
    cache = PagedCache(model.config.decoder, num_tokens=512, block_size=16, dtype=model.dtype)
    sequences = [CachedSequence() for _ in LENS]
    done = [0, 0, 0]

    def step(*news: int) -> torch.Tensor:
        some = [s for s, new in enumerate(news) if new]
        now = cache.step([sequences[s] for s in some], tuple(news[s] for s in some))
        ids = torch.cat([tokens[s][done[s] : done[s] + news[s]] for s in some])
        for s in some:
            done[s] += news[s]
        return model(ids, now.layout, cache=now)

    found = {"vision": model.encode_tiles(tiles), "packed": model(torch.cat(tokens), Layout.packed(tuple(map(len, tokens))))}
    found |= {"prefill": step(20, 3, 40), "mixed": step(1, 1, 30)}
    found |= {f"replies {n}": step(1, 1, 1) for n in range(5)}
    found["head"] = model.head(found["replies 4"])
    return found


@torch.inference_mode()
@pytest.mark.parametrize(
    "config",
    [tiny_config(), sized(), tiny_config(norm="rms_norm", qk_norm=True), sized("qwen3"), tiny_config(family="qwen3")],
    ids=["16", "64", "6B", "Qwen3 64", "Qwen3 16"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06)])
def test_accelerated_equals_plain(dtype: torch.dtype, tolerance: float, config: ModelConfig) -> None:
    plain, fast = outputs(made(dtype, config)), outputs(accelerate(made(dtype, config)))
    for name, expected in plain.items():
        assert (fast[name].float() - expected.float()).abs().max() <= tolerance, name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_stay_the_same_objects_and_train_as_before(dtype: torch.dtype, family: str) -> None:
    plain, fast = made(dtype, sized(family)), made(dtype, sized(family))
    before = dict(fast.named_parameters())
    accelerate(fast)
    after = dict(fast.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    tokens, tiles = torch.arange(20), torch.randint(0, 256, (1, 28, 28, 3), dtype=torch.uint8)
    weights_TD, weights_GUD = torch.randn(20, 64), torch.randn(1, 1, 64)
    for model in (plain, fast):
        hidden_TD, vision_GUD = model(tokens, Layout.packed((15, 5))).float(), model.encode_tiles(tiles).float()
        ((hidden_TD * weights_TD).sum() + (vision_GUD * weights_GUD).sum()).backward()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.03}[dtype]
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            difference = (after[name].grad - parameter.grad).float().norm()  # type: ignore[operator]
            assert difference <= tolerance * (parameter.grad.float().norm() + 1e-3), name


@torch.inference_mode()
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"])
def test_an_accelerated_model_can_be_copied_pickled_and_moved(way: Callable[[VLM], VLM]) -> None:
    model = accelerate(made(torch.bfloat16))
    expected = outputs(model)
    assert all(torch.equal(value, expected[name]) for name, value in outputs(way(model)).items())
    model.float()
    exact = outputs(made(torch.bfloat16).float())
    assert all((value - exact[name]).abs().max() <= 1e-5 for name, value in outputs(model).items())


def test_an_accelerated_model_is_saved_adapted_and_merged_as_before(tmp_path: Path) -> None:
    model = accelerate(made(torch.bfloat16))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    add_lora(model, LoraConfig(rank=2, targets=("decoder",)))
    accelerate(model.to(torch.bfloat16))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.inference_mode():
        adapted = outputs(model)
        assert (adapted["prefill"] - outputs(loaded)["prefill"]).abs().max() > 0.1
        merge_lora(model)
        assert type(model.decoder.head) is Linear
        assert type(accelerate(model.decoder.head)) is (FastLinear if features.at_least("avx2") else Linear)
        merged = outputs(model)
    assert all((merged[name] - value).abs().max() <= 0.2 for name, value in adapted.items())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_model_enters_no_file_of_the_cpu_or_of_quantized_layers(dtype: torch.dtype) -> None:
    model, files = made(dtype), set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        files.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        outputs(model)
    finally:
        sys.setprofile(None)
    entered = {Path(file).parts[-2] for file in files if "ivl" in Path(file).parts}
    assert "model" in entered and not entered & {"cpu", "kernels", "quant"}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_an_engine_gives_the_same_replies_on_an_accelerated_model(family: str) -> None:
    conversations = [ask("abcdefgh" * n, *(ImageRef(picture(k), 1 + k % 3) for k in range(n % 4))) for n in range(1, 13)]
    params = SamplingParams(max_new_tokens=24)
    models = lively_model(family), accelerate(lively_model(family))
    plain, fast = (tiny_engine(model).generate(conversations, params) for model in models)
    assert [reply.tokens for reply in plain] == [reply.tokens for reply in fast] and len({reply.text for reply in plain}) > 6


@pytest.mark.parametrize("causal", [False, True])
def test_attention_spelled_out_for_training_equals_the_fused_kernel(causal: bool) -> None:
    q, k, v = (torch.randn(3, heads, 20, 16, requires_grad=True) for heads in (6, 2, 2))
    ours = CPU_ATTENTION.rectangle(q, k, v, causal=causal)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert (ours - theirs).abs().max() <= 1e-6
    for a, b in zip(torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(theirs.sum(), (q, k, v)), strict=True):
        assert (a - b).abs().max() <= 1e-5
