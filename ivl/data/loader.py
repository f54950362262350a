"""The stream of batches: draw, encode, pack, collate, with a state that says exactly where it stands."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from ivl.data.batch import collate
from ivl.data.config import DataConfig
from ivl.data.elastic import deal
from ivl.data.encode import Cache, Cut, Dropped, Encoder, Result, encoding
from ivl.data.mixture import Draw, Mixture, load_mixture
from ivl.data.packing import Buffer, Packer
from ivl.datasets.estimate import PackEstimate, estimate
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
    truncated: int = 0
    """Rows cut to fit a pack; each counts once."""
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
            self._keep(bad.kind, [str(bad.error)])

    def cut(self, cut: Cut, *, first: bool) -> None:
        """Count a row that was cut to fit; `first` as in drop."""
        if first:
            self.truncated += 1
            self._keep("truncated", [f"{cut.sample.source}: {cut.problem}"])

    def merge(self, other: Report) -> None:
        """Add what another rank has seen."""
        for name in ("draws", "dropped", "truncated", "packs", "tokens", "tiles"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, count in other.rows.items():
            self.rows[kind] = self.rows.get(kind, 0) + count
        for kind, examples in other.examples.items():
            self._keep(kind, examples)

    def _keep(self, kind: str, examples: list[str]) -> None:
        self.examples[kind] = [*self.examples.get(kind, []), *examples][:NUM_EXAMPLES]

    def summary(self) -> str:
        """The bad and the cut rows in one line for a log; empty if there were none."""
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.rows.items()))
        left_out = [f"left out {sum(self.rows.values())} rows: {counts}"] if self.rows else []
        return "; ".join(left_out + ([f"cut {self.truncated} rows to fit a pack"] if self.truncated else []))


class Loader:
    """Iterating yields batches of one rank; iterating again goes on where the last batch ended.

    All ranks take turns at one global order, so their samples never meet. Batches follow from the files, the config, the
    seed, the rank and the world size alone: not from the number of workers, and not from where a run was interrupted.

    Raises:
        InputError: for a bad mixture; while iterating, for a bad row (`file:line`) unless config.on_error is skip, and for
            too many bad rows even then.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: Processor,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pairs: bool | None = None,
    ) -> None:
        """pairs: whether rows must be preference pairs, or must not be; None takes any."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        self.config, self.rank, self.world_size = config, rank, world_size
        specs = load_mixture(config.mixture, root=config.root, format=config.format)
        self.mixture = Mixture(specs, seed=seed, shuffle=config.shuffle, weighting=config.weighting)
        self.report = Report()
        self._encoder = Encoder(config, self.mixture, processor, pairs)
        self._cache = Cache(config.cache_samples)
        self._packer: Packer[Sample | Cut] = self._new_packer()
        self._next = rank
        """Position in the stream of the first draw not yet taken."""
        self._backlog: deque[int] = deque()
        """Positions to take before that one: what another number of ranks had left."""
        self._reopen: list[list[int]] = []

    @property
    def num_samples(self) -> int | None:
        """Samples that all ranks draw in all epochs, bad rows included; None if the stream has no end."""
        return self.config.epochs * len(self.mixture) if self.config.epochs else None

    @property
    def epoch(self) -> int:
        """Epoch of the next draw, from 0."""
        return (self._backlog[0] if self._backlog else self._next) // len(self.mixture)

    @property
    def fill(self) -> tuple[float, float]:
        """Mean share of the token and of the tile budget used so far."""
        packs = max(1, self.report.packs)
        return self.report.tokens / (packs * self.config.max_tokens), self.report.tiles / (packs * self.config.max_tiles)

    def __iter__(self) -> Iterator[Batch]:
        with self._encoding() as encode:
            self._fill_open_packs(encode)
            backlog, onward = self.mixture.draws(list(self._backlog)), self.mixture.draws(self._positions(self._next))
            for draw, result in encode(chain(backlog, onward)):
                if self._backlog:
                    self._backlog.popleft()
                else:
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
            "backlog": list(self._backlog),
            "seed": self.mixture.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "budgets": [self.config.max_tokens, self.config.max_tiles, self.config.max_samples],
            "mixture": self.mixture.fingerprint(),
            "report": asdict(self.report),
        }

    def restore(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Go on from `state()` of this rank, or of all ranks of a run in their order. Call before iterating.

        With as many ranks as before, batches are those of an uninterrupted run, and only the samples of open packs are
        encoded again. With another number, every draw not yet released comes exactly once, in packs of their own. The
        first rank takes over the report of all.

        Raises:
            InputError: if the state belongs to something else; the message says what differs.
        """
        states = [state] if isinstance(state, dict) else list(state)
        mine = self.state()
        for name in ("seed", "budgets", "mixture"):
            for each in states:
                if each[name] != mine[name]:
                    raise InputError(f"the saved data position has {name} {each[name]}, this run has {mine[name]}")
        self._packer, self.report = self._new_packer(), Report()
        own = [each for each in states if (each["rank"], each["world_size"]) == (self.rank, self.world_size)]
        if own:
            self._next, backlog, self._reopen = own[0]["next"], own[0].get("backlog", []), [list(at) for at in own[0]["open"]]
            self.report.merge(Report(**own[0]["report"]))
        else:
            self._next, backlog = deal(states, self.world_size, self._stop)[self.rank]
            self._reopen = []
            for each in states if self.rank == 0 else ():
                self.report.merge(Report(**each["report"]))
                self.report.draws -= sum(map(len, each["open"]))  # these are drawn again
        self._backlog = deque(backlog)

    def estimate_packs(self, sample_rows: int = 64, *, watch: Callable[[], None] | None = None) -> PackEstimate:
        """Encode some random rows, draw an epoch's lengths from them, and pack those; see ivl.datasets.estimate.

        watch is called after each row.
        """
        num_draws = len(range(self.rank, len(self.mixture), self.world_size))
        rng = np.random.default_rng([self.mixture.seed, 2])
        chosen = rng.choice(len(self.mixture), min(sample_rows, len(self.mixture)), replace=False)
        with self._encoding() as encode:
            results = encode(self.mixture.draws(sorted(chosen.tolist())))
            return estimate(self.mixture, results, self._new_packer(), num_draws=num_draws, watch=watch)

    def _positions(self, start: int) -> range:
        return range(start, max(start, self._stop), self.world_size)

    @property
    def _stop(self) -> int:
        """End of the stream."""
        return self.num_samples or sys.maxsize

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

    def _take(self, draw: Draw, result: Result) -> Buffer[Sample | Cut] | None:
        self.report.draws += 1
        if not isinstance(result, Dropped):
            return self._packer.add(draw.position, result)
        if self.config.on_error == "refuse" and not (result.kind == "too_long" and self.config.over_budget == "skip"):
            raise result.error
        self.report.drop(result, first=_is_first(draw))
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

    def _release(self, buffer: Buffer[Sample | Cut]) -> Batch:
        self.report.packs += 1
        self.report.tokens += buffer.num_tokens
        self.report.tiles += buffer.num_tiles
        for position, item in zip(buffer.positions, buffer.items, strict=True):
            if isinstance(item, Cut):  # counted now, for an open pack may go to another rank
                self.report.cut(item, first=_is_first(next(self.mixture.draws([position]))))
        return collate(tuple(item.sample if isinstance(item, Cut) else item for item in buffer.items))

    def _new_packer(self) -> Packer[Sample | Cut]:
        c = self.config
        return Packer(max_tokens=c.max_tokens, max_tiles=c.max_tiles, max_buffer=c.max_buffer, max_samples=c.max_samples)


def _is_first(draw: Draw) -> bool:
    """Whether no other draw of a run is of this row before."""
    return draw.epoch == 0 and draw.copy == 0
