"""Draws -> samples, here or in worker processes: in order, and the same whatever the number of workers."""

from __future__ import annotations

import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ivl.data.config import DataConfig, StartMethod
from ivl.data.mixture import Draw, Mixture
from ivl.data.records import media_of
from ivl.errors import DataError
from ivl.processing.processor import Processor, SampleOptions
from ivl.types import Record, Sample, VideoRef

T = TypeVar("T")
R = TypeVar("R")
Encoded = Sample | DataError
"""What a draw becomes: a sample, or the fault of its row."""

PAIR = "a preference pair, whose rejected reply would be trained on; objective preference takes it"
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
            return self._sample(record, options), options.generator is None
        except DataError as error:
            # A new one, for the traceback of the old one would keep the row's media in memory.
            return DataError(error.source, error.kind, error.problem), False

    def _options(self, record: Record, draw: Draw) -> SampleOptions:
        config, dataset = self.config, self.mixture.specs[draw.dataset]
        generator = None
        if dataset.data_augment or any(isinstance(ref, VideoRef) for ref in media_of(record)):
            generator = random.Random(f"{self.mixture.seed} {draw.epoch} {draw.dataset} {draw.row} {draw.copy}")
        return SampleOptions(
            max_tiles_per_image=dataset.max_dynamic_patch or config.max_tiles_per_image,
            max_tokens=config.max_tokens,
            max_total_tiles=config.max_tiles,
            overflow="truncate" if config.over_budget == "truncate" else "error",
            averaging=config.averaging,
            augment=config.augmentation if dataset.data_augment else None,
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


class SampleCache:
    """The first `limit` samples that come by and have nothing random about them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[tuple[int, int], Sample] = {}

    def get(self, draw: Draw) -> Sample | None:
        return self._kept.get((draw.dataset, draw.row)) if self.limit else None

    def put(self, draw: Draw, result: Encoded, fixed: bool) -> Encoded:
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
    if not _in_worker():
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
    arrays = {name: torch.from_numpy(value) for name, value in vars(result).items() if isinstance(value, np.ndarray)}
    tensors = {name: value for name, value in vars(result).items() if isinstance(value, torch.Tensor)}
    return replace(result, **arrays, **{name: value.clone() for name, value in tensors.items() if value.is_shared()})


def in_order(
    function: Callable[[T], R], items: Iterable[T], *, num_workers: int, prefetch: int, start_method: StartMethod | None
) -> Generator[R]:
    """Call a function on every item, here or in worker processes; yields the results in the order of the items.

    Args:
        function: picklable where start_method is spawn.
        items: taken at most num_workers * prefetch ahead of the results; one by one without workers.
        start_method: None is fork on Linux and spawn elsewhere.

    Raises:
        Exception: the one that the function raised, as it was.
        RuntimeError: if a worker died.
    """
    if not num_workers:
        yield from map(function, items)
        return
    with _quiet_start():
        loader = DataLoader(
            _Calls(function),
            batch_size=None,
            sampler=items,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            collate_fn=_unchanged,
            multiprocessing_context=start_method or ("fork" if sys.platform == "linux" else "spawn"),
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # DataLoader would draw from the global one
        )
        results = iter(loader)
    try:
        while (result := _next_result(results)) is not _END:
            if isinstance(result, _Failure):
                raise result.error
            yield result
    finally:
        del results  # ends the workers


_END = object()


def _next_result(results: Iterator[Any]) -> Any:
    """The next result, or _END. Errors of the function are results, so that any other error is of the workers."""
    try:
        return next(results, _END)
    except (RuntimeError, OSError, EOFError) as error:
        problem = f"a worker process died; if memory ran out, lower data.num_workers or data.prefetch ({error})"
        # Without the traceback, whose frames would keep the other workers alive.
        raise RuntimeError(problem) from error.with_traceback(None)


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Keep DataLoader from warning about the number of workers, and from changing how the main process takes signals.

    Its handler of SIGCHLD raises wherever the main thread is when a worker dies, and may do so again in the middle of cleaning
    up. Without it the loop notices a dead worker when it next waits for a result, within seconds.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)


@dataclass(frozen=True)
class _Failure:
    """An exception on its way from a worker. DataLoader would raise another one with its text."""

    error: Exception


class _Calls(Dataset[Any]):
    """A function as a data set: its item for x is function(x)."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except Exception as error:
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            return _Failure(_picklable(error))


def _picklable(error: Exception) -> Exception:
    """The error, or one with its text: what cannot be pickled would be lost on its way, and the reader would wait forever."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception_only(error)))


def _unchanged(result: T) -> T:
    return result


def _in_worker() -> bool:
    return torch.utils.data.get_worker_info() is not None


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C, and ends the workers
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after its parent, even one that was killed; DataLoader's workers may take over 10 seconds."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
