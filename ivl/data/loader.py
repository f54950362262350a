"""The stream of batches: draw, encode, pack, collate, with a state that says exactly where it stands."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

from ivl.data.config import DataConfig
from ivl.data.elastic import deal
from ivl.data.encode import Encoded, Encoder, SampleCache, encode
from ivl.data.mixture import Draw, Mixture, load_mixture
from ivl.data.packing import OpenPack, Packer, collate
from ivl.errors import DataError, InputError, short
from ivl.processing.processor import Processor
from ivl.types import Batch, Sample

NUM_EXAMPLES = 5
"""Messages kept of each kind of bad row."""
SETTLED = 100
"""Draws after which the share of bad rows is judged, or a whole epoch if that is fewer."""


@dataclass
class LoaderReport:
    """Counts of the draws of one rank."""

    draws: int = 0
    dropped: int = 0
    """Draws without a sample; a bad row counts again whenever it is drawn."""
    rows: dict[str, int] = field(default_factory=dict[str, int])
    """Bad rows by kind; each counts once, however often it is drawn."""
    truncated: int = 0
    """Rows cut to fit a pack; each counts once."""
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """The first few messages of each kind."""
    packs: int = 0
    tokens: int = 0
    tiles: int = 0

    def drop(self, error: DataError, *, first: bool) -> None:
        """Count a draw of a bad row; `first` is whether no other draw counts this row."""
        self.dropped += 1
        if first:
            self.rows[error.kind] = self.rows.get(error.kind, 0) + 1
            self._keep(error.kind, [str(error)])

    def truncate(self, sample: Sample) -> None:
        """Count a row that was cut to fit a pack."""
        self.truncated += 1
        self._keep("truncated", [f"{sample.source}: {sample.cut}"])

    def merge(self, other: LoaderReport) -> None:
        """Add the counts of another rank."""
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
        self.mixture = Mixture(
            specs, seed=seed, shuffle=config.shuffle, weighting=config.weighting, val_share=config.val_share,
            validation=config.validation,
        )  # fmt: skip
        self.report = LoaderReport()
        self._encoder = Encoder(config, self.mixture, processor, pairs)
        self._cache = SampleCache(config.cache_samples)
        self._packer: Packer[Sample] = self.new_packer()
        self._next = rank
        """Position in the stream of the first draw not yet taken."""
        self._backlog: deque[int] = deque()
        """Positions to take before that one: those that another number of ranks had left."""
        self._reopen: list[list[int]] = []
        """Positions of the samples of each pack that was open when the state was saved."""

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
        reopened = [position for positions in self._reopen for position in positions]
        parts = (reopened, list(self._backlog), self._positions(self._next))
        draws = chain.from_iterable(map(self.mixture.draws, parts))
        with closing(self.encode(draws)) as stream:
            self._fill_open_packs(islice(stream, len(reopened)))
            for draw, result in stream:
                if self._backlog:
                    self._backlog.popleft()
                else:
                    self._next = draw.position + self.world_size
                if pack := self._take(draw, result):
                    yield self._release(pack)
        while pack := self._packer.flush():
            yield self._release(pack)

    def encode(self, draws: Iterator[Draw]) -> Generator[tuple[Draw, Encoded]]:
        """Encode draws in order, by the workers of the configuration; this leaves the position alone."""
        return encode(self._encoder, draws, self._cache)

    def new_packer(self) -> Packer[Any]:
        """An empty packer with the budgets of the configuration."""
        c = self.config
        return Packer(max_tokens=c.max_tokens, max_tiles=c.max_tiles, max_buffer=c.max_buffer, max_samples=c.max_samples)

    def state(self) -> dict[str, Any]:
        """The position after the last yielded batch, for `restore`, as values of JSON; it does not depend on read-ahead."""
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
            InputError: if the state belongs to another mixture, seed or budgets; the message names the difference.
        """
        states = [state] if isinstance(state, dict) else list(state)
        mine = self.state()
        for each in states:
            if not self.mixture.matches(each["mixture"]):
                then, now = short(each["mixture"], 600), short(mine["mixture"], 600)
                raise InputError(f"the data have changed: the saved position is of {then}, now they are {now}")
            for name in ("seed", "budgets"):
                if each[name] != mine[name]:
                    raise InputError(f"the saved data position has {name} {short(each[name])}, this run has {mine[name]}")
        self._packer, self.report = self.new_packer(), LoaderReport()
        own = [each for each in states if (each["rank"], each["world_size"]) == (self.rank, self.world_size)]
        if own:
            self._next, backlog, self._reopen = own[0]["next"], own[0].get("backlog", []), [list(at) for at in own[0]["open"]]
            self.report.merge(LoaderReport(**own[0]["report"]))
        else:
            self._next, backlog = deal(states, self.world_size, self._stop)[self.rank]
            self._reopen = []
            for each in states if self.rank == 0 else ():
                self.report.merge(LoaderReport(**each["report"]))
                self.report.draws -= sum(map(len, each["open"]))  # these are drawn again
        self._backlog = deque(backlog)

    def _positions(self, start: int) -> range:
        return range(start, max(start, self._stop), self.world_size)

    @property
    def _stop(self) -> int:
        """End of the stream."""
        return self.num_samples or sys.maxsize

    def _fill_open_packs(self, stream: Iterator[tuple[Draw, Encoded]]) -> None:
        """Put the samples of the packs that were open when the state was saved, encoded again, into packs."""
        samples: dict[int, Sample] = {}
        for draw, result in stream:
            if isinstance(result, DataError):
                raise result  # the row was good when the state was saved
            samples[draw.position] = result
        for positions in self._reopen:
            self._packer.reopen(positions, [samples[position] for position in positions])
        self._reopen = []

    def _take(self, draw: Draw, result: Encoded) -> OpenPack[Sample] | None:
        self.report.draws += 1
        if isinstance(result, Sample):
            return self._packer.add(draw.position, result)
        if self.config.on_error == "refuse" and not (result.kind == "too_long" and self.config.over_budget == "skip"):
            raise result
        self.report.drop(result, first=_is_first(draw))
        self._check_share(result)
        return None

    def _check_share(self, last: DataError) -> None:
        """Stop when too many rows are bad; also when all are, or an endless run would look for a good one forever."""
        draws, dropped, share = self.report.draws, self.report.dropped, self.config.max_skip_share
        if draws < min(SETTLED, len(range(self.rank, len(self.mixture), self.world_size))):
            return
        if dropped > share * draws or dropped == draws:
            raise InputError(
                f"{dropped} of {draws} rows are bad and data.max_skip_share is {share}; {self.report.summary()}; "
                f"the last: {last}"
            )

    def _release(self, pack: OpenPack[Sample]) -> Batch:
        self.report.packs += 1
        self.report.tokens += pack.num_tokens
        self.report.tiles += pack.num_tiles
        for position, sample in zip(pack.positions, pack.items, strict=True):
            # Counted now rather than when it was drawn, since an open pack may go to another rank.
            if sample.cut and _is_first(next(self.mixture.draws([position]))):
                self.report.truncate(sample)
        return collate(tuple(pack.items))


def _is_first(draw: Draw) -> bool:
    """Whether this is the draw that counts its row: every drawn row has one such draw in the first epoch."""
    return draw.epoch == 0 and draw.copy == 0
