"""Laws of the kernels: as accurate as torch's own, a row alone equals the row in company, and torch takes over elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ivl.cpu import accelerate
from ivl.cpu.kernels import features, ops
from ivl.cpu.linear import fused_linear
from ivl.model.cache import CachedSequence, PagedCache
from ivl.model.decoder import rotary, rotate
from ivl.model.linear import Linear, swiglu
from ivl.model.vlm import VLM
from tests.conftest import tiny_config

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not features.at_least("avx2"), reason="no kernels on this platform")


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square difference."""
    return (actual.double() - exact).square().mean().sqrt().item()


@pytest.fixture(params=["amx", "vectors"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of the linear kernel, where the processor has both."""
    if request.param == "amx" and not features.at_least("amx"):
        pytest.skip("no AMX on this processor")
    plain = features.at_least
    monkeypatch.setattr(features, "at_least", lambda level: request.param == "amx" if level == "amx" else plain(level))


@torch.inference_mode()
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize(("out", "width"), [(33, 32), (1152, 896), (1000, 4864)])
def test_linear_is_as_accurate_as_torch(rows: int, out: int, width: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, width).to(BF16), torch.randn(out, width).to(BF16), torch.randn(out).to(BF16)
    for b in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert error(ops.linear(x, weight, b), exact) <= 1.01 * error(F.linear(x, weight, b), exact)


@torch.inference_mode()
@pytest.mark.usefixtures("instructions")
def test_a_row_does_not_depend_on_its_company() -> None:
    x, weight = torch.randn(16, 256).to(BF16), torch.randn(100, 256).to(BF16)
    together = ops.linear(x, weight, None)
    for rows in (1, 2, 5, 8):
        assert torch.equal(ops.linear(x[:rows], weight, None), together[:rows])


@torch.inference_mode()
@pytest.mark.usefixtures("instructions")
def test_linear_takes_rows_of_a_wider_tensor_and_more_dimensions() -> None:
    wide, weight = torch.randn(6, 128).to(BF16), torch.randn(40, 64).to(BF16)
    assert torch.equal(ops.linear(wide[:, 64:], weight, None), ops.linear(wide[:, 64:].clone(), weight, None))
    assert ops.linear(wide.view(2, 3, 128)[..., :64], weight, None).shape == (2, 3, 40)


@torch.inference_mode()
def test_rms_norm_swiglu_and_rotation_are_as_accurate_as_torch() -> None:
    x, weight = 5 * torch.randn(37, 896).to(BF16), torch.randn(896).to(BF16)
    exact = F.rms_norm(x.double(), (896,), weight.double(), 1e-6)
    assert error(ops.rms_norm(x, weight, 1e-6), exact) <= 1.01 * error(F.rms_norm(x, (896,), weight, 1e-6), exact)

    gate_up = 8 * torch.randn(37, 512).to(BF16)
    gate, up = gate_up.chunk(2, dim=-1)
    exact = F.silu(gate.double()) * up.double()
    assert error(ops.swiglu(gate_up), exact) <= 1.01 * error(F.silu(gate) * up, exact)

    heads, angles = torch.randn(37, 18, 64).to(BF16), torch.rand(37, 1, 32).repeat(1, 1, 2) * 100
    exact = rotate(heads.double(), (angles.double().cos(), angles.double().sin()))[:, :16]
    by_torch = rotate(heads[:, :16].float(), (angles.cos(), angles.sin())).to(BF16)
    untouched = heads[:, 16:].clone()
    ops.rotate_(heads[:, :16], angles.cos(), angles.sin())
    assert error(heads[:, :16], exact) <= 1.01 * error(by_torch, exact) and torch.equal(heads[:, 16:], untouched)


@torch.inference_mode()
@pytest.mark.parametrize(("rows", "size"), [(1, 128), (16, 64), (300, 128)])
def test_heads_are_normalized_in_place_as_accurately_as_by_torch(rows: int, size: int) -> None:
    """Query heads by one weight, key heads by another, and values not at all; rows may be parts of wider ones."""
    torch.manual_seed(rows)
    N, K = 6, 2
    wide = torch.randn(rows, (N + 2 * K) * size + 32).to(BF16)
    before = wide.clone()
    q_weight, k_weight = (torch.randn(size).to(BF16) + 1 for _ in range(2))
    ops.norm_heads_(wide[:, :-32].unflatten(1, (-1, size)), (q_weight, 1e-6), (k_weight, 1e-6), N, K)
    after, heads = (x[:, :-32].unflatten(1, (-1, size)) for x in (wide, before))
    for span, weight in ((slice(0, N), q_weight), (slice(N, N + K), k_weight)):
        exact = F.rms_norm(heads[:, span].double(), (size,), weight.double(), 1e-6)
        theirs = F.rms_norm(heads[:, span], (size,), weight, 1e-6)
        assert error(after[:, span], exact) <= 1.01 * error(theirs, exact)
    assert torch.equal(after[:, N + K :], heads[:, N + K :]) and torch.equal(wide[:, -32:], before[:, -32:])


@pytest.mark.skipif(not features.at_least("amx"), reason="no AMX on this processor")
@torch.inference_mode()
@pytest.mark.parametrize(
    ("new", "total", "heads", "kv_heads", "size"), [(64, 64, 4, 2, 64), (131, 300, 6, 2, 64), (97, 97, 3, 3, 128)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_as_accurate_as_torch(new: int, total: int, heads: int, kv_heads: int, size: int, causal: bool) -> None:
    torch.manual_seed(new)
    qkv = torch.randn(total, heads + 2 * kv_heads, size).to(BF16)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    q = 3 * q[-new:]
    mask = torch.ones(new, total, dtype=torch.bool).tril(total - new) if causal else None

    def by_torch(dtype: torch.dtype) -> torch.Tensor:
        q_, k_, v_ = (x.to(dtype).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    exact = by_torch(torch.float64)
    assert error(ops.attention(q, k, v, causal=causal), exact) <= 1.05 * error(by_torch(BF16), exact)


@torch.inference_mode()
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(64, 14, 2), (64, 4, 4), (128, 16, 8), (128, 10, 1)])
def test_decoding_writes_the_cache_and_attends_to_it(size: int, heads: int, kv_heads: int) -> None:
    torch.manual_seed(size)
    config = replace(tiny_config().decoder, num_heads=heads, num_kv_heads=kv_heads, head_dim=size)
    lens = (20, 3, 70, 1, 16)
    cache = PagedCache(config, num_tokens=1024, block_size=16, dtype=BF16)
    sequences = [CachedSequence() for _ in lens]
    cache.step(sequences, lens)
    step = cache.step(sequences, (1,) * len(lens))
    cache.keys.normal_(std=2)
    cache.values.normal_()
    qkv = torch.randn(len(lens), heads + 2 * kv_heads, size).to(BF16)
    factors = rotary(config, step.layout, torch.device("cpu"), torch.float32)
    past_S = torch.tensor(step.layout.past_lens)
    out = ops.decode_attention(
        qkv.clone(), factors, cache.keys[1], cache.values[1], step.table_SB, past_S, block_size=16, longest=71
    )
    keys, values = cache.keys.clone(), cache.values.clone()
    q, k = ops.rotate_(qkv.clone()[:, : heads + kv_heads], *factors).split((heads, kv_heads), dim=1)
    step.write(1, k, qkv[:, heads + kv_heads :])
    assert torch.equal(cache.keys, keys) and torch.equal(cache.values, values)
    precise = rotate(qkv.double()[:, :heads], tuple(factor.double() for factor in factors))
    for seq in range(len(lens)):

        def by_torch(q: torch.Tensor, seq: int = seq) -> torch.Tensor:
            k, v = (x.to(q.dtype).transpose(0, 1).unsqueeze(0) for x in step.read(1, seq))
            return F.scaled_dot_product_attention(q[seq, :, None].unsqueeze(0), k, v, enable_gqa=True)[0, :, 0]

        exact = by_torch(precise)
        assert error(out[seq], exact) <= 1.05 * error(by_torch(q), exact)


@torch.inference_mode()
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rows", [1, 2, 11, 16])
def test_what_goes_round_a_product_may_go_into_it(rows: int) -> None:
    torch.manual_seed(0)
    norm, up, down = nn.RMSNorm(64, eps=1e-6).to(BF16), Linear(64, 192, bias=True).to(BF16), Linear(96, 64, bias=False).to(BF16)
    accelerate(nn.ModuleList([norm, up, down]))
    for tensor in (norm.weight, up.weight, up.bias, down.weight):
        tensor.normal_()
    x = torch.randn(rows, 64).to(BF16)
    fused = fused_linear(down, fused_linear(up, x, norm=norm), gated=True, residual=x)
    pieces = x + down(swiglu(up(norm(x))))
    x_, up_ = x.double(), up.weight.double()
    gate_up = F.linear(F.rms_norm(x_, (64,), norm.weight.double(), 1e-6), up_, up.bias.double())
    exact = x_ + F.linear(F.silu(gate_up[:, :96]) * gate_up[:, 96:], down.weight.double())
    assert error(fused, exact) <= (1.2 if rows == 1 else 1.05) * error(pieces, exact)


@torch.inference_mode()
def test_extreme_values_stay_what_they_are() -> None:
    gate = torch.tensor([-300.0, -88.0, 0.0, 88.0, 300.0, 3e38, -3e38, float("nan")] * 4).to(BF16)
    gate_up = torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0)
    assert torch.allclose(ops.swiglu(gate_up), F.silu(gate.float()).to(BF16), atol=1e-35, equal_nan=True)
    x = torch.full((1, 32), float("inf")).to(BF16)
    assert ops.linear(x, torch.ones(32, 32).to(BF16), None).isinf().all()
    assert ops.linear(x, torch.zeros(32, 32).to(BF16), None).isnan().all()


def test_torch_takes_what_the_kernels_do_not() -> None:
    layer = Linear(48, 40, bias=True).to(BF16)
    layer.weight.data.normal_()
    layer.bias.data.zero_()
    assert type(accelerate(layer)) is Linear, "48 is no multiple of 32"
    with torch.no_grad():
        assert not ops.takes(torch.randn(2, 64)) and ops.takes(torch.randn(2, 64).to(BF16))
    assert not ops.takes(torch.randn(2, 64).to(BF16)), "a gradient may be wanted"


def test_gradients_are_those_of_the_formulas() -> None:
    norm = accelerate(nn.RMSNorm(64, eps=1e-6).to(BF16))
    x = torch.randn(3, 64).to(BF16).requires_grad_()
    swiglu(norm(x)).sum().backward()
    exact = x.detach().double().requires_grad_()
    swiglu(F.rms_norm(exact, (64,), eps=1e-6)).sum().backward()
    assert torch.allclose(x.grad.double(), exact.grad, atol=0.05)


@torch.inference_mode()
def test_a_bfloat16_model_prefills_and_decodes_as_in_one_pass() -> None:
    config = tiny_config()
    decoder = replace(config.decoder, width=64, mlp_width=96, num_heads=4, num_kv_heads=2, head_dim=64)
    torch.manual_seed(0)
    model = VLM(replace(config, decoder=decoder)).eval()
    model.init_weights()
    model.to(BF16)
    lens = (20, 3, 70)
    tokens = [torch.randint(0, 90, (n + 5,)) for n in lens]
    from ivl.types import Layout

    whole = model.float()(torch.cat(tokens), Layout.packed(tuple(len(t) for t in tokens))).split([len(t) for t in tokens])
    accelerate(model.to(BF16))
    cache = PagedCache(decoder, num_tokens=512, block_size=16, dtype=BF16)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    sequences = [CachedSequence() for _ in lens]
    step = cache.step(sequences, lens)
    model(torch.cat([t[:n] for t, n in zip(tokens, lens, strict=True)]), step.layout, cache=step)
    for i in range(5):
        step = cache.step(sequences, (1, 1, 1))
        hidden = model(torch.stack([t[n + i] for t, n in zip(tokens, lens, strict=True)]), step.layout, cache=step)
        expected = torch.stack([w[n + i] for w, n in zip(whole, lens, strict=True)])
        assert (hidden.float() - expected).abs().max() <= 0.05
