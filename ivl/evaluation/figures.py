"""Figures of a benchmark, each with its 95% interval.

A figure is a weighted sum of ratios, and a ratio is a sum of numerators over a sum of denominators. So are a mean, a share of
groups that are all right, F1, a mean of means and a sum of points. Numerators and denominators are kept by cluster, which
makes one bootstrap over clusters (Efron and Tibshirani, 1993, chapter 8) serve all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ivl.evaluation.scoring import wilson

if TYPE_CHECKING:
    from ivl.evaluation.task import Scored

DRAWS = 1000
"""Bootstrap samples."""


@dataclass(frozen=True)
class Ratio:
    """Sums of numerators and denominators by cluster."""

    sums: Mapping[str, tuple[float, float]]
    plain: bool = False
    """Every cluster is one unit with a number from 0 to 1, so that Wilson's interval holds."""

    @property
    def value(self) -> float:
        """The quotient; 0 without any unit."""
        top, bottom = (sum(pair[side] for pair in self.sums.values()) for side in (0, 1))
        return top / bottom if bottom else 0.0


@dataclass(frozen=True)
class Figure:
    """A weighted sum of ratios."""

    terms: tuple[tuple[float, Ratio], ...]
    n: int
    """Units that it counts, such as questions."""
    points: bool = False
    """Shown as it is, such as the 2,800 points of a sum; other figures are shares, and shown in percent."""

    @property
    def value(self) -> float:
        """The figure of all units."""
        return sum(weight * part.value for weight, part in self.terms)

    def interval(self) -> tuple[float, float]:
        """Return the 95% interval: Wilson's for a share of units that stand alone, else of the bootstrap over clusters."""
        if len(self.terms) == 1 and self.terms[0][1].plain and self.n:
            weight, only = self.terms[0]
            low, high = wilson(sum(top for top, _ in only.sums.values()), len(only.sums))
            return weight * low, weight * high
        order = {cluster: at for at, cluster in enumerate(dict.fromkeys(c for _, part in self.terms for c in part.sums))}
        if not order:
            return 0.0, 0.0
        counts, total = _draws(len(order)), np.zeros(DRAWS)
        for weight, part in self.terms:
            at = [order[cluster] for cluster in part.sums]
            tops, bottoms = (counts[:, at] @ np.array([pair[side] for pair in part.sums.values()]) for side in (0, 1))
            # A draw may miss a whole category, whose ratio is then the one of all units.
            total += weight * np.where(bottoms, tops / np.where(bottoms, bottoms, 1), part.value)
        low, high = np.quantile(total, (0.025, 0.975))
        return float(low), float(high)


Figures = dict[str, Figure]
"""Figures by name; the first is the headline."""


@lru_cache(4)
def _draws(count: int) -> np.ndarray:
    """Return how often each bootstrap sample has each of so many clusters [draws, clusters], the same on every run."""
    rng = np.random.default_rng(0)
    samples = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(DRAWS))
    return np.stack([sample.astype(np.int16) for sample in samples])


def ratio(scored: Sequence[Scored], top: Callable[[Scored], float], bottom: Callable[[Scored], float]) -> Figure:
    """Return the sum of `top` over the sum of `bottom`, such as F1."""
    return _ratio((each.cluster, top(each), bottom(each)) for each in scored)


def mean(scored: Sequence[Scored], number: Callable[[Scored], float] = lambda s: s.score.value) -> Figure:
    """Return the mean of the scores, or of another number of theirs."""
    return _ratio((each.cluster, number(each), 1.0) for each in scored)


def all_right(scored: Sequence[Scored], key: Callable[[Scored], Hashable]) -> Figure:
    """Return the share of the groups with the same key in which every reply is right."""
    groups: dict[Hashable, list[Scored]] = defaultdict(list)
    for each in scored:
        groups[key(each)].append(each)
    return _ratio((rows[0].cluster, float(all(s.score.value == 1 for s in rows)), 1.0) for rows in groups.values())


def _ratio(units: Iterable[tuple[str, float, float]]) -> Figure:
    """Return the ratio of units, each a cluster, a numerator and a denominator."""
    units, sums = list(units), dict[str, tuple[float, float]]()
    for cluster, top, bottom in units:
        tops, bottoms = sums.get(cluster, (0.0, 0.0))
        sums[cluster] = tops + top, bottoms + bottom
    plain = len(sums) == len(units) and all(bottom == 1 and 0 <= top <= 1 for _, top, bottom in units)
    return Figure(((1.0, Ratio(sums, plain)),), len(units))


def combined(figures: Iterable[Figure], weight: float = 1.0, *, points: bool = False, n: int | None = None) -> Figure:
    """Return the sum of figures, each times the weight.

    Args:
        points: Whether it is shown as it is, and not in percent.
        n: Its units; by default those of all figures together.
    """
    figures = list(figures)
    terms = tuple((weight * inner, part) for figure in figures for inner, part in figure.terms)
    return Figure(terms, sum(figure.n for figure in figures) if n is None else n, points)


def average(figures: Iterable[Figure], *, n: int | None = None) -> Figure:
    """Return the unweighted mean of figures."""
    figures = list(figures)
    return combined(figures, 1 / max(1, len(figures)), points=any(figure.points for figure in figures), n=n)


def points(figure: Figure, scale: float = 1.0) -> Figure:
    """Return a figure that is shown as it is, times the scale: a sum is the mean times the number of units."""
    return combined([figure], scale, points=True)


def by(scored: Iterable[Scored], keys: Callable[[Scored], Iterable[str]]) -> dict[str, list[Scored]]:
    """Sort scores into groups by their keys, in the order of first appearance. A score may belong to several groups."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for each in scored:
        for key in keys(each):
            groups[key].append(each)
    return dict(groups)


def rows_of(figures: Figures) -> dict[str, dict[str, Any]]:
    """Return figures as the rows of a report."""
    return {
        name: {
            "value": figure.value, "ci95": list(figure.interval()), "n": figure.n,
            **({"points": True} if figure.points else {}),
        }
        for name, figure in figures.items()
    }  # fmt: skip


def shown(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the value and the interval of a report's row as text."""
    form = "{:,.2f}" if row.get("points") else "{:.2%}"
    value = " to ".join(map(form.format, row.get("range", [row["value"]])))
    return value, " to ".join(map(form.format, row["ci95"]))
