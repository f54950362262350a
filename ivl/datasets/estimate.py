"""What packing will make of a mixture, guessed from a random sample of its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ivl.data.encode import Cut, Dropped, Result
from ivl.data.mixture import Draw, Mixture
from ivl.data.packing import Packer
from ivl.errors import InputError

SIMULATED = 20_000
"""Samples packed for the guess."""


@dataclass(frozen=True, kw_only=True)
class DatasetEstimate:
    """What the sampled rows of one data set were like. Figures of lengths are over the usable ones; 0 if there are none."""

    name: str
    rows: int
    draws: int
    """Rows drawn in an epoch over all ranks."""
    sampled: int
    bad: int
    """Sampled rows that cannot be used, those over budget not among them."""
    over_budget: int
    tokens: float
    """Mean tokens of a sample."""
    max_tokens: int
    tiles: float
    max_tiles: int


@dataclass(frozen=True, kw_only=True)
class PackEstimate:
    """How many packs one epoch makes on one rank, guessed from a sample of rows."""

    packs: int
    error: float
    """Standard error of `packs` as a share of it, from the spread of lengths among the sampled rows."""
    draws: int
    """Rows that one rank draws in an epoch."""
    sampled: int
    """Rows that were encoded for the guess; every figure but `draws` rests on these."""
    dropped: int
    """How many of those bring no sample: bad, or over budget and not cut."""
    over_budget: int
    """How many were larger than a whole pack."""
    tokens_per_sample: float
    tiles_per_sample: float
    samples_per_pack: float
    token_fill: float
    tile_fill: float
    datasets: tuple[DatasetEstimate, ...]

    def num_steps(self, accumulation: int = 1) -> int:
        """Optimiser steps of an epoch when every rank puts so many packs in a step."""
        return -(-self.packs // accumulation)


@dataclass(frozen=True, slots=True)
class _Size:
    num_tokens: int
    num_tiles: int


def estimate(
    mixture: Mixture,
    results: Iterable[tuple[Draw, Result]],
    packer: Packer[Any],
    *,
    num_draws: int,
    watch: Callable[[], None] | None = None,
) -> PackEstimate:
    """Draw an epoch's lengths from the results at random, and pack those.

    An estimate, because lengths are known only after encoding: its error falls with the root of the number of results.

    Args:
        packer: an empty one of the run's budgets.
        num_draws: rows that one rank draws in an epoch.
        watch: called after each result.

    Raises:
        InputError: if no result can be used.
    """
    found: dict[int, list[Result]] = defaultdict(list)
    for draw, result in results:
        found[draw.dataset].append(result)
        if watch:
            watch()
    every = [result for part in found.values() for result in part]
    sizes_NK = _sizes(every)
    if not len(sizes_NK):
        bad = next(result for result in every if isinstance(result, Dropped))
        raise InputError(f"none of {len(every)} sampled rows can be used; the first: {bad.error}")
    rng = np.random.default_rng([mixture.seed, 3])
    simulated = min(num_draws, SIMULATED)
    kept = max(1, round(simulated * len(sizes_NK) / len(every)))
    drawn_NK = sizes_NK[rng.integers(len(sizes_NK), size=kept)]
    packs = sum(packer.add(position, _Size(*size)) is not None for position, size in enumerate(drawn_NK.tolist()))
    while packer.flush():
        packs += 1
    tokens, tiles = drawn_NK.sum(axis=0).tolist()
    budgets = (packer.max_tokens, packer.max_tiles)
    binding_N = sizes_NK[:, int(np.argmax(drawn_NK.sum(axis=0) / budgets))]
    return PackEstimate(
        packs=max(1, round(packs * num_draws / simulated)),
        error=float(binding_N.std() / max(binding_N.mean(), 1e-9) / len(binding_N) ** 0.5),
        draws=num_draws,
        sampled=len(every),
        dropped=len(every) - len(sizes_NK),
        over_budget=sum(map(_is_over, every)),
        tokens_per_sample=tokens / kept,
        tiles_per_sample=tiles / kept,
        samples_per_pack=kept / packs,
        token_fill=tokens / (packs * budgets[0]),
        tile_fill=tiles / (packs * budgets[1]),
        datasets=tuple(_of_dataset(mixture, index, found[index]) for index in range(len(mixture.specs))),
    )


def _of_dataset(mixture: Mixture, index: int, results: list[Result]) -> DatasetEstimate:
    sizes_NK = _sizes(results)
    mean = sizes_NK.mean(axis=0).tolist() if len(sizes_NK) else [0.0, 0.0]
    most = sizes_NK.max(axis=0).tolist() if len(sizes_NK) else [0, 0]
    bad = sum(isinstance(result, Dropped) and not _is_over(result) for result in results)
    return DatasetEstimate(
        name=mixture.specs[index].name, rows=len(mixture.files[index]), draws=mixture.num_draws(index), sampled=len(results),
        bad=bad, over_budget=sum(map(_is_over, results)), tokens=mean[0], max_tokens=most[0], tiles=mean[1], max_tiles=most[1],
    )  # fmt: skip


def _sizes(results: list[Result]) -> np.ndarray:
    """Tokens and tiles of the usable ones, int64 [N, 2]."""
    samples = [result for result in results if not isinstance(result, Dropped)]
    return np.array([(each.num_tokens, each.num_tiles) for each in samples], dtype=np.int64).reshape(-1, 2)


def _is_over(result: Result) -> bool:
    return isinstance(result, Cut) or (isinstance(result, Dropped) and result.kind == "too_long")
