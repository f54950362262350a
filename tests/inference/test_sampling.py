"""Sampling agrees with plain definitions."""

from __future__ import annotations

import pytest
import torch

from ivl.inference import sampling
from ivl.inference.sampling import Sampler, candidates, choose
from ivl.types import SamplingParams


def oracle(logits: torch.Tensor, top_k: int, top_p: float) -> set[int]:
    """Keep tokens from the most likely down, until top_k are kept or their renormalised probability reaches top_p."""
    order = logits.argsort(descending=True).tolist()[: top_k or None]
    probabilities = logits[order].double().softmax(0).tolist()
    kept, total = set(), 0.0
    for token, probability in zip(order, probabilities, strict=True):
        kept.add(token)
        total += probability
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize("looked_at", [4, 1024])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.3), (0, 0.95), (7, 0.8), (1, 0.01), (500, 0.99)])
def test_candidates_equal_the_definition(top_k: int, top_p: float, looked_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TOP_P_CANDIDATES", looked_at)
    for seed in range(20):
        logits = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 2
        probabilities, ids = candidates(logits, top_k, top_p)
        kept = set(range(200)) if ids is None else set(ids.tolist())
        assert kept == oracle(logits, top_k, top_p)
        exact = logits.softmax(0) if ids is None else logits[ids].softmax(0)
        torch.testing.assert_close(probabilities / probabilities.sum(), exact)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 0.9)])
def test_draws_follow_the_distribution(top_k: int, top_p: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    sampler = Sampler(SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, seed=1), [], 12)
    counts = torch.bincount(torch.tensor([sampler.pick(logits) for _ in range(8000)]), minlength=12) / 8000
    probabilities, ids = candidates(logits / 0.7, top_k, top_p)
    expected = torch.zeros(12).index_copy(0, torch.arange(12) if ids is None else ids, probabilities / probabilities.sum())
    assert (counts - expected).abs().max() < 0.02


def test_repetition_penalty_weakens_what_was_seen() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    sampler = Sampler(SamplingParams(repetition_penalty=1.2), [0], 3)
    assert sampler.pick(logits) == 1  # token 0 is in the prompt: 2.0 / 1.2 < 1.9
    assert sampler.pick(logits) == 0  # both seen now
    assert sampler.pick(torch.tensor([-1.0, -1.1, -1.15])) == 2  # negative scores are multiplied


def test_greedy_and_sampled_requests_share_a_batch() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampled = SamplingParams(temperature=1.0, seed=5)
    alone = Sampler(sampled, [], 50).pick(logits[1])
    greedy = [Sampler(SamplingParams(), [], 50) for _ in range(2)]
    tokens = [each.token for each in choose(logits, [greedy[0], Sampler(sampled, [], 50), greedy[1]])]
    assert tokens == [int(logits[0].argmax()), alone, int(logits[2].argmax())]


def test_scores_that_are_not_finite_are_refused() -> None:
    from ivl.errors import InputError

    logits = torch.zeros(2, 5)
    logits[1, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        choose(logits, [Sampler(SamplingParams(), [], 5) for _ in range(2)])
