"""Draws -> samples, here or in worker processes: in order, and the same whatever the number of workers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ivl.data.config import DataConfig
from ivl.data.mixture import Draw, Mixture
from ivl.data.records import media_of
from ivl.errors import DataError
from ivl.processing.processor import Processor, SampleOptions
from ivl.types import Record, Sample, VideoRef
from ivl.utils.workers import in_order

T = TypeVar("T")
R = TypeVar("R")
Encoded = Sample | DataError
"""What a draw becomes: a sample, or the fault of its row."""

PAIR = "a preference pair, whose rejected reply would be trained on; objective preference (ivl train mpo) takes it"
NO_PAIR = "not a preference pair; the objective preference needs rows with a prompt, `chosen` and `rejected`"
CHUNK = 8
"""Samples that a worker encodes at a time; spreads the cost of a message between processes."""
SMALL = 1 << 16
"""Bytes up to which a tensor travels through a pipe, where shared memory costs more than the copy."""


class Encoder:
    """Turns draws into samples. Whatever is random follows from the seed and the draw, never from the process."""

    def __init__(self, config: DataConfig, mixture: Mixture, processor: Processor, pairs: bool | None = None) -> None:
        """pairs: whether rows must be preference pairs, or must not be; None takes any."""
        self.config, self.mixture, self.processor, self.pairs = config, mixture, processor, pairs

    def __call__(self, draw: Draw) -> tuple[Encoded, bool]:
        """The sample or the fault, and whether every draw of the row gives the same: nothing about it is random."""
        try:
            record = self.mixture.record(draw.dataset, draw.row)
            if self.pairs is not None and record.is_pair != self.pairs:
                raise DataError(record.source, "bad_row", NO_PAIR if self.pairs else PAIR)
            options = self._options(record, draw)
            return self.processor.sample(record, options=options), options.generator is None
        except DataError as error:
            # A new one, for the traceback of the old one would keep the row's media in memory.
            return DataError(error.source, error.kind, error.problem), False
        except Exception as error:
            error.add_note(f"while encoding {self.mixture.files[draw.dataset].source(draw.row)}")
            raise

    def _options(self, record: Record, draw: Draw) -> SampleOptions:
        config, dataset = self.config, self.mixture.specs[draw.dataset]
        generator = None
        if dataset.data_augment or any(isinstance(ref, VideoRef) for ref in media_of(record)):
            generator = random.Random(f"{self.mixture.seed} {draw.epoch} {draw.dataset} {draw.row} {draw.copy}")
        return SampleOptions(
            max_tiles_per_image=dataset.max_dynamic_patch or config.max_tiles_per_image,
            max_tokens=config.max_tokens,
            max_total_tiles=config.max_tiles,
            overflow=config.over_budget if config.over_budget in ("truncate", "cut") else "error",
            averaging=config.averaging,
            augment=config.augmentation if dataset.data_augment else None,
            min_frames=config.min_frames,
            max_frames=config.max_frames,
            frames_by=config.frames_by,
            generator=generator,
        )


class SampleCache:
    """The first `limit` samples that come by and have nothing random about them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[tuple[int, int], Sample] = {}

    def get(self, draw: Draw) -> Sample | None:
        """Return the sample of a draw, if it is kept."""
        return self._kept.get((draw.dataset, draw.row)) if self.limit else None

    def put(self, draw: Draw, result: Encoded, fixed: bool) -> Encoded:
        """Keep a sample without random parts while there is room; returns it."""
        if fixed and isinstance(result, Sample) and len(self._kept) < self.limit:
            self._kept[draw.dataset, draw.row] = result
        return result


def encode(encoder: Encoder, draws: Iterator[Draw], cache: SampleCache) -> Generator[tuple[Draw, Encoded]]:
    """Encode draws in their order, in config.num_workers processes; close the iterator to end them.

    Without workers no draw is taken before its result is asked for.
    """
    config = encoder.config
    size = min(CHUNK, config.prefetch) if config.num_workers else 1
    pending: deque[list[tuple[Draw, Sample | None]]] = deque()

    def missing() -> Iterator[list[Draw]]:
        """The draws of each chunk that the cache does not have. DataLoader asks for chunks ahead of their results."""
        while chunk := [(draw, cache.get(draw)) for draw in islice(draws, size)]:
            pending.append(chunk)
            yield [draw for draw, known in chunk if known is None]

    call = partial(_encode_chunk, encoder)
    prefetch = max(1, config.prefetch // size)
    with closing(
        in_order(call, missing(), num_workers=config.num_workers, prefetch=prefetch, start_method=config.start_method)
    ) as chunks:
        for chunk in chunks:
            arrived = iter(chunk)
            for draw, known in pending.popleft():
                if known is None:
                    result, fixed = next(arrived)
                    known = cache.put(draw, _as_tensors(result), fixed)
                yield draw, known


def _encode_chunk(encoder: Encoder, draws: list[Draw]) -> list[tuple[Encoded, bool]]:
    encoded = map(encoder, draws)
    if get_worker_info() is None:
        return list(encoded)
    return [(_as_message(result), fixed) for result, fixed in encoded]


def _as_message(result: Encoded) -> Encoded:
    """Put the small tensors of a sample into arrays, which travel by value.

    A large tensor, in practice the tiles, stays one: torch moves it into shared memory that has a file descriptor and no name,
    so the system frees it when the last process that has it open ends, however it ends.
    """
    if not isinstance(result, Sample):
        return result
    tensors = {name: value for name, value in vars(result).items() if isinstance(value, torch.Tensor)}
    return replace(result, **{name: value.numpy() for name, value in tensors.items() if value.nbytes <= SMALL})


def _as_tensors(result: Encoded) -> Encoded:
    """Undo `_as_message`; large tensors are copied, or samples in open packs would hold many file descriptors."""
    if not isinstance(result, Sample):
        return result
    arrays = {name: torch.as_tensor(value) for name, value in vars(result).items() if isinstance(value, np.ndarray)}
    tensors = {name: value for name, value in vars(result).items() if isinstance(value, torch.Tensor)}
    return replace(result, **arrays, **{name: value.clone() for name, value in tensors.items() if value.is_shared()})
