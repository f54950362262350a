"""Every row of a mixture looked at once: what is wrong, and how much there is."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing

from ivl.data.config import DataConfig
from ivl.data.encode import Dropped, Encoder, check_media, settle
from ivl.data.mixture import Draw, Mixture, load_mixture
from ivl.data.records import DataError
from ivl.datasets.stats import Stats
from ivl.errors import InputError
from ivl.processing.processor import Processor

CHUNK = 64
"""Rows looked at between two reports of progress, and sent to a worker at a time."""

Found = tuple[list[DataError], Stats]
Watch = Callable[[str, int, int], None]
"""Called with the data set's name, the rows done and the rows it has."""


def inspect(
    config: DataConfig, processor: Processor | None = None, *, languages: bool = False, watch: Watch | None = None
) -> Iterator[DataError | InputError | Stats]:
    """Yield every problem in the order of the files, and the Stats of each data set when it is done.

    Without a processor rows are read and images decoded; with one they are encoded too, which finds samples that are too
    long or train nothing and counts tokens and tiles. languages: whether Stats tell those of the rows. A file that cannot
    be opened is a problem, and the next one follows.
    config.num_workers processes look at rows; what is found does not depend on their number.

    Raises:
        InputError: if the mixture itself is bad.
    """
    for spec in load_mixture(config.mixture, root=config.root, format=config.format):
        stats = Stats(spec.name)
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
            look = _Look(mixture, Encoder(config, mixture, processor) if processor else None, languages)
            chunks = (range(at, min(at + CHUNK, len(rows))) for at in range(0, len(rows), CHUNK))
            with closing(_each(look, chunks, config)) as results:
                for problems, part in results:
                    yield from problems
                    stats.merge(part)
                    if watch:
                        watch(spec.name, stats.rows, len(rows))
        yield stats


def kind_of(error: InputError) -> str:
    """What a problem counts as: a row's kind, or `unreadable_file`."""
    return error.kind if isinstance(error, DataError) else "unreadable_file"


class _Look:
    """Rows of one data set -> their problems and totals."""

    def __init__(self, mixture: Mixture, encoder: Encoder | None, languages: bool) -> None:
        self.mixture, self.encoder, self.languages = mixture, encoder, languages

    def __call__(self, chunk: range) -> Found:
        problems, stats = [], Stats("")
        for row in chunk:
            stats.rows += 1
            try:
                self._add(row, stats)
            except DataError as error:
                stats.bad += 1
                stats.kinds[error.kind] += 1
                problems.append(error)
        return problems, stats

    def _add(self, row: int, stats: Stats) -> None:
        record = self.mixture.record(0, row)
        if self.encoder is None:
            check_media(record)
            stats.add(record, languages=self.languages)
            return
        result = self.encoder(Draw(row, 0, 0, row, 0)).result
        if isinstance(result, Dropped):
            raise result.error
        stats.add(record, size=(result.num_tokens, result.num_tiles), languages=self.languages)


def _each(look: _Look, chunks: Iterator[range], config: DataConfig) -> Generator[Found, None, None]:
    """look(chunk) of every chunk in order, here or in worker processes that are at most a few chunks ahead."""
    if not config.num_workers:
        yield from map(look, chunks)
        return
    context = multiprocessing.get_context(config.start_method or ("fork" if sys.platform == "linux" else "spawn"))
    with ProcessPoolExecutor(config.num_workers, context, initializer=_start_worker, initargs=(look, os.getpid())) as pool:
        pending: deque[Future[Found]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_look, chunk))
                if len(pending) > 2 * config.num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_here: _Look | None = None
"""Set in worker processes only, when they start."""


def _start_worker(look: _Look, parent: int) -> None:
    global _here
    _here = look
    settle(parent)


def _look(chunk: range) -> Found:
    assert _here is not None
    return _here(chunk)
