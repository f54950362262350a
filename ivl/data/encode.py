"""Draws -> samples, here or in worker processes: in order, and the same whatever the number of workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ivl.data.config import DataConfig
from ivl.data.mixture import Draw, Mixture
from ivl.data.records import media_of
from ivl.data.transport import Parcel, receive, send
from ivl.errors import DataError, DataFault, MediaError
from ivl.processing.image import MAX_PIXELS, load_image
from ivl.processing.processor import Processor, SampleOptions
from ivl.processing.video import load_frames
from ivl.types import ImageRef, Record, Sample, VideoRef

PAIR = "a preference pair, whose rejected reply would be trained on; objective preference takes it"
NO_PAIR = "not a preference pair; the objective preference needs rows with a prompt, `chosen` and `rejected`"
CHUNK = 8
"""Samples a worker encodes at a time; spreads the cost of a message between processes."""


@dataclass(frozen=True)
class Dropped:
    """What came of a bad row."""

    source: str
    kind: DataFault
    problem: str

    @property
    def error(self) -> DataError:
        return DataError(self.source, self.kind, self.problem)


@dataclass(frozen=True)
class Cut:
    """A sample that fits a pack after turns were dropped from its end; `problem` says what it was and what is left."""

    sample: Sample
    problem: str

    @property
    def num_tokens(self) -> int:
        return self.sample.num_tokens

    @property
    def num_tiles(self) -> int:
        return self.sample.num_tiles


Result = Sample | Cut | Dropped


class Encoded(NamedTuple):
    result: Result
    fixed: bool
    """Whether every draw of the row gives the same: nothing about it is random."""


class Encoder:
    """Turns draws into samples. Whatever is random follows from the seed and the draw, never from the process."""

    def __init__(self, config: DataConfig, mixture: Mixture, processor: Processor, pairs: bool | None = None) -> None:
        """pairs: whether rows must be preference pairs, or must not be; None takes any."""
        self.config, self.mixture, self.processor, self.pairs = config, mixture, processor, pairs

    def __call__(self, draw: Draw) -> Encoded:
        try:
            record = self.mixture.record(draw.dataset, draw.row)
            if self.pairs is not None and record.is_pair != self.pairs:
                raise DataError(record.source, "bad_row", NO_PAIR if self.pairs else PAIR)
            options = self._options(record, draw)
            sample = self._sample(record, options)
            if sample.cut:
                return Encoded(Cut(sample, sample.cut), False)
            return Encoded(sample, options.generator is None)
        except DataError as error:
            return Encoded(Dropped(error.source, error.kind, error.problem), False)

    def _options(self, record: Record, draw: Draw) -> SampleOptions:
        config, spec = self.config, self.mixture.specs[draw.dataset]
        generator = None
        if spec.data_augment or any(isinstance(ref, VideoRef) for ref in media_of(record)):
            generator = random.Random(f"{self.mixture.seed} {draw.epoch} {draw.dataset} {draw.row} {draw.copy}")
        return SampleOptions(
            max_tiles_per_image=spec.max_dynamic_patch or config.max_tiles_per_image,
            max_tokens=config.max_tokens,
            max_total_tiles=config.max_tiles,
            overflow="truncate" if config.over_budget == "truncate" else "error",
            averaging=config.averaging,
            augment=config.augmentation if spec.data_augment else None,
            min_frames=config.min_frames,
            max_frames=config.max_frames,
            generator=generator,
        )

    def _sample(self, record: Record, options: SampleOptions) -> Sample:
        try:
            return self.processor.sample(record, options=options)
        except DataError:
            raise
        except Exception as error:
            error.add_note(f"while encoding {record.source}")
            raise


def check_media(record: Record, *, max_pixels: int = MAX_PIXELS) -> None:
    """Raise the DataError of the first medium that is missing or cannot be decoded, if there is one."""
    for ref in media_of(record):
        try:
            if isinstance(ref, ImageRef):
                load_image(ref, max_pixels=max_pixels)
            else:
                load_frames(ref, 1, max_pixels=max_pixels)
        except MediaError as error:
            raise DataError(record.source, error.kind, str(error)) from error


@contextlib.contextmanager
def encoding(encoder: Encoder, *, num_workers: int, prefetch: int, start_method: str | None, cache: Cache):
    """A function that maps draws to (draw, result) in order, reading at most num_workers * prefetch draws ahead."""

    def here(draws: Iterator[Draw]) -> Iterator[tuple[Draw, Result]]:
        for draw in draws:
            yield draw, cache.get(draw) or cache.put(draw, encoder(draw))

    if num_workers == 0:
        yield here
        return
    start_method = start_method or ("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context(start_method), initializer=_start_worker, initargs=(encoder, os.getpid())
    )

    def apart(draws: Iterator[Draw]) -> Iterator[tuple[Draw, Result]]:
        pending: deque[tuple[list[Draw], dict[int, Sample], Future | None]] = deque()

        def submit() -> None:
            chunk = list(islice(draws, CHUNK))
            known = {draw.position: hit for draw in chunk if (hit := cache.get(draw))}
            missing = [draw for draw in chunk if draw.position not in known]
            if chunk:
                pending.append((chunk, known, pool.submit(_encode, missing) if missing else None))

        for _ in range(max(1, num_workers * prefetch // CHUNK)):
            submit()
        while pending:
            chunk, known, future = pending.popleft()
            arrived = iter(future.result()) if future else iter(())
            submit()
            for draw in chunk:
                yield draw, known.get(draw.position) or cache.put(draw, _unpack(next(arrived)))

    try:
        yield apart
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Cache:
    """The first `limit` samples that come by and have nothing random about them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[tuple[int, int], Sample] = {}

    def get(self, draw: Draw) -> Sample | None:
        return self._kept.get((draw.dataset, draw.row)) if self.limit else None

    def put(self, draw: Draw, encoded: Encoded) -> Result:
        result, fixed = encoded
        if fixed and isinstance(result, Sample) and len(self._kept) < self.limit:
            self._kept[draw.dataset, draw.row] = result
        return result


_encoder: Encoder | None = None
"""Set in worker processes only, when they start."""


def _start_worker(encoder: Encoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    settle(parent)


def settle(parent: int) -> None:
    """Make a worker process quiet: one thread, deaf to Ctrl-C, gone when its parent is."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """Do not outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode(draws: list[Draw]) -> list[Any]:
    assert _encoder is not None
    return [_pack(_encoder(draw)) for draw in draws]


def _pack(encoded: Encoded) -> Any:
    """Arrays travel through the pipe as bytes, tiles through shared memory; tensors would each take a file descriptor."""
    result, fixed = encoded
    if isinstance(result, Dropped):
        return encoded
    sample, problem = (result.sample, result.problem) if isinstance(result, Cut) else (result, None)
    values = vars(sample).values()  # in the order of the fields
    parent = os.getppid()
    return [send(value, parent) if isinstance(value, torch.Tensor) else value for value in values], fixed, problem


def _unpack(packed: Any) -> Encoded:
    if isinstance(packed, Encoded):
        return packed
    values, fixed, problem = packed
    fields: list[Any] = [receive(value) if isinstance(value, np.ndarray | Parcel) else value for value in values]
    sample = Sample(*fields)
    return Encoded(sample if problem is None else Cut(sample, problem), fixed)
