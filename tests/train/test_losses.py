import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F

from ivl.model.vlm import VLM
from ivl.train.losses import linear_cross_entropy
from ivl.types import Layout
from tests.conftest import tiny_config


def inputs(dtype=torch.float32, m=37, d=16, v=50):
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(m, d, generator=g).to(dtype), torch.randn(v, d, generator=g).to(dtype)
    labels, weights = torch.randint(0, v, (m,), generator=g), torch.rand(m, generator=g)
    return hidden.requires_grad_(), head.requires_grad_(), labels, weights


def plain(hidden, head, labels, weights):
    return (F.cross_entropy((hidden @ head.T).float(), labels, reduction="none") * weights).sum()


@pytest.mark.parametrize("chunk", [1, 7, 37, 100, None])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_plain_cross_entropy(chunk, dtype, tolerance):
    hidden, head, labels, weights = inputs(dtype)
    want = torch.autograd.grad(2 * plain(hidden, head, labels, weights), (hidden, head))
    loss = linear_cross_entropy(hidden, head, labels, weights, chunk=chunk)
    torch.testing.assert_close(loss.total, plain(hidden, head, labels, weights), rtol=1e-5, atol=1e-5)
    for got, expected in zip(torch.autograd.grad(2 * loss.total, (hidden, head)), want, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_bf16_hidden_states_multiply_in_bf16_and_keep_float32_gradients():
    hidden, head, labels, weights = inputs()
    loss = linear_cross_entropy(hidden.bfloat16(), head, labels, weights, chunk=10)
    rounded = (hidden.detach().bfloat16().requires_grad_(), head.detach().bfloat16().requires_grad_())
    expected = plain(*rounded, labels, weights)
    torch.testing.assert_close(loss.total, expected, rtol=1e-3, atol=1e-3)
    wanted = torch.autograd.grad(expected, rounded)
    for got, want in zip(torch.autograd.grad(loss.total, (hidden, head)), wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=5e-2, atol=5e-2)


def test_only_the_needed_gradient_is_computed():
    hidden, head, labels, weights = inputs()
    both = torch.autograd.grad(linear_cross_entropy(hidden, head, labels, weights).total, (hidden, head))
    (only_hidden,) = torch.autograd.grad(linear_cross_entropy(hidden, head.detach(), labels, weights).total, (hidden,))
    (only_head,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), head, labels, weights).total, (head,))
    assert only_hidden.equal(both[0]) and only_head.equal(both[1])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, head, labels, weights).total.requires_grad


def test_accuracy_and_losses_of_each_token():
    hidden, head, labels, weights = inputs()
    loss = linear_cross_entropy(hidden, head, labels, weights, chunk=5)
    logits = hidden @ head.T
    assert loss.correct_M.equal(logits.argmax(1) == labels)
    torch.testing.assert_close(loss.ce_M, F.cross_entropy(logits, labels, reduction="none"))


def test_nothing_trained_is_a_zero_sum():
    hidden, head, labels, weights = inputs(m=0)
    loss = linear_cross_entropy(hidden, head, labels, weights)
    loss.total.backward()
    assert loss.total == 0 and not head.grad.any()


def test_a_step_that_is_told_its_positions_reads_no_value():
    """Fake tensors have shapes and no values: what reads one, and would wait for a card, fails on them."""
    config, lens = tiny_config(), (6, 6)
    with FakeTensorMode():
        model = VLM(config)
        tiles_GSSC, at_X = torch.zeros(2, 28, 28, 3, dtype=torch.uint8), torch.arange(2 * config.tokens_per_tile)
        tokens_T, labels_M, weights_M = torch.zeros(12, dtype=torch.long), torch.zeros(5, dtype=torch.long), torch.ones(5)
        vision_RUD = model.encode_tiles(tiles_GSSC)[torch.arange(2)]
        hidden_TD = model(tokens_T, Layout.packed(lens), vision_RUD, at_X=at_X)
        loss = linear_cross_entropy(hidden_TD[torch.arange(5)], model.decoder.head.matrix(), labels_M, weights_M)
        loss.total.backward()
        assert all(p.grad is not None for p in model.parameters())
        with pytest.raises(DynamicOutputShapeException):
            model(tokens_T, Layout.packed(lens), vision_RUD)
