"""Losses of preference pairs: equal to TRL's on the same log-probabilities, where TRL has them."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from ivl.train import preference

BETA, PAIRS, TOKENS = 0.1, 7, 12


@pytest.fixture(scope="module")
def logs() -> SimpleNamespace:
    """Log-probabilities of replies of different lengths, padded as TRL has them: [chosen and rejected, tokens]."""
    g = torch.Generator().manual_seed(0)
    lens = torch.randint(3, TOKENS + 1, (2 * PAIRS,), generator=g)
    mask = torch.arange(TOKENS) < lens[:, None]
    policy = -3 * torch.rand(2 * PAIRS, TOKENS, generator=g).double() * mask
    reference = -3 * torch.rand(2 * PAIRS, TOKENS, generator=g).double() * mask
    ratios = (policy - reference).sum(1).chunk(2)
    return SimpleNamespace(
        policy=policy, reference=reference, mask=mask, ratios=ratios, lens=lens.chunk(2),
        means=(policy.sum(1) / lens).chunk(2), means_of_ratios=((policy - reference).sum(1) / lens).chunk(2),
    )  # fmt: skip


def trl_dpo(logs: SimpleNamespace, *types: str, weights: tuple[float, ...] | None = None, smoothing: float = 0.0) -> float:
    """What TRL's trainer makes of these log-probabilities: its own method, on the few attributes that it reads."""
    trl = pytest.importorskip("trl")
    padded = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.long), logs.mask.long()], 1)  # one token of prompt
    reference = logs.reference.sum(1).chunk(2)
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None, beta=BETA,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", label_smoothing=smoothing, use_weighting=False,
        loss_types=types, loss_weights=weights or (1.0,) * len(types),
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip

    def model(**_):
        nothing = torch.zeros_like(logs.policy)
        return SimpleNamespace(log_probs=logs.policy, entropy=nothing, mean_logits=nothing, is_top1=logs.mask)

    inputs = {
        "input_ids": padded, "completion_mask": padded, "attention_mask": padded,
        "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1],
    }  # fmt: skip
    return float(trl.DPOTrainer._compute_loss(trainer, model, inputs, False))


def zero() -> torch.Tensor:
    return torch.tensor(0.0)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "bco_pair", "robust"])
def test_equals_trl(logs, name):
    ours = {
        "sigmoid": lambda: preference.sigmoid(*logs.ratios, beta=BETA),
        "hinge": lambda: preference.hinge(*logs.ratios, beta=BETA),
        "ipo": lambda: preference.ipo(*logs.means_of_ratios, beta=BETA),
        "bco_pair": lambda: preference.bco(*logs.ratios, beta=BETA, shift=zero()),  # TRL has no shift any more
        "robust": lambda: preference.robust(*logs.ratios, beta=BETA, smoothing=0.2),
    }[name]()
    assert ours.shape == (PAIRS,)
    assert float(ours.mean()) == pytest.approx(trl_dpo(logs, name, smoothing=0.2), abs=1e-6)


def test_mixed_preference_optimization_equals_trl(logs):
    """The three terms with the published weights; TRL averages the generation loss over all tokens of its batch, so it is
    compared where replies are of one length."""
    mask = torch.ones(2 * PAIRS, TOKENS, dtype=torch.bool)
    full = torch.log(torch.rand(2, 2 * PAIRS, TOKENS, generator=torch.Generator().manual_seed(1)).double())
    same = SimpleNamespace(policy=full[0], reference=full[1], mask=mask)
    ratios = (full[0] - full[1]).sum(1).chunk(2)
    ours = (
        0.8 * preference.sigmoid(*ratios, beta=BETA)
        + 0.2 * preference.bco(*ratios, beta=BETA, shift=zero())
        - full[0].chunk(2)[0].mean(1)
    )
    assert float(ours.mean()) == pytest.approx(trl_dpo(same, "sigmoid", "bco_pair", "sft", weights=(0.8, 0.2, 1.0)), abs=1e-6)


def test_orpo_equals_trl(logs):
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    theirs = -orpo.ORPOTrainer.odds_ratio_loss(trainer, *logs.means)[0]  # their trainer subtracts it
    torch.testing.assert_close(preference.orpo(*logs.means, beta=BETA).float(), theirs, rtol=0, atol=1e-6)


