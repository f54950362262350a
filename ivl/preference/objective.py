"""Mixed Preference Optimization on packed pairs: chosen and rejected are neighbouring sequences that share their tiles.

The ViT runs once per pair. A reply's log-probability is one segment sum over the layout. Every term is a mean over pairs, so
the loop's one division by the number of pairs makes an update that does not depend on packs, micro-batches or ranks; only
BCO's shift, which the published recipe updates as pairs come by, knows in which order they came.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ivl.model.vlm import VLM
from ivl.preference import losses as preference
from ivl.train.config import PreferenceConfig
from ivl.train.losses import linear_log_probs
from ivl.train.objectives import check_batch, forward_batch
from ivl.train.world import World
from ivl.types import Batch, Loss

Reference = Callable[[VLM, Batch], torch.Tensor]
"""Summed log-probability of every sequence of a batch under the reference model, [S]."""
START_TOLERANCE = 0.02
"""Mean |log-ratio| per token, in nats, that rounding may cause between the policy at the start and the reference."""
MOVED = 1e-4
"""Mean difference of log-ratios, in nats, that a policy which learns soon exceeds; rounding alone may, over long replies."""


@dataclass(frozen=True)
class Replies:
    """log_probs_S: summed log-probability of each sequence's trained tokens. lens_S: how many there are."""

    log_probs_S: torch.Tensor
    lens_S: torch.Tensor

    @property
    def means_S(self) -> torch.Tensor:
        return self.log_probs_S / self.lens_S


def reply_log_probs(model: VLM, batch: Batch) -> Replies:
    """One forward call over the pack. Without gradients where torch's grad mode is off."""
    hidden_TD = forward_batch(model, batch)
    at_M, seq_M = last_replies(batch)
    log_probs_M = linear_log_probs(hidden_TD[at_M], model.decoder.head.matrix(), batch.labels_T[at_M])
    num_sequences = len(batch.layout.new_lens)
    # index_add in float32 over a few thousand terms of one sign: no worse than the terms themselves.
    sums_S = log_probs_M.new_zeros(num_sequences).index_add(0, seq_M, log_probs_M)
    return Replies(sums_S, torch.bincount(seq_M, minlength=num_sequences))


