"""What packing will make of a mixture, guessed from a random sample of its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ivl.data.encode import Encoded
from ivl.data.loader import Loader
from ivl.data.mixture import Mixture
from ivl.errors import DataError, InputError
from ivl.types import Sample

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
    first_bad: str = ""
    """What is wrong with one of the bad rows."""

    def num_steps(self, accumulation: int = 1) -> int:
        """Optimizer steps of an epoch when every rank puts so many packs in a step."""
        return -(-self.packs // accumulation)


@dataclass(frozen=True, slots=True)
class _SampleSize:
    num_tokens: int
    num_tiles: int


def estimate_packs(
    loader: Loader, sample_rows: int = 64, *, on_progress: Callable[[int, int], None] = lambda *_: None
) -> PackEstimate:
    """Encode some random rows, draw an epoch's lengths from theirs, and pack those. The loader's position stays.

    An estimate, because lengths are known only after encoding: its error falls with the root of the number of rows.

    Args:
        sample_rows: rows to encode; all if there are fewer.
        on_progress: called after each row with rows done and all rows.

    Raises:
        InputError: if none of the rows can be used.
    """
    mixture, packer = loader.mixture, loader.new_packer()
    chosen = np.random.default_rng([mixture.seed, 2]).choice(len(mixture), min(sample_rows, len(mixture)), replace=False)
    by_dataset: dict[int, list[Encoded]] = defaultdict(list)
    for done, (draw, result) in enumerate(loader.encode(mixture.draws(sorted(chosen.tolist()))), 1):
        by_dataset[draw.dataset].append(result)
        on_progress(done, len(chosen))
    results = [result for part in by_dataset.values() for result in part]
    sizes_NK = _sizes(results)
    if not len(sizes_NK):
        error = next(result for result in results if isinstance(result, DataError))
        raise InputError(f"none of {len(results)} sampled rows can be used; the first: {error}")
    num_draws = len(range(loader.rank, len(mixture), loader.world_size))
    simulated = min(num_draws, SIMULATED)
    num_drawn = max(1, round(simulated * len(sizes_NK) / len(results)))
    drawn_NK = sizes_NK[np.random.default_rng([mixture.seed, 3]).integers(len(sizes_NK), size=num_drawn)]
    packs = sum(packer.add(position, _SampleSize(*size)) is not None for position, size in enumerate(drawn_NK.tolist()))
    while packer.flush():
        packs += 1
    tokens, tiles = drawn_NK.sum(axis=0).tolist()
    budgets = (packer.max_tokens, packer.max_tiles)
    binding_N = sizes_NK[:, int(np.argmax(drawn_NK.sum(axis=0) / budgets))]
    return PackEstimate(
        packs=max(1, round(packs * num_draws / simulated)),
        error=float(binding_N.std() / max(binding_N.mean(), 1e-9) / len(binding_N) ** 0.5),
        draws=num_draws,
        sampled=len(results),
        dropped=len(results) - len(sizes_NK),
        over_budget=sum(map(_is_over, results)),
        tokens_per_sample=tokens / num_drawn,
        tiles_per_sample=tiles / num_drawn,
        samples_per_pack=num_drawn / packs,
        token_fill=tokens / (packs * budgets[0]),
        tile_fill=tiles / (packs * budgets[1]),
        datasets=tuple(_of_dataset(mixture, index, by_dataset[index]) for index in range(len(mixture.specs))),
        first_bad=next((str(result) for result in results if isinstance(result, DataError) and not _is_over(result)), ""),
    )


def _of_dataset(mixture: Mixture, index: int, results: list[Encoded]) -> DatasetEstimate:
    sizes_NK = _sizes(results)
    mean = sizes_NK.mean(axis=0).tolist() if len(sizes_NK) else [0.0, 0.0]
    most = sizes_NK.max(axis=0).tolist() if len(sizes_NK) else [0, 0]
    bad = sum(isinstance(result, DataError) and not _is_over(result) for result in results)
    return DatasetEstimate(
        name=mixture.specs[index].name, rows=len(mixture.files[index]), draws=mixture.num_draws(index), sampled=len(results),
        bad=bad, over_budget=sum(map(_is_over, results)), tokens=mean[0], max_tokens=most[0], tiles=mean[1], max_tiles=most[1],
    )  # fmt: skip


def _sizes(results: list[Encoded]) -> np.ndarray:
    """Tokens and tiles of the usable samples, int64 [N, 2]."""
    samples = [result for result in results if isinstance(result, Sample)]
    return np.array([(sample.num_tokens, sample.num_tiles) for sample in samples], dtype=np.int64).reshape(-1, 2)


def _is_over(result: Encoded) -> bool:
    """Whether the sample was larger than a whole pack."""
    return bool(result.cut) if isinstance(result, Sample) else result.kind == "too_long"
