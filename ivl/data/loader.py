"""The stream of batches: draw, encode, pack, collate, with a state that says exactly where it stands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ivl.data.batch import collate
from ivl.data.config import DataConfig
from ivl.data.encode import Cache, Dropped, Encoder, Result, encoding
from ivl.data.mixture import Draw, Mixture, load_mixture
from ivl.data.packing import Buffer, Packer
from ivl.errors import InputError
from ivl.processing.processor import Processor
from ivl.types import Batch, Sample

NUM_EXAMPLES = 5
"""Messages kept of each kind of bad row."""
SETTLED = 100
"""Draws after which the share of bad rows is judged, or a whole epoch if that is fewer."""


@dataclass
class Report:
    """What one rank has seen."""

    draws: int = 0
    dropped: int = 0
    """Draws that brought no sample; a bad row counts again whenever it is drawn."""
    rows: dict[str, int] = field(default_factory=dict)
    """Bad rows by kind; each counts once, however often it is drawn."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few messages of each kind."""
    packs: int = 0
    tokens: int = 0
    tiles: int = 0

    def drop(self, bad: Dropped, *, first: bool) -> None:
        """Count a draw of a bad row; `first` says that no other draw counts this row."""
        self.dropped += 1
        if first:
            self.rows[bad.kind] = self.rows.get(bad.kind, 0) + 1
            examples = self.examples.setdefault(bad.kind, [])
            if len(examples) < NUM_EXAMPLES:
                examples.append(str(bad.error))

    def summary(self) -> str:
        """The bad rows in one line for a log; empty if there were none."""
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.rows.items()))
        return f"left out {sum(self.rows.values())} rows: {counts}" if self.rows else ""


@dataclass(frozen=True)
class PackEstimate:
    """How many packs one epoch makes on one rank, guessed from a sample of rows."""

    packs: int
    draws: int
    """Rows that one rank draws in an epoch."""
    sampled: int
    """Rows that were encoded for the guess; every figure but `draws` rests on these."""
    dropped: int
    """How many of those were bad."""
    tokens_per_sample: float
    tiles_per_sample: float
    token_fill: float
    tile_fill: float


