"""What workers compute arrives as it was, in order, and leaves neither memory nor open files behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from ivl.data.encode import _as_message, _as_tensors
from ivl.errors import DataError, InputError
from ivl.types import Sample
from ivl.utils.workers import in_order


def sample(n: int) -> Sample:
    """A sample with large tiles."""
    tokens = torch.arange(5) + n
    tiles_GSSC = torch.full((2, 200, 300, 3), n % 256, dtype=torch.uint8)
    return Sample(tokens, tokens + 1, torch.ones(5), (5,), tiles_GSSC, torch.arange(2), id=str(n))


def message(n: int) -> Sample | DataError:
    return _as_message(sample(n))


def workers(function, items, num_workers: int = 2):
    return closing(in_order(function, items, num_workers=num_workers, prefetch=2, start_method=None))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files in /proc")
def test_samples_arrive_as_they_were_and_hold_no_files():
    before, in_memory = open_files(), set(Path("/dev/shm").iterdir())
    with workers(message, range(40)) as results:
        samples = [_as_tensors(result) for result in results]
    gc.collect()
    assert open_files() - before < 10 and set(Path("/dev/shm").iterdir()) <= in_memory
    for n, (given, arrived) in enumerate(zip(map(sample, range(40)), samples, strict=True)):
        assert isinstance(arrived, Sample) and arrived.id == str(n)
        assert all(getattr(arrived, name).equal(value) for name, value in vars(given).items() if torch.is_tensor(value))
        arrived.tokens_T[:] = 0  # it may be written


def fails(n: int) -> int:
    if n == 3:
        raise DataError("a.jsonl:3", "bad_row", "is bad")
    if n == 5:
        raise KeyError("five")
    if n == 7:

        class Local(Exception):
            pass

        raise Local("seven")
    return n


@pytest.mark.parametrize(
    ("items", "kind", "words"),
    [([1, 3], DataError, "a.jsonl:3: is bad"), ([5], KeyError, "five"), ([7], RuntimeError, "Local: seven")],
)
def test_an_error_arrives_as_it_was(items, kind, words):
    with pytest.raises(kind) as caught, workers(fails, items) as results:
        list(results)
    assert words in str(caught.value)
    assert not multiprocessing.active_children()


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with workers(fails, [0]) as results:
        assert list(results) == [0]
    assert torch.rand(1) == expected


def killed_at(last: int, n: int) -> Sample | DataError:
    if n == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return message(n)


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="looks into /dev/shm")
def test_a_killed_worker_ends_the_run_and_leaves_no_memory():
    in_memory = set(Path("/dev/shm").iterdir())
    with pytest.raises(InputError, match="a worker process was killed"), workers(partial(killed_at, 9), range(20)) as results:
        list(results)
    gc.collect()
    assert not multiprocessing.active_children()
    assert set(Path("/dev/shm").iterdir()) <= in_memory


def test_an_input_error_keeps_its_class():
    def refuse(n: int) -> None:
        raise InputError(f"{n} changed while in use")

    with pytest.raises(InputError, match="1 changed while in use") as caught, workers(refuse, [1], 1) as results:
        list(results)
    assert type(caught.value) is InputError and str(caught.value) == "1 changed while in use"
