"""Mixed Preference Optimization on packed pairs.

The ViT runs once per pair, and a reply's log-probability is one segment sum over the layout. Every term is a mean over pairs,
so the loop's one division by the number of pairs gives an update that does not depend on packs, micro-batches or ranks. Only
BCO's shift, which the published recipe updates pair by pair, depends on their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch

from ivl.model.devices import send
from ivl.model.vlm import VLM
from ivl.preference import losses as preference
from ivl.preference.config import PreferenceConfig
from ivl.preference.reference import Reference, find_reference
from ivl.preference.replies import Replies, check_pairs, reply_log_probs
from ivl.train.config import ObjectiveConfig
from ivl.train.objectives import ObjectiveContext, StatefulObjective, check_batch
from ivl.train.world import World
from ivl.types import Batch, Loss

START_TOLERANCE = 0.02
"""Mean |log-ratio| per token, in nats, that rounding may cause between the policy at the start and the reference."""
MOVED = 1e-4
"""Mean difference of log-ratios, in nats, that a policy which learns soon exceeds; rounding alone may, over long replies."""
MAX_STALLED_STEPS = 50
"""Steps after which a policy that has not moved from its reference at all is an error."""


class PreferenceObjective(StatefulObjective):
    """The loss of a pack of pairs; weight is the number of pairs. Its state (BCO's shift) is saved with checkpoints.

    metrics: rewards/chosen, rewards/rejected, rewards/margin, rewards/accuracy, kl (an estimate: minus the mean log-ratio of
    both replies), length/ and log_probs/ of either, and loss/TERM, unweighted, for each term in use.

    Raises:
        ValueError: for a sample that is no pair; for a policy that differs from the reference at the first step, or that has
            not moved after a few; naming the pair.
    """

    Settings: ClassVar[type[ObjectiveConfig]] = PreferenceConfig

    def __init__(
        self,
        config: PreferenceConfig,
        reference: Reference | None = None,
        world: World | None = None,
        *,
        max_stalled_calls: int = 8,
        context: ObjectiveContext | None = None,
    ) -> None:
        """Set up the objective.

        Args:
            config: weights of the terms.
            reference: log-probabilities under the reference model; prepare finds it where it is not given.
            world: the ranks, whose rewards make one shift.
            max_stalled_calls: calls of this rank after which a policy that has not moved at all is an error.
            context: the run, from which prepare finds the reference.
        """
        if config.needs_reference and reference is None and context is None:
            raise ValueError("these terms of the preference loss need a reference model")
        self.config, self.reference, self.world, self.context = config, reference, world or World(), context
        # BCO's reward shift is the mean reward of all pairs so far, on all ranks. Published runs hold one pair per rank and
        # step, where every pair is one observation; so it is here, whatever the packs.
        self.rewards_2 = torch.zeros(2, dtype=torch.float64)
        """Sum and number of these rewards; on the model's device from the first pack on."""
        self.calls, self.max_stalled_calls = 0, max_stalled_calls
        self.movement = torch.zeros(())
        """The largest mean difference of log-ratios of any pack; on the model's device, too."""

    @classmethod
    def build(cls, config: ObjectiveConfig, context: ObjectiveContext) -> Self:
        """Build the objective of a run; its reference follows in prepare."""
        assert isinstance(config, PreferenceConfig)
        return cls(config, world=context.world, max_stalled_calls=MAX_STALLED_STEPS * context.packs_per_rank, context=context)

    def prepare(self, model: VLM) -> None:
        """Find the reference: the model as it is now answers for every pair, unless the run goes on and has its answers."""
        if self.context is not None and self.config.needs_reference:
            self.reference = find_reference(self.config, model, self.context)

    def state(self) -> dict[str, Any]:
        """Return BCO's shift and what the checks have seen."""
        total, count = self.rewards_2.tolist()
        return {"total": total, "count": count, "calls": self.calls, "moved": bool(self.movement > MOVED)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what state() returned."""
        self.rewards_2 = torch.tensor([state["total"], state["count"]], dtype=torch.float64)
        self.calls, self.movement = state["calls"], torch.tensor(2 * MOVED if state["moved"] else 0.0)

    def idle(self) -> None:
        """Take part in BCO's shift, which all ranks share, on a rank without a batch."""
        if self.config.bco:
            self._observe(torch.zeros(2, dtype=torch.float64))

    def __call__(self, model: VLM, batch: Batch) -> Loss:
        """Compute the loss of one pack of pairs."""
        check_batch(batch, model)
        check_pairs(batch)
        replies = reply_log_probs(model, batch)
        policy_P2 = replies.log_probs_S.view(-1, 2)
        ratios_P2 = policy_P2 - policy_P2.detach()
        if self.reference is not None:
            with torch.no_grad():
                reference_S = self.reference(model, batch)
            ratios_P2 = policy_P2 - send(reference_S, policy_P2.device).to(policy_P2).view(-1, 2)
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
        if train:
            sum_of_pack = rewards.double().mean(1).sum()
            self._observe(torch.stack([sum_of_pack, torch.full_like(sum_of_pack, len(rewards))]))
        total, count = send(self.rewards_2, rewards.device)
        return (total / count.clamp(min=1)).to(rewards.dtype)

    def _observe(self, seen_2: torch.Tensor) -> None:
        """Take in what every rank has seen; all ranks call this together. Several ranks meet on the CPU, so they wait."""
        seen_2 = send(self.world.all_reduce({"seen": seen_2})["seen"], seen_2.device)
        self.rewards_2 = send(self.rewards_2, seen_2.device) + seen_2

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
                    "objective.check_start = False accepts it"
                )
        moved = (ratios_P2[:, 0] - ratios_P2[:, 1]).abs().mean()
        self.movement = torch.maximum(send(self.movement, moved.device).to(moved.dtype), moved)
        if self.calls == self.max_stalled_calls and not self.movement > MOVED:
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
        sums = {name: value_P.double().sum() for name, value_P in values.items()}
        return {name: torch.stack([total, torch.full_like(total, len(ratios_P2))]) for name, total in sums.items()}
