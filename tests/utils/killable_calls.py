"""Functions that the tests of Killable call in a worker."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from ivl.errors import InputError


def arithmetic(offset: int) -> Callable[[str, int], Any]:
    """Return a function that adds the offset, or misbehaves as its first argument says."""

    def call(what: str, number: int) -> Any:
        if what == "loop":
            return sum(1 for _ in range(10**12))
        if what == "sleep":
            time.sleep(number)
        if what == "memory":
            return len(bytes(number << 20))
        if what == "recursion":
            return call(what, number)
        if what == "segfault":
            os.kill(os.getpid(), 11)
        if what == "exit":
            os._exit(0)
        if what == "error":
            raise InputError(f"not {number}")
        if what == "local":

            class Local(BaseException):
                pass

            raise Local("of no module")
        print("noise")
        return os.getpid() if what == "pid" else number + offset

    return call


def broken() -> None:
    """Fail as a maker whose library is missing."""
    raise InputError("pip install it")
