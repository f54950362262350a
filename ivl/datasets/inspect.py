"""Look at every row of a mixture once: find its problems and count its contents."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np

from ivl.data.config import DataConfig
from ivl.data.encode import Encoder
from ivl.data.mixture import Draw, Mixture, load_mixture
from ivl.data.records import media_of
from ivl.datasets.stats import DatasetStats
from ivl.errors import DataError, InputError, MediaError
from ivl.formats.base import Rows
from ivl.processing.image import load_image
from ivl.processing.processor import Processor
from ivl.processing.video import load_frames
from ivl.types import ImageRef, Record
from ivl.utils.workers import in_order

CHUNK = 64
"""Rows between two reports of progress, which a worker gets at a time."""

Findings = tuple[list[DataError], DatasetStats, list[tuple[int, int]]]
"""Problems, counts, and the number and the hashed id of each row that has one."""
Watch = Callable[[str, int, int], None]
"""Called with the data set's name, the rows done and the rows it has."""


def inspect(
    config: DataConfig, processor: Processor | None = None, *, watch: Watch | None = None
) -> Iterator[DataError | InputError | DatasetStats]:
    """Yield every problem in the order of the files, and the DatasetStats of each data set when it is done.

    Without a processor rows are read and media decoded; with one they are encoded too, which finds samples that are too
    long or train nothing and counts tokens and tiles. A file that cannot be opened is a problem, and the next one follows.
    The findings do not depend on config.num_workers.

    Raises:
        InputError: if the mixture itself is bad.
    """
    for spec in load_mixture(config.mixture, root=config.root, format=config.format):
        stats = DatasetStats(spec.name)
        try:
            mixture = Mixture((spec,), seed=0, shuffle=False)
        except InputError as error:
            stats.format = "not read"
            stats.bad += 1
            stats.kinds[kind_of(error)] += 1
            yield error
        else:
            rows = mixture.files[0]
            stats.format = rows.format
            look = _Inspector(mixture, Encoder(config, mixture, processor) if processor else None)
            chunks = (range(at, min(at + CHUNK, len(rows))) for at in range(0, len(rows), CHUNK))
            with closing(
                in_order(look, chunks, num_workers=config.num_workers, prefetch=2, start_method=config.start_method)
            ) as results:
                ids: array[int] = array("q")
                for problems, part, found in results:
                    yield from problems
                    stats.merge(part)
                    ids.extend(number for pair in found for number in pair)
                    if watch:
                        watch(spec.name, stats.rows, len(rows))
            _note(stats, rows, np.array(ids).reshape(-1, 2))
        yield stats


def _note(stats: DatasetStats, rows: Rows, ids_N2: np.ndarray) -> None:
    """Note ids that come more than once, and marks without media."""
    rows_N, hashes_N = ids_N2[np.argsort(ids_N2[:, 1], kind="stable")].T
    again = np.flatnonzero(np.diff(hashes_N) == 0) + 1
    if len(again):
        first = again[np.argmin(rows_N[again])]
        places = rows.source(int(rows_N[first])), rows.source(int(rows_N[first - 1]))
        stats.repeated_ids = len(again)
        stats.notes.append(f"repeated ids: {len(again):,}, first {places[0]} has that of {places[1]}")
    if stats.letters:
        stats.notes.append(f"questions that say <image> or <video> without such a medium, so in letters: {stats.letters:,}")


def kind_of(error: InputError) -> str:
    """The kind that a problem counts as: a row's, or `unreadable_file`."""
    return error.kind if isinstance(error, DataError) else "unreadable_file"


def check_media(record: Record) -> None:
    """Decode every image, and a frame of every video.

    Raises:
        DataError: for the first medium that is missing or cannot be decoded.
    """
    for ref in media_of(record):
        try:
            if isinstance(ref, ImageRef):
                load_image(ref)
            else:
                load_frames(ref, 1)
        except MediaError as error:
            raise DataError(record.source, error.kind, str(error)) from error


class _Inspector:
    """Rows of one data set -> their problems and counts."""

    def __init__(self, mixture: Mixture, encoder: Encoder | None) -> None:
        self.mixture, self.encoder = mixture, encoder

    def __call__(self, chunk: range) -> Findings:
        problems, stats, ids = [], DatasetStats(""), []
        for row in chunk:
            stats.rows += 1
            try:
                record = self._add(row, stats)
                if record.id != record.source:
                    digest = hashlib.blake2b(record.id.encode(errors="replace"), digest_size=8).digest()
                    ids.append((row, int.from_bytes(digest, signed=True)))
            except DataError as error:
                stats.bad += 1
                stats.kinds[error.kind] += 1
                problems.append(error)
        return problems, stats, ids

    def _add(self, row: int, stats: DatasetStats) -> Record:
        record = self.mixture.record(0, row)
        if self.encoder is None:
            check_media(record)
            stats.add(record)
            return record
        sample, _ = self.encoder(Draw(position=row, epoch=0, dataset=0, row=row, copy=0))
        if isinstance(sample, DataError):
            raise sample
        stats.add(record, size=(sample.num_tokens, sample.num_tiles))
        return record
