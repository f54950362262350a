"""Signals that ask a long computation to end, noted instead of obeyed at once."""

from __future__ import annotations

import os
import signal
from typing import Any, Self


class Interruption:
    """In a `with`, the first SIGINT, SIGTERM or SIGHUP is noted, for the computation to stop where it is safe.

    A second one ends it at once. Signals that are ignored stay ignored, as under nohup, and outside the main
    thread nothing is noted.
    """

    def __init__(self, note: str) -> None:
        """note: a line for stderr when a signal comes."""
        self.note = f"{note}\n".encode()
        self.signal: int | None = None
        """The signal that came."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                try:
                    signal.signal(number, self._note)
                except ValueError:  # not the main thread
                    break
                self._before[number] = before
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, _: object) -> None:
        self.signal = number
        self.__exit__()
        os.write(2, self.note)  # print may be at work where the signal came

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None
