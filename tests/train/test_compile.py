"""Compiled layers compute what plain ones do, by two graphs for all decoder layers and two for all of the ViT's."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ivl.cpu import accelerate
from ivl.model.vlm import VLM
from ivl.parallel.compile import compile_layers
from ivl.train.objectives import next_token
from ivl.train.precision import computing
from tests.helpers.training import staged, tiny_batch


def gradients(model: VLM, seed: int) -> dict[str, torch.Tensor]:
    """Of a pack whose layout and tiles follow from the seed."""
    model.zero_grad()
    lens = tuple(9 + (seed * 5 + 3 * n) % 11 for n in range(3 + seed % 4))
    loss = next_token(model, tiny_batch(seed, lens=lens, tiles=2 + seed % 2))
    loss.total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_set_of_graphs_serves_all_layers_and_layouts(checkpointing: bool) -> None:
    torch._dynamo.reset()
    plain, model, counter = staged(seed=0), staged(seed=0, checkpointing=checkpointing), CompileCounter()
    compile_layers(model, counter)
    accelerate(model)
    for seed in range(10):
        expected, found = gradients(plain, seed), gradients(model, seed)
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 4
    with torch.no_grad():
        torch.testing.assert_close(next_token(model, tiny_batch()).total, next_token(plain, tiny_batch()).total)
    assert counter.frame_count == 4


def test_graphs_serve_bf16_copies_of_the_weights() -> None:
    torch._dynamo.reset()
    model, counter = staged(seed=0), CompileCounter()
    compile_layers(model, counter)
    weights = computing(model, "bf16")
    for seed in range(4):
        with weights:
            gradients(model, seed)
    assert counter.frame_count == 4