def last_replies(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Trained tokens of every sequence's last reply, and their sequences; replies of earlier turns belong to the prompt."""
    at_M = batch.weights_T.nonzero().squeeze(1)
    lens_S = torch.tensor(batch.layout.new_lens, device=at_M.device)
    seq_M = torch.arange(len(lens_S), device=at_M.device).repeat_interleave(lens_S)[at_M]
    # A reply is a run of trained tokens. No run goes on from one sequence to the next, for the last token has no label.
    reply_M = (at_M.diff(prepend=at_M[:1]) != 1).cumsum(0)
    last_S = torch.zeros_like(lens_S).scatter_reduce(0, seq_M, reply_M, "amax")
    kept_M = reply_M == last_S[seq_M]
    return at_M[kept_M], seq_M[kept_M]


def frozen(model: VLM, place: Callable[[VLM], object] = lambda _: None) -> Reference:
    """A second copy of the weights, as they are now, to run along. Call before the model is sharded; place(copy) puts the copy
    where it shall be."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    place(reference)
    return lambda _, batch: reply_log_probs(reference, batch).log_probs_S


def check_pairs(batch: Batch) -> None:
    """Every sample must be a pair of two different replies with something to train in each.

    Raises:
        ValueError: naming the sample.
    """
    ends, at = [], 0
    for length in batch.layout.new_lens:
        ends.append(at := at + length)
    start = sequence = 0
    for number, num_tokens in enumerate(batch.sample_lens):
        name = f"{batch.ids[number]} ({batch.sources[number]})"
        inside = [end for end in ends[sequence:] if end <= start + num_tokens]
        if len(inside) != 2:
            raise ValueError(f"{name}: a preference pair has two replies, this sample has {len(inside)}")
        middle, end = inside
        for side, span in (("chosen", slice(start, middle)), ("rejected", slice(middle, end))):
            if not batch.weights_T[span].any():
                raise ValueError(f"{name}: the {side} reply trains no token")
        if torch.equal(batch.tokens_T[start:middle], batch.tokens_T[middle:end]):
            raise ValueError(f"{name}: chosen and rejected are the same")
        start, sequence = end, sequence + 2


class PreferenceObjective:
    """The loss of a pack of pairs; weight is the number of pairs. Its state (BCO's shift) is saved with checkpoints.

    metrics: rewards/chosen, rewards/rejected, rewards/margin, rewards/accuracy, kl (an estimate: minus the mean log-ratio of
    both replies), length/ and log_probs/ of either, and loss/TERM, unweighted, for each term in use.

    Raises:
        ValueError: for a sample that is no pair; for a policy that differs from the reference at the first step, or that has
            not moved after a few; naming the pair.
    """

    def __init__(
        self, config: PreferenceConfig, reference: Reference | None, world: World | None = None, *, still_calls: int = 8
    ) -> None:
        """still_calls: forward calls of this rank after which a policy that has not moved at all is an error."""
        if config.needs_reference and reference is None:
            raise ValueError("these terms of the preference loss need a reference model")
        self.config, self.reference, self.world = config, reference, world or World()
        self.shift = preference.RunningMean()
        self.calls = 0
        self.still_calls, self.moved = still_calls, False

    def state(self) -> dict[str, Any]:
        return {"total": self.shift.total, "count": self.shift.count, "calls": self.calls, "moved": self.moved}

    def restore(self, state: dict[str, Any]) -> None:
        self.shift = preference.RunningMean(state["total"], state["count"])
        self.calls, self.moved = state["calls"], state["moved"]

    def idle(self) -> None:
        """What a rank without a batch does while others have one: BCO's shift is one for all of them."""
        if self.config.bco:
            self._observe(0.0, 0)

    def __call__(self, model: VLM, batch: Batch) -> Loss:
        check_batch(batch, model)
        check_pairs(batch)
        replies = reply_log_probs(model, batch)
        policy_P2 = replies.log_probs_S.view(-1, 2)
        ratios_P2 = policy_P2 - policy_P2.detach()
        if self.reference is not None:
            with torch.no_grad():
                reference_S = self.reference(model, batch)
            ratios_P2 = policy_P2 - reference_S.to(policy_P2).view(-1, 2)
            if model.training:
                self._check_movement(ratios_P2.detach(), replies, batch)
        terms = self._terms(ratios_P2, replies, train=model.training)
        total = sum(getattr(self.config, name) * term_P.sum() for name, term_P in terms.items())
        assert isinstance(total, torch.Tensor)
        count = torch.tensor(float(len(policy_P2)))
        return Loss(total, count, self._metrics(ratios_P2.detach(), replies, terms))

    def _terms(self, ratios_P2: torch.Tensor, replies: Replies, *, train: bool) -> dict[str, torch.Tensor]:
        """Every term in use, one number per pair."""
        c = self.config
        ratios = ratios_P2.unbind(1)
        means = replies.means_S.view(-1, 2).unbind(1)
        make: dict[str, Callable[[], torch.Tensor]] = {
            "sigmoid": lambda: preference.sigmoid(*ratios, beta=c.beta, smoothing=c.label_smoothing),
            "bco": lambda: preference.bco(*ratios, beta=c.beta, shift=self._shift(ratios_P2.detach(), train)),
            "ipo": lambda: preference.ipo(*(ratios_P2 / replies.lens_S.view(-1, 2)).unbind(1), beta=c.beta),
            "hinge": lambda: preference.hinge(*ratios, beta=c.beta),
            "robust": lambda: preference.robust(*ratios, beta=c.beta, smoothing=c.label_smoothing),
            "kto": lambda: preference.kto(*ratios, beta=c.beta),
            "generation": lambda: -means[0],
            "orpo": lambda: preference.orpo(*means, beta=c.beta),
            "simpo": lambda: preference.simpo(*means, beta=c.beta, gamma=c.simpo_gamma),
        }
        return {name: term() for name, term in make.items() if getattr(c, name)}

    def _shift(self, ratios_P2: torch.Tensor, train: bool) -> torch.Tensor:
        """The mean reward so far, this step's pairs on all ranks included; validation leaves it alone."""
        rewards = self.config.beta * ratios_P2
        if not train:
            return rewards.new_tensor(self.shift.fold(0.0, 0.0))
        return rewards.new_tensor(self._observe(float(rewards.double().mean(1).sum()), len(rewards)))

    def _observe(self, total: float, count: int) -> float:
        """Take in what every rank has seen; all ranks call this together."""
        seen = torch.tensor([total, count], dtype=torch.float64)
        return self.shift.fold(*self.world.sum({"seen": seen})["seen"].tolist())

    def _check_movement(self, ratios_P2: torch.Tensor, replies: Replies, batch: Batch) -> None:
        self.calls += 1
        if self.calls == 1 and self.config.check_start:
            off_P = (ratios_P2.abs() / replies.lens_S.view(-1, 2)).amax(1)
            if float(off_P.mean()) > START_TOLERANCE:
                at = int(off_P.argmax())
                chosen, rejected = ratios_P2[at].tolist()
                raise ValueError(
                    f"pair {batch.ids[at]} ({batch.sources[at]}): at the first step the policy should equal the reference and "
                    f"the DPO loss ln 2 = {math.log(2):.4f}, but log-ratios are {chosen:.3f} and {rejected:.3f}; is the "
                    "reference of other weights, data or precision, or has the policy drop path or dropout? "
                    "preference.check_start = False accepts it"
                )
        self.moved = self.moved or float((ratios_P2[:, 0] - ratios_P2[:, 1]).abs().mean()) > MOVED
        if self.calls == self.still_calls and not self.moved:
            raise ValueError(
                f"pair {batch.ids[0]} ({batch.sources[0]}): after {self.calls} packs the log-ratios of chosen and rejected "
                "replies still differ by rounding alone; does the policy get a gradient?"
            )

    def _metrics(self, ratios_P2: torch.Tensor, replies: Replies, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rewards_P2 = self.config.beta * ratios_P2
        values = {f"loss/{name}": term_P.detach() for name, term_P in terms.items()}
        if self.reference is not None:
            values |= {
                "rewards/chosen": rewards_P2[:, 0], "rewards/rejected": rewards_P2[:, 1],
                "rewards/margin": rewards_P2[:, 0] - rewards_P2[:, 1],
                "rewards/accuracy": (rewards_P2[:, 0] > rewards_P2[:, 1]).float(), "kl": -ratios_P2.mean(1),
            }  # fmt: skip
        for side, name in enumerate(("chosen", "rejected")):
            values[f"length/{name}"] = replies.lens_S.view(-1, 2)[:, side].float()
            values[f"log_probs/{name}"] = replies.log_probs_S.detach().view(-1, 2)[:, side]
        return {name: torch.stack([v.double().sum(), v.new_tensor(len(v), dtype=torch.float64)]) for name, v in values.items()}
