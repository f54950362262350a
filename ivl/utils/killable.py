"""Calls one function in a process of its own, which a limit on time or memory can end."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from mmap import mmap
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from ivl.utils.imports import import_object
from ivl.utils.workers import picklable

_TOO_DEEP = 2
"""Exit status of a worker after a RecursionError."""


class CallStopped(Exception):
    """A call met a limit, which the message names, such as `more than 2 s of processor time`."""


class Killable:
    """Calls a function in a worker process, which starts at the first call and is replaced when a limit ends it.

    Safe in threads, which wait for one another, and after a fork. The worker ends with this object and with its process.

    Args:
        maker: `package.module:name` of a function that returns the function to call. It runs once, without limits; calls are
            answered by a fork of the process that it ran in, and a fork that a limit ends is followed by another.
        setup: Arguments of the maker. They, the arguments of calls and the results are pickled.
        cpu_seconds: Processor time of one call. It ends most calls first, so that the end hardly depends on other processes.
        wall_seconds: Time of one call.
        megabytes: Memory of one call beyond what a worker has when it is ready; on Linux only.
    """

    def __init__(self, maker: str, *setup: Any, cpu_seconds: float, wall_seconds: float, megabytes: float) -> None:
        self.cpu_seconds, self.wall_seconds, self.megabytes = cpu_seconds, wall_seconds, megabytes
        self._setup = (maker, setup, cpu_seconds, megabytes)
        self._forget()

    def _forget(self) -> None:
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Return what the function returns, or raise the exception that it raises.

        Raises:
            CallStopped: if the call met a limit.
        """
        if self._owner != os.getpid():  # a fork: the worker is the parent's, and a thread of the parent may hold the lock
            self._forget()
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            return self._ask(arguments, self.wall_seconds)

    def close(self) -> None:
        """End the worker. The next call starts another one."""
        if self._process is not None:
            self._end()

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from ivl.utils.killable import work; work({theirs.fileno()})"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )  # fmt: skip
        theirs.close()
        self._end = weakref.finalize(self, _end, self._process, self._owner)
        try:
            self._ask(self._setup, None)
        except BaseException:
            self._end()
            raise

    def _ask(self, message: tuple[Any, ...], seconds: float | None) -> Any:
        answered = False
        try:
            self._pipe.send(message)
            answered = self._pipe.poll(seconds)
            succeeded, result = self._pipe.recv() if answered else (False, CallStopped(f"more than {seconds:g} s"))
        except (EOFError, ConnectionError):
            raise CallStopped(f"more than {self.megabytes:g} MB of memory") from None
        finally:
            if not answered:  # the answer may still come, and is not that of the next call
                self._end()
        if not succeeded:
            raise result
        return result


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a worker and its fork, unless this process is a fork of its owner."""
    if os.getpid() == owner:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def work(descriptor: int) -> None:
    """Make the function, and let forks answer the calls that come through a pipe until it closes; a worker runs this."""
    pipe, busy = Connection(descriptor), mmap(-1, 1)
    maker, setup, cpu_seconds, megabytes = pipe.recv()
    reasons = {-signal.SIGPROF: f"more than {cpu_seconds:g} s of processor time"}
    reasons |= dict.fromkeys((-signal.SIGSEGV, _TOO_DEEP), "more levels than its stack holds")
    functions: list[Callable[..., Any]] = []

    def make() -> None:
        functions.append(import_object(maker, "function")(*setup))
        _limit_memory(megabytes)

    pipe.send_bytes(_answer(make, ()))
    while functions:
        child = os.fork()
        if not child:
            _serve(pipe, busy, functions[0], cpu_seconds)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if busy[0]:
            busy[0] = 0
            stopped = CallStopped(reasons.get(status, f"more than {megabytes:g} MB of memory"))
            pipe.send_bytes(pickle.dumps((False, stopped)))
        elif status == 0:
            return


def _serve(pipe: Connection, busy: mmap, function: Callable[..., Any], cpu_seconds: float) -> NoReturn:
    """Answer calls until the pipe closes. A process that ends while it is busy has met a limit."""
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        busy[0] = 1
        # The kernel ends the process: an operation inside a library may never return to Python.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        answer = _answer(function, arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        busy[0] = 0
        pipe.send_bytes(answer)


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((True, function(*arguments)))
    except MemoryError:
        os._exit(1)
    except RecursionError:
        os._exit(_TOO_DEEP)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return pickle.dumps((False, picklable(error)))


def _limit_memory(megabytes: float) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + int(megabytes * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