class Loader:
    """Iterating yields batches of one rank; iterating again goes on where the last batch ended.

    All ranks take turns at one global order, so their samples never meet. Batches follow from the files, the config, the
    seed, the rank and the world size alone: not from the number of workers, and not from where a run was interrupted.

    Raises:
        InputError: for a bad mixture; while iterating, for a bad row (`file:line`) unless config.on_error is skip, and for
            too many bad rows even then.
    """

    def __init__(self, config: DataConfig, processor: Processor, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        self.config, self.rank, self.world_size = config, rank, world_size
        specs = load_mixture(config.mixture, root=config.root, format=config.format)
        self.mixture = Mixture(specs, seed=seed, shuffle=config.shuffle)
        self.report = Report()
        self._encoder = Encoder(config, self.mixture, processor)
        self._cache = Cache(config.cache_samples)
        self._packer: Packer[Sample] = self._new_packer()
        self._next = rank
        """Position in the stream of the first draw not yet taken."""
        self._reopen: list[list[int]] = []

    @property
    def num_samples(self) -> int | None:
        """Samples that all ranks draw in all epochs, bad rows included; None if the stream has no end."""
        return self.config.epochs * len(self.mixture) if self.config.epochs else None

    @property
    def epoch(self) -> int:
        """Epoch of the next draw, from 0."""
        return self._next // len(self.mixture)

    @property
    def fill(self) -> tuple[float, float]:
        """Mean share of the token and of the tile budget used so far."""
        packs = max(1, self.report.packs)
        return self.report.tokens / (packs * self.config.max_tokens), self.report.tiles / (packs * self.config.max_tiles)

    def __iter__(self) -> Iterator[Batch]:
        with self._encoding() as encode:
            self._fill_open_packs(encode)
            for draw, result in encode(self.mixture.draws(self._positions(self._next))):
                self._next = draw.position + self.world_size
                if buffer := self._take(draw, result):
                    yield self._release(buffer)
            while buffer := self._packer.flush():
                yield self._release(buffer)

    def state(self) -> dict[str, Any]:
        """The position after the last yielded batch, for `restore`; JSON-able, and free of anything read ahead."""
        return {
            "epoch": self.epoch,
            "next": self._next,
            "open": self._reopen or self._packer.positions(),
            "seed": self.mixture.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "budgets": [self.config.max_tokens, self.config.max_tiles, self.config.max_samples],
            "mixture": self.mixture.fingerprint(),
            "report": asdict(self.report),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()` of a loader with the same data, seed, rank and world size. Call before iterating.

        Only the samples of open packs are encoded again; nothing is replayed.

        Raises:
            InputError: if the state belongs to something else; the message says what differs.
        """
        mine = self.state()
        for name in ("seed", "rank", "world_size", "budgets", "mixture"):
            if state[name] != mine[name]:
                raise InputError(f"the saved data position has {name} {state[name]}, this run has {mine[name]}")
        self._next, self._reopen = state["next"], [list(positions) for positions in state["open"]]
        self._packer = self._new_packer()
        self.report = Report(**{name: _copied(value) for name, value in state["report"].items()})

    def estimate_packs(self, sample_rows: int = 64) -> PackEstimate:
        """Encode some random rows, draw an epoch's lengths from them, and pack those.

        An estimate, because lengths are known only after encoding: the error falls with the root of `sample_rows`.
        """
        num_draws = len(range(self.rank, len(self.mixture), self.world_size))
        rng = np.random.default_rng([self.mixture.seed, 2])
        chosen = rng.choice(len(self.mixture), min(sample_rows, len(self.mixture)), replace=False)
        results = [self._encoder(draw).result for draw in self.mixture.draws(sorted(chosen.tolist()))]
        bad = [result for result in results if isinstance(result, Dropped)]
        sizes = [(result.num_tokens, result.num_tiles) for result in results if isinstance(result, Sample)]
        if not sizes:
            raise InputError(f"none of {len(bad)} sampled rows can be used; the first: {bad[0].error}")
        return _estimate(sizes, len(results), num_draws, self._new_packer(), rng)

    def _positions(self, start: int) -> range:
        epochs = self.config.epochs
        stop = epochs * len(self.mixture) if epochs else sys.maxsize
        return range(start, max(start, stop), self.world_size)

    def _encoding(self):
        c = self.config
        return encoding(
            self._encoder, num_workers=c.num_workers, prefetch=c.prefetch, start_method=c.start_method, cache=self._cache
        )

    def _fill_open_packs(self, encode) -> None:
        """Encode again what was in open packs when the state was saved."""
        wanted = [at for positions in self._reopen for at in positions]
        items = {}
        for draw, result in encode(self.mixture.draws(wanted)):
            if isinstance(result, Dropped):
                raise result.error  # it was a good row when the state was saved
            items[draw.position] = result
        for positions in self._reopen:
            self._packer.reopen(positions, [items[at] for at in positions])
        self._reopen = []

    def _take(self, draw: Draw, result: Result) -> Buffer[Sample] | None:
        self.report.draws += 1
        if isinstance(result, Sample):
            return self._packer.add(draw.position, result)
        if self.config.on_error == "refuse" and not (result.kind == "too_long" and self.config.over_budget == "skip"):
            raise result.error
        self.report.drop(result, first=draw.epoch == 0 and draw.copy == 0)
        self._check_share(result)
        return None

    def _check_share(self, last: Dropped) -> None:
        """Stop when too many rows are bad; also when all are, or an endless run would look for a good one forever."""
        draws, dropped, share = self.report.draws, self.report.dropped, self.config.max_skip_share
        if draws < min(SETTLED, len(range(self.rank, len(self.mixture), self.world_size))):
            return
        if dropped > share * draws or dropped == draws:
            raise InputError(
                f"{dropped} of {draws} rows are bad and data.max_skip_share is {share}; {self.report.summary()}; "
                f"the last: {last.error}"
            )

    def _release(self, buffer: Buffer[Sample]) -> Batch:
        self.report.packs += 1
        self.report.tokens += buffer.num_tokens
        self.report.tiles += buffer.num_tiles
        return collate(tuple(buffer.items))

    def _new_packer(self) -> Packer:
        c = self.config
        return Packer(max_tokens=c.max_tokens, max_tiles=c.max_tiles, max_buffer=c.max_buffer, max_samples=c.max_samples)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return list(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class _Size:
    num_tokens: int
    num_tiles: int


def _estimate(
    sizes: list[tuple[int, int]], sampled: int, num_draws: int, packer: Packer, rng: np.random.Generator
) -> PackEstimate:
    simulated = min(num_draws, 20_000)
    kept = round(simulated * len(sizes) / sampled)
    packs, drawn = 0, np.array(sizes)[rng.integers(len(sizes), size=kept)]
    for position, (num_tokens, num_tiles) in enumerate(drawn.tolist()):
        packs += packer.add(position, _Size(num_tokens, num_tiles)) is not None
    while packer.flush():
        packs += 1
    tokens, tiles = drawn.sum(axis=0)
    return PackEstimate(
        packs=max(1, round(packs * num_draws / simulated)),
        draws=num_draws,
        sampled=sampled,
        dropped=sampled - len(sizes),
        tokens_per_sample=float(tokens / kept),
        tiles_per_sample=float(tiles / kept),
        token_fill=float(tokens / (packs * packer.max_tokens)),
        tile_fill=float(tiles / (packs * packer.max_tiles)),
    )
