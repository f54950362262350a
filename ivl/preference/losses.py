"""Losses of preference pairs, each a pure function (arXiv:2411.10442, section 3.2). P pairs; every loss is one number per pair.

A log-ratio is the summed log-probability of a reply under the policy less that under the reference model. Its product with
beta is the reply's reward. Losses without a reference take mean log-probabilities per token instead, and say so.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid, relu


def sigmoid(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float, smoothing: float = 0.0) -> torch.Tensor:
    """DPO (Rafailov et al., 2023): the chosen reward should exceed the rejected one. smoothing: share of labels that are
    taken to be the wrong way round (conservative DPO)."""
    margin_P = beta * (chosen_P - rejected_P)
    return -(1 - smoothing) * logsigmoid(margin_P) - smoothing * logsigmoid(-margin_P)


def robust(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float, smoothing: float) -> torch.Tensor:
    """DPO made unbiased under labels flipped with probability `smoothing` < 1/2 (Chowdhury et al., 2024)."""
    margin_P = beta * (chosen_P - rejected_P)
    return (-(1 - smoothing) * logsigmoid(margin_P) + smoothing * logsigmoid(-margin_P)) / (1 - 2 * smoothing)


def hinge(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """A margin of at least one (SLiC; Zhao et al., 2023)."""
    return relu(1 - beta * (chosen_P - rejected_P))


def ipo(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """The difference of log-ratios per token is drawn to 1 / (2 beta) (Azar et al., 2023)."""
    return (chosen_P - rejected_P - 1 / (2 * beta)) ** 2


def bco(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float, shift: torch.Tensor) -> torch.Tensor:
    """BCO (Jung et al., 2024): a classifier of good and bad replies, each by itself; `shift` is the mean reward so far."""
    return -logsigmoid(beta * chosen_P - shift) - logsigmoid(-(beta * rejected_P - shift))


def kto(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """KTO's value function over pairs (Ethayarajh et al., 2024); the batch's other half stands for the KL to the reference."""
    chosen_kl, rejected_kl = (x.detach().mean().clamp(min=0) for x in (chosen_P, rejected_P))
    good_P = 1 - torch.sigmoid(beta * (chosen_P - rejected_kl))
    bad_P = 1 - torch.sigmoid(beta * (chosen_kl - rejected_P))
    return (good_P + bad_P) / 2


def orpo(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Odds ratio of the mean log-probabilities of the policy alone (Hong et al., 2024); goes with the generation loss."""
    odds_P = (chosen_P - rejected_P) - (_log1mexp(chosen_P) - _log1mexp(rejected_P))
    return -beta * logsigmoid(odds_P)


def simpo(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float, gamma: float) -> torch.Tensor:
    """Mean log-probabilities of the policy alone, `gamma` apart (Meng et al., 2024)."""
    return -logsigmoid(beta * (chosen_P - rejected_P) - gamma)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) for x < 0, accurate at both ends."""
    x = x.clamp(max=-1e-6)
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
