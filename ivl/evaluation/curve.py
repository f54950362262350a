"""The metric against the number of replies to a question, from one sampling of the largest number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ivl.evaluation.scoring import summary
from ivl.evaluation.voting import Candidate, Select, choose

Candidates = Sequence[Sequence[Candidate]]
"""The replies to each question."""
MOST_SUBSETS, FEWEST_SUBSETS, CHOICES = 200, 10, 100_000
"""Random subsets of the replies to a question; over all questions about so many choices."""


def curve(samples: Candidates, scores: Sequence[Sequence[float]], select: Select | None) -> list[dict[str, Any]]:
    """Return the summary of the reply that is selected from 1, 2, 4, ... and all replies."""
    return [{"samples": size, **summary(means.tolist())} for size, means in by_size(samples, scores, select).items()]


def by_size(samples: Candidates, scores: Sequence[Sequence[float]], select: Select | None) -> dict[int, np.ndarray]:
    """Return, for 1, 2, 4, ... and all replies, each question's expected score [Q] over random subsets of its replies."""
    most, subsets = min(map(len, samples)), min(MOST_SUBSETS, max(FEWEST_SUBSETS, CHOICES // len(samples)))
    sizes = sorted({2**k for k in range(most.bit_length())} | {most})
    questions = list(zip(samples, scores, strict=True))
    return {size: np.array([_expected(*question, size, select, subsets) for question in questions]) for size in sizes}


def _expected(
    candidates: Sequence[Candidate], scores: Sequence[float], size: int, select: Select | None, subsets: int
) -> float:
    if size == 1:
        return float(np.mean(scores))
    if size == len(candidates) or min(scores) == max(scores):
        return scores[choose(candidates, select)]
    rng, total = np.random.default_rng(size), 0.0
    for _ in range(subsets):
        subset = rng.permutation(len(candidates))[:size]
        total += scores[subset[choose([candidates[at] for at in subset], select)]]
    return total / subsets


def draw(axes: Any, points: Sequence[dict[str, Any]], label: str, color: str | None = None) -> None:
    """Draw a line with its interval as a band on matplotlib axes."""
    sizes, values = [p["samples"] for p in points], [100 * p["value"] for p in points]
    (line,) = axes.plot(sizes, values, "o-", label=label, color=color)
    low, high = ([100 * p["ci95"][side] for p in points] for side in (0, 1))
    axes.fill_between(sizes, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="replies to a question", ylabel="right, %")