def test_simpo_equals_trl(logs):
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = SimpleNamespace(
        beta=2.0, simpo_gamma=0.5, alpha=0.0, loss_type="simpo", label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu")
    )
    theirs = cpo.CPOTrainer.cpo_loss(trainer, *logs.means)[0]
    torch.testing.assert_close(preference.simpo(*logs.means, beta=2.0, gamma=0.5), theirs, rtol=0, atol=1e-6)


def test_kto_equals_trl_where_the_divergence_is_none(logs):
    """TRL estimates the divergence from mismatched replies. Where neither half drifts up it is 0, and KTO is TRL's apo_zero."""
    lower = tuple(-ratio.abs() for ratio in logs.ratios)
    policy = torch.zeros_like(logs.policy)
    policy[:, 0] = torch.cat(lower)
    theirs = trl_dpo(SimpleNamespace(policy=policy, reference=policy * 0, mask=logs.mask), "apo_zero")
    assert 2 * float(preference.kto(*lower, beta=BETA).mean()) == pytest.approx(theirs, abs=1e-6)


def test_smoothing_mixes_the_two_ways_round(logs):
    chosen, rejected = logs.ratios
    right, flipped = preference.sigmoid(chosen, rejected, beta=BETA), preference.sigmoid(rejected, chosen, beta=BETA)
    mixed = preference.sigmoid(chosen, rejected, beta=BETA, smoothing=0.3)
    torch.testing.assert_close(mixed, 0.7 * right + 0.3 * flipped)
    unbiased = preference.robust(chosen, rejected, beta=BETA, smoothing=0.3)
    torch.testing.assert_close(0.7 * unbiased + 0.3 * preference.robust(rejected, chosen, beta=BETA, smoothing=0.3), right)


def test_values_of_a_policy_that_equals_its_reference():
    none = torch.zeros(3)
    two = math.log(2)
    for value, want in (
        (preference.sigmoid(none, none, beta=BETA), two),
        (preference.bco(none, none, beta=BETA, shift=zero()), 2 * two),
        (preference.robust(none, none, beta=BETA, smoothing=0.1), two),
        (preference.hinge(none, none, beta=BETA), 1.0),
        (preference.ipo(none, none, beta=BETA), 25.0),
        (preference.kto(none, none, beta=BETA), 0.5),
    ):
        torch.testing.assert_close(value, torch.full((3,), want))


def test_bco_takes_the_shift_off_both_rewards(logs):
    shift = torch.tensor(0.3)
    moved = tuple(ratio - 0.3 / BETA for ratio in logs.ratios)
    torch.testing.assert_close(
        preference.bco(*logs.ratios, beta=BETA, shift=shift), preference.bco(*moved, beta=BETA, shift=zero())
    )


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "bco", "robust", "kto", "orpo", "simpo"])
def test_every_loss_pulls_the_replies_apart(name):
    """Less loss for a likelier chosen and a less likely rejected reply, and finite at the far ends."""
    options = {"bco": {"shift": zero()}, "robust": {"smoothing": 0.1}, "simpo": {"gamma": 0.5}}.get(name, {})
    loss = getattr(preference, name)
    chosen, rejected = torch.tensor([-0.7, -1.2], requires_grad=True), torch.tensor([-0.5, -0.1], requires_grad=True)
    loss(chosen, rejected, beta=BETA, **options).sum().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
    far = torch.tensor([-1e4, 0.0])
    for pair in ((far, far), (far, far.flip(0))):
        assert torch.isfinite(loss(*pair, beta=BETA, **options)).all()


def test_running_mean_is_the_mean_of_all_it_has_seen():
    shift, seen = preference.RunningMean(), []
    for step in range(5):
        new = [0.1 * step, -0.3, 0.7][: 1 + step % 3]
        seen += new
        assert shift.fold(sum(new), len(new)) == pytest.approx(sum(seen) / len(seen))
    assert shift.fold(0.0, 0.0) == pytest.approx(sum(seen) / len(seen))
    again = preference.RunningMean(shift.total, shift.count)
    assert again.fold(1.0, 1.0) == shift.fold(1.0, 1.0)
