"""A call in a worker process returns, raises, or meets a limit; then the next call is answered."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ivl.errors import InputError
from ivl.utils.killable import CallStopped, Killable


def new(**limits: float) -> Killable:
    limits = {"cpu_seconds": 0.5, "wall_seconds": 5, "megabytes": 200} | limits
    return Killable("tests.utils.killable_calls:arithmetic", 100, **limits)


@pytest.fixture(scope="module")
def killable() -> Iterator[Killable]:
    killable = new()
    yield killable
    killable.close()


@pytest.mark.parametrize(
    ("what", "number", "error", "words"),
    [
        ("loop", 0, CallStopped, "more than 0.5 s of processor time"),
        ("memory", 300, CallStopped, "more than 200 MB of memory"),
        ("recursion", 0, CallStopped, "more levels than its stack holds"),
        ("segfault", 0, CallStopped, "more levels than its stack holds"),
        ("exit", 0, CallStopped, "memory"),
        ("error", 3, InputError, "not 3"),
        ("local", 0, RuntimeError, "Local: of no module"),
    ],
)
def test_a_call_that_fails_says_why_and_the_next_is_answered(
    killable: Killable, what: str, number: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        killable(what, number)
    assert killable("add", 5) == 105


def test_a_call_without_an_end_is_ended_and_its_answer_never_comes() -> None:
    killable = new(wall_seconds=0.3)
    with pytest.raises(CallStopped, match=r"more than 0\.3 s$"):
        killable("sleep", 1)
    assert [killable("add", n) for n in range(3)] == [100, 101, 102]
    killable.close()


def test_an_interrupted_call_leaves_no_answer_for_the_next(killable: Killable) -> None:
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        killable("sleep", 1)
    assert killable("add", 7) == 107


def test_threads_have_their_own_answers_by_one_worker(killable: Killable) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: killable("add", n), range(200))) == [100 + n for n in range(200)]
        assert len(set(pool.map(lambda n: killable("pid", n), range(20)))) == 1


def test_a_fork_has_a_worker_of_its_own(killable: Killable) -> None:
    worker = killable("pid", 0)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(killable("pid", 0)))
    child.start()
    assert results.get() not in (worker, os.getpid())
    child.join()
    assert killable("pid", 0) == worker


def test_a_lost_worker_is_replaced(killable: Killable) -> None:
    os.kill(killable("pid", 0), signal.SIGKILL)
    assert [killable("add", n) for n in range(3)] == [100, 101, 102]
    killable._process.kill()  # the one that it was forked from
    killable._process.wait()
    assert killable("add", 1) == 101


def test_a_limit_does_not_make_the_function_anew(killable: Killable) -> None:
    killable("add", 0)
    maker = killable._process.pid
    with pytest.raises(CallStopped):
        killable("memory", 300)
    assert killable("add", 0) == 100 and killable._process.pid == maker


def gone(process_id: int) -> bool:
    for _ in range(100):
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_worker_ends_with_its_owner() -> None:
    killable = new()
    worker = killable("pid", 0)
    del killable
    gc.collect()
    assert gone(worker)
    code = (
        "import os, signal; from tests.utils.test_killable import new; k = new(); "
        "print(k('pid', 0), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert gone(int(run.stdout))


def test_a_maker_that_fails_raises_at_every_call() -> None:
    killable = Killable("tests.utils.killable_calls:broken", cpu_seconds=1, wall_seconds=1, megabytes=100)
    for _ in range(2):
        with pytest.raises(InputError, match="pip install it"):
            killable()
