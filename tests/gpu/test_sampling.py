"""What a card samples is what `Sampler` samples: the same random numbers, the same order of candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ivl.errors import InputError
from ivl.gpu.sampling import sample_on_card
from ivl.inference.sampling import SampledToken, Sampler, sample
from ivl.types import SamplingParams

GRID = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    for t in (0.0, 0.5, 1.7)
    for k in (0, 1, 9, 500)
    for p in (1.0, 0.9, 0.3)
    for m in (0.0, 0.1)
] + [
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(temperature=0.8, repetition_penalty=1.4, presence_penalty=0.5),
    SamplingParams(temperature=1.0, top_p=0.9, frequency_penalty=0.4, logprobs=3),
    SamplingParams(presence_penalty=1.0, frequency_penalty=0.2, logprobs=0),
    SamplingParams(logprobs=400),
]  # fmt: skip


def samplers() -> list[Sampler]:
    return [Sampler(replace(params, seed=seed), [seed % 50, 3, 7]) for seed, params in enumerate(GRID)]


def test_a_card_chooses_what_the_cpu_chooses() -> None:
    generator = torch.Generator().manual_seed(0)
    on_card, on_cpu = samplers(), samplers()
    for _ in range(20):
        logits = torch.randn(len(GRID), 300, generator=generator) * 2
        for params, ours, theirs in zip(GRID, sample_on_card(logits, on_card), sample(logits.clone(), on_cpu), strict=True):
            assert isinstance(ours, SampledToken) and isinstance(theirs, SampledToken)
            assert ours.token == theirs.token, params
            assert (ours.logprob is None) == (theirs.logprob is None)
            if ours.logprob is not None and theirs.logprob is not None:
                assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-5)
                assert [token for token, _ in ours.logprob.top] == [token for token, _ in theirs.logprob.top]
    assert all(a.counts == b.counts for a, b in zip(on_card, on_cpu, strict=True))


def test_a_row_is_sampled_alike_in_any_batch() -> None:
    logits = torch.randn(len(GRID), 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = [each.token for each in sample_on_card(logits, samplers()) if isinstance(each, SampledToken)]
    for row, sampler in enumerate(samplers()):
        (alone,) = sample_on_card(logits[row : row + 1], [sampler])
        assert isinstance(alone, SampledToken) and alone.token == together[row]


def test_a_failing_row_concerns_no_other() -> None:
    class Broken:
        def allowed(self) -> torch.Tensor:
            raise InputError("broken")

    logits = torch.zeros(4, 5)
    logits[1, 3], logits[3, 2] = torch.nan, 1.0
    given = [Sampler(SamplingParams(), []) for _ in range(4)]
    given[1] = Sampler(SamplingParams(temperature=1.0, top_p=0.5), [])
    given[2] = Sampler(SamplingParams(), [], Broken())  # type: ignore[arg-type]
    first, second, third, fourth = sample_on_card(logits, given)
    assert isinstance(first, SampledToken) and isinstance(second, InputError) and "finite" in str(second)
    assert isinstance(third, InputError) and str(third) == "broken"
    assert isinstance(fourth, SampledToken) and fourth.token == 2
