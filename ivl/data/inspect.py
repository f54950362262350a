"""Every row of a mixture looked at once: what is wrong, and how much there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ivl.data.config import DataConfig
from ivl.data.encode import Dropped, Encoder, check_media, media
from ivl.data.mixture import Draw, Mixture, load_mixture
from ivl.data.records import DataError
from ivl.errors import InputError
from ivl.processing.processor import Processor
from ivl.types import ImageRef, Record, VideoRef


@dataclass
class Stats:
    """Totals of one data set; tokens and tiles stay 0 without a processor."""

    name: str
    format: str = ""
    rows: int = 0
    bad: int = 0
    conversations: int = 0
    images: int = 0
    videos: int = 0
    tokens: int = 0
    tiles: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Bad rows by kind."""


def inspect(config: DataConfig, processor: Processor | None = None) -> Iterator[DataError | InputError | Stats]:
    """Yield every problem as it is met, and the Stats of each data set when it is done.

    Without a processor rows are read and images decoded; with one they are encoded too, which finds samples that are too
    long or train nothing and counts tokens and tiles. A file that cannot be opened is a problem, and the next one follows.

    Raises:
        InputError: if the mixture itself is bad.
    """
    for spec in load_mixture(config.mixture, root=config.root):
        stats = Stats(spec.name)
        try:
            mixture = Mixture((spec,), seed=0, shuffle=False)
        except InputError as error:
            stats.bad += 1
            yield error
        else:
            yield from _inspect(mixture, Encoder(config, mixture, processor) if processor else None, stats)
        yield stats


def _inspect(mixture: Mixture, encoder: Encoder | None, stats: Stats) -> Iterator[DataError]:
    rows = mixture.files[0]
    stats.format = rows.format
    for row in range(len(rows)):
        stats.rows += 1
        try:
            record = mixture.record(0, row)
            if encoder is None:
                check_media(record)
            else:
                _encode(encoder, row, stats)
            _count(record, stats)
        except DataError as error:
            stats.bad += 1
            stats.kinds[error.kind] = stats.kinds.get(error.kind, 0) + 1
            yield error


def _encode(encoder: Encoder, row: int, stats: Stats) -> None:
    result = encoder(Draw(row, 0, 0, row, 0)).result
    if isinstance(result, Dropped):
        raise result.error
    stats.tokens += result.num_tokens
    stats.tiles += result.num_tiles


def _count(record: Record, stats: Stats) -> None:
    stats.conversations += len(record.conversations)
    refs = media(record)
    stats.images += sum(isinstance(ref, ImageRef) for ref in refs)
    stats.videos += sum(isinstance(ref, VideoRef) for ref in refs)
