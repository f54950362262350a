"""Losses equal TRL's on the same log-probabilities; the reward shift is a cumulative mean, over ranks too."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ivl.parallel.launch import start_world, stop_world
from ivl.preference import losses as preference
from ivl.preference.config import PreferenceConfig
from ivl.preference.objective import PreferenceObjective
from ivl.preference.replies import Replies
from tests.helpers.ranks import on_ranks

BETA, LENGTH = 0.1, 12
dpo = pytest.importorskip("trl.trainer.dpo_trainer", exc_type=ImportError)


@pytest.fixture
def logps() -> dict[str, torch.Tensor]:
    """Per-token log-probabilities of 5 chosen and 5 rejected replies of different lengths, and the reference's sums."""
    g = torch.Generator().manual_seed(0)
    lens = torch.randint(1, LENGTH, (10,), generator=g)
    mask = torch.arange(LENGTH) < lens[:, None]
    tokens = -torch.rand(10, LENGTH, generator=g).double() * 4 * mask
    return {"tokens": tokens, "mask": mask, "reference": tokens.sum(1) + 3 * torch.randn(10, generator=g).double()}


def by_trl(loss_type: str, logps: dict[str, torch.Tensor], smoothing: float = 0.0) -> float:
    """The loss of TRL's trainer, given a model that returns our log-probabilities."""
    nothing = torch.zeros_like(logps["tokens"])
    outputs = SimpleNamespace(log_probs=logps["tokens"], entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0], beta=BETA, label_smoothing=smoothing,
        use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
    )  # fmt: skip
    # A first position that is never a completion: TRL shifts the mask by one.
    mask = torch.cat([torch.zeros(10, 1, dtype=torch.long), logps["mask"].long()], dim=1)
    chosen, rejected = logps["reference"].chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    return float(dpo.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False))


def ratios(logps: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list((logps["tokens"].sum(1) - logps["reference"]).chunk(2))


def test_losses_equal_trls(logps: dict[str, torch.Tensor]) -> None:
    pair, lens = ratios(logps), logps["mask"].sum(1).chunk(2)
    per_token = [x / n for x, n in zip(pair, lens, strict=True)]
    zero = torch.tensor(0.0)
    ours = {
        "sigmoid": preference.sigmoid(*pair, beta=BETA), "hinge": preference.hinge(*pair, beta=BETA),
        "ipo": preference.ipo(*per_token, beta=BETA), "bco_pair": preference.bco(*pair, beta=BETA, shift=zero),
    }  # fmt: skip
    for name, loss_P in ours.items():
        assert abs(float(loss_P.mean()) - by_trl(name, logps)) <= 1e-6, name
    for smoothing in (0.0, 0.1, 0.3):
        robust = preference.robust(*pair, beta=BETA, smoothing=smoothing)
        assert abs(float(robust.mean()) - by_trl("robust", logps, smoothing)) <= 1e-6


def test_the_generation_loss_of_a_pair_equals_trls(logps: dict[str, torch.Tensor]) -> None:
    sums, lens = logps["tokens"].sum(1), logps["mask"].sum(1)
    for at in range(5):
        one = {"tokens": logps["tokens"][[at, at + 5]], "mask": logps["mask"][[at, at + 5]]}
        one["tokens"], one["mask"] = (x.repeat_interleave(5, 0) for x in (one["tokens"], one["mask"]))
        assert abs(float(-sums[at] / lens[at]) - by_trl("sft", {**logps, **one})) <= 1e-6


def test_losses_without_a_reference_equal_trls(logps: dict[str, torch.Tensor]) -> None:
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer", exc_type=ImportError).ORPOTrainer
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", exc_type=ImportError).CPOTrainer
    means = (logps["tokens"].sum(1) / logps["mask"].sum(1)).chunk(2)
    trainer = SimpleNamespace(
        beta=BETA, accelerator=SimpleNamespace(device="cpu"), alpha=0.0, loss_type="simpo", simpo_gamma=0.5, label_smoothing=0.0
    )
    theirs = -orpo.odds_ratio_loss(trainer, *means)[0]
    assert torch.allclose(preference.orpo(*means, beta=BETA).float(), theirs, atol=1e-6)
    theirs = cpo.cpo_loss(trainer, *means)[0]
    assert torch.allclose(preference.simpo(*means, beta=BETA, gamma=0.5), theirs, atol=1e-6)


def test_a_policy_at_its_reference_has_the_losses_of_ln_2() -> None:
    zero, ln2 = torch.zeros(3), torch.full((3,), 2.0).log()
    assert torch.allclose(preference.sigmoid(zero, zero, beta=0.1), ln2)
    assert torch.allclose(preference.bco(zero, zero, beta=0.1, shift=torch.tensor(0.0)), 2 * ln2)
    assert torch.allclose(preference.kto(zero, zero, beta=0.1), torch.full((3,), 0.5))


def rewards(step: int, rank: int) -> torch.Tensor:
    return torch.randn(3 + rank, 2, generator=torch.Generator().manual_seed(10 * step + rank))


def follow_shift(rank: int, out: Path, size: int) -> None:
    world = start_world("cpu")
    try:
        objective = PreferenceObjective(PreferenceConfig(sigmoid=0, generation=0, bco=1, beta=0.5), lambda m, b: b, world)
        shifts = []
        for step in range(4):
            if step == 2:  # as a resumed run does
                state = objective.state()
                objective = PreferenceObjective(objective.config, objective.reference, world)
                objective.restore(state)
            shifts.append(float(objective._shift(rewards(step, rank), True)))
        torch.save(shifts, out / f"{rank}.pt")
    finally:
        stop_world(world)


@pytest.mark.parametrize("size", [1, 2])
def test_the_shift_is_the_mean_of_all_rewards_so_far(tmp_path: Path, size: int) -> None:
    on_ranks(size, follow_shift, tmp_path, size)
    for rank in range(size):
        shifts, seen = torch.load(tmp_path / f"{rank}.pt"), torch.empty(0)
        for step, shift in enumerate(shifts):
            # This step's own rewards are in it, of every rank.
            seen = torch.cat([seen, *(0.5 * rewards(step, r).flatten() for r in range(size))])
            assert abs(shift - float(seen.mean())) <= 1e-6


def test_validation_leaves_the_shift_alone() -> None:
    objective = PreferenceObjective(PreferenceConfig(), lambda m, b: b)
    objective._shift(torch.ones(2, 2), True)
    before = objective.state()
    assert objective._shift(5 * torch.ones(2, 2), False) == pytest.approx(0.1) and objective.state() == before


def test_every_term_can_be_used_alone() -> None:
    replies = Replies(torch.tensor([-3.0, -5.0]), torch.tensor([4, 6]))
    for name in ("sigmoid", "bco", "generation", "ipo", "hinge", "robust", "kto", "orpo", "simpo"):
        weights = dict.fromkeys(("sigmoid", "bco", "generation"), 0.0) | {name: 1.0}
        objective = PreferenceObjective(PreferenceConfig(**weights), lambda m, b: b)
        terms = objective._terms(torch.tensor([[0.5, -0.5]]), replies, train=True)
        assert list(terms) == [name] and terms[name].shape == (1,)
    with pytest.raises(ValueError, match="every weight"):
        PreferenceConfig(sigmoid=0, bco=0, generation=0)
