"""The stream of an epoch begun on some ranks, dealt to another number of them.

Rank r of W draws the positions r, r + W, ... of one global stream. What the ranks have released together is not a prefix of
it: some are ahead, and their open packs hold samples from before. So what lies before the foremost rank and was not released
becomes a backlog that the new ranks share; behind it all go on as if they had begun there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ivl.errors import InputError


def deal(states: Sequence[dict[str, Any]], world_size: int, stop: int) -> list[tuple[int, list[int]]]:
    """States of `Loader.state` of all ranks -> for every new rank its next position and its backlog.

    Every position below `stop` that no rank has released or dropped is dealt exactly once.

    Raises:
        InputError: if they are not the states of all ranks of one run.
    """
    old = states[0]["world_size"]
    ranks = [state["rank"] for state in states]
    if ranks != list(range(old)) or any(state["world_size"] != old for state in states):
        raise InputError(
            f"the saved data position is of {old} ranks and only together they say what is left; got those of ranks {ranks}"
        )
    frontier = max(state["next"] for state in states)
    left: list[int] = []
    for state in states:
        left += [position for positions in state["open"] for position in positions]
        left += state.get("backlog", [])
        left += range(state["next"], min(frontier, stop), old)
    left.sort()
    return [(frontier + (rank - frontier) % world_size, left[rank::world_size]) for rank in range(world_size)]
