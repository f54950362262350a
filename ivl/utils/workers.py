"""Work in several processes of this machine, by the workers of torch's DataLoader."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ivl.errors import InputError

T = TypeVar("T")
R = TypeVar("R")
E = TypeVar("E", bound=BaseException)
StartMethod = Literal["fork", "spawn"]


def in_order(
    function: Callable[[T], R], items: Iterable[T], *, num_workers: int, prefetch: int, start_method: StartMethod | None = None
) -> Generator[R]:
    """Call a function on every item, here or in worker processes; yields the results in the order of the items.

    Args:
        function: picklable where start_method is spawn.
        items: taken at most num_workers * prefetch ahead of the results; one by one without workers.
        start_method: None is fork on Linux and spawn elsewhere.

    Raises:
        Exception: the one that the function raised, as it was.
        InputError: if a worker died.
    """
    if not num_workers:
        yield from map(function, items)
        return
    import torch
    from torch.utils.data import DataLoader

    calls: Any = _Calls(function)
    with _quiet_start():
        loader = DataLoader(
            calls,
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
        # Without the traceback, whose frames would keep the other workers alive.
        raise InputError(
            f"a worker process was killed, perhaps out of memory; try fewer workers ({error})"
        ) from error.with_traceback(None)


@contextmanager
def _quiet_start() -> Generator[None]:
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

    error: BaseException


class _Calls:
    """A function as the data set that DataLoader asks for: the item of x is function(x)."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            return _Failure(picklable(error))


def picklable(error: E) -> E | RuntimeError:
    """The error, or one with its text: what cannot be pickled would be lost on its way, and the reader would wait forever."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception_only(error)))


def _unchanged(result: T) -> T:
    return result


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C, and ends the workers
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after its parent, even one that was killed; DataLoader's workers may take over 10 seconds."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
