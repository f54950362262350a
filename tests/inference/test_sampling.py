"""Sampling agrees with plain definitions."""

from __future__ import annotations

import pytest
import torch

from ivl.errors import InputError
from ivl.inference.sampling import SampledToken, Sampler, candidates, sample
from ivl.types import SamplingParams


def oracle(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Keep tokens from the most likely down, until top_k are kept, or their renormalised probability reaches top_p, or the
    next is less than min_p times as likely as the first."""
    order = logits.argsort(descending=True).tolist()[: top_k or None]
    probabilities = logits[order].double().softmax(0).tolist()
    kept, total = set(), 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if probability < min_p * probabilities[0]:
            break
        kept.add(token)
        total += probability
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.6, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.3), (0, 0.95), (7, 0.8), (1, 0.01), (500, 0.99)])
def test_candidates_equal_the_definition(top_k: int, top_p: float, min_p: float) -> None:
    for seed in range(20):
        logits = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 2
        probabilities, ids = candidates(logits, top_k, top_p, min_p)
        kept = set(range(200)) if ids is None else set(ids.tolist())
        assert kept == oracle(logits, top_k, top_p, min_p)
        exact = logits.softmax(0) if ids is None else logits[ids].softmax(0)
        torch.testing.assert_close(probabilities / probabilities.sum(), exact)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 0.9)])
def test_draws_follow_the_distribution(top_k: int, top_p: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    sampler = Sampler(SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, seed=1), [])
    counts = torch.bincount(torch.tensor([sampler.pick(logits) for _ in range(8000)]), minlength=12) / 8000
    probabilities, ids = candidates(logits / 0.7, top_k, top_p)
    expected = torch.zeros(12).index_copy(0, torch.arange(12) if ids is None else ids, probabilities / probabilities.sum())
    assert (counts - expected).abs().max() < 0.02


def test_repetition_penalty_weakens_what_was_seen() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    sampler = Sampler(SamplingParams(repetition_penalty=1.2), [0])
    assert sampler.pick(logits) == 1  # token 0 is in the prompt: 2.0 / 1.2 < 1.9
    assert sampler.pick(logits) == 0  # both seen now
    assert sampler.pick(torch.tensor([-1.0, -1.1, -1.15])) == 2  # negative scores are multiplied


def test_greedy_and_sampled_requests_share_a_batch() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampled = SamplingParams(temperature=1.0, seed=5)
    alone = Sampler(sampled, []).pick(logits[1])
    greedy = [Sampler(SamplingParams(), []) for _ in range(2)]
    tokens = [each.token for each in sample(logits, [greedy[0], Sampler(sampled, []), greedy[1]])]
    assert tokens == [int(logits[0].argmax()), alone, int(logits[2].argmax())]


def test_scores_that_are_not_finite_give_no_token() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 3], logits[2, 4] = torch.nan, 1.0
    first, second, third = sample(logits, [Sampler(SamplingParams(), []) for _ in range(3)])
    assert isinstance(first, SampledToken) and isinstance(second, InputError)
    assert isinstance(third, SampledToken) and third.token == 4


def test_presence_and_frequency_penalties_count_the_reply_and_not_the_prompt() -> None:
    logits = torch.tensor([2.0, 1.7, 1.25, -3.0])
    presence = Sampler(SamplingParams(presence_penalty=0.5), [0, 0, 0])
    assert [presence.pick(logits) for _ in range(5)] == [0, 1, 0, 0, 0]  # 2.0, 1.7, then 1.5 for good
    frequency = Sampler(SamplingParams(frequency_penalty=0.5), [0, 0, 0])
    assert [frequency.pick(logits) for _ in range(6)] == [0, 1, 0, 2, 1, 0]
    both = Sampler(SamplingParams(presence_penalty=2.0, frequency_penalty=1.5), [])
    assert [both.pick(logits) for _ in range(4)] == [0, 1, 2, 0]  # 2.0 - 3.5 is still above -3
    negative = Sampler(SamplingParams(presence_penalty=-1.0), [])
    assert [negative.pick(torch.tensor([1.0, 1.5])) for _ in range(3)] == [1, 1, 1]


def test_repetition_penalty_equals_the_one_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        prompt = torch.randint(0, 40, (15,), generator=rng).tolist()
        logits = torch.randn(40, generator=rng) * 3
        theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), logits[None].clone())[0]
        sampler = Sampler(SamplingParams(repetition_penalty=1.7), prompt)
        assert sampler.pick(logits) == int(theirs.argmax())
        assert sampler.seen is not None and set(sampler.seen.tolist()) == {*prompt, int(theirs.argmax())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_the_models_own(dtype: torch.dtype) -> None:
    logits = (torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    expected = logits.float().log_softmax(-1)
    every = [
        SamplingParams(logprobs=0),
        SamplingParams(logprobs=3, temperature=0.3, top_k=4, presence_penalty=1.0, repetition_penalty=1.3, seed=1),
        SamplingParams(logprobs=70),
    ]
    chosen = sample(logits, [Sampler(params, [1, 2]) for params in every])
    for each, params, row in zip(chosen, every, expected, strict=True):
        assert each.logprob is not None and each.logprob.token == each.token
        assert each.logprob.logprob == pytest.approx(float(row[each.token]), abs=1e-5)
        best, ids = row.topk(min(params.logprobs or 0, 50))
        assert [token for token, _ in each.logprob.top] == ids.tolist()
        assert [value for _, value in each.logprob.top] == pytest.approx(best.tolist(), abs=1e-5)
    assert sample(logits, [Sampler(SamplingParams(), []) for _ in range(3)])[0].logprob is None


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"top_k": 30}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.8, "min_p": 0.02}]
)
def test_a_seed_draws_the_same_in_any_batch_and_never_what_is_forbidden(options: dict[str, float]) -> None:
    logits = torch.randn(6, 400, generator=torch.Generator().manual_seed(0))
    logits[:, 100:] = -torch.inf
    params = [SamplingParams(temperature=1.0, seed=n, **options) for n in range(6)]
    samplers = [Sampler(each, []) for each in params]
    together = [[each.token for each in sample(logits, samplers)] for _ in range(20)]
    for row, each in enumerate(params):
        alone = Sampler(each, [])
        assert [sample(logits[row : row + 1], [alone])[0].token for _ in range(20)] == [tokens[row] for tokens in together]
    assert max(map(max, together)) < 100 and len({tuple(tokens) for tokens in together}) > 10


@pytest.mark.parametrize(
    "options",
    [{"min_p": 1.5}, {"min_p": -0.1}, {"presence_penalty": 2.5}, {"frequency_penalty": -3.0}, {"logprobs": -1}, {"top_p": 0.0}],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name} must be .*{value}"):
        SamplingParams(**options)
