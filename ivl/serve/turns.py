"""Turns of groups at the threads of a pool, so that the work of one key never keeps another's waiting."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def after(job: Future[Any], release: Callable[[], None]) -> None:
    """Have the event loop end a turn when the work is done, which may be after its caller has gone."""
    loop = asyncio.get_running_loop()

    def done(_: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed, and with it went all turns
            loop.call_soon_threadsafe(release)

    job.add_done_callback(done)


class Turns:
    """Places that groups take by turns. One group alone takes all places.

    A place that becomes free goes to the waiting group that holds the fewest, of these to the one that has waited longest.
    All methods belong to the event loop.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._held = collections.Counter[str]()
        self._waiting: dict[str, collections.deque[asyncio.Future[None]]] = {}

    async def acquire(self, group: str) -> None:
        """Take a place for a group, and wait for it if there is none."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, collections.deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the place came at the same moment
                self.release(group)
            elif turn in (turns := self._waiting.get(group, collections.deque())):
                turns.remove(turn)
                if not turns:
                    del self._waiting[group]
            raise

    def release(self, group: str) -> None:
        """Give back a place of a group."""
        self._held[group] -= 1
        if not self._held[group]:
            del self._held[group]
        self._free += 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            group = min(self._waiting, key=self._held.__getitem__)
            turns = self._waiting.pop(group)
            turn = turns.popleft()
            if turns:
                self._waiting[group] = turns  # behind the other groups
            if not turn.cancelled():
                self._free -= 1
                self._held[group] += 1
                turn.set_result(None)
