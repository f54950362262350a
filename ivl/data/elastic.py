"""Deal the rest of an epoch that some ranks began to another number of ranks.

Rank r of W draws the positions r, r + W, ... of one global stream. The positions that the ranks have trained on together are
not a prefix of it: some ranks are ahead, and samples from before wait in open packs. So the positions behind the foremost rank
that are not trained become a backlog, which the new ranks share; from there on they draw as if they had begun there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ivl.errors import InputError, short


def deal(states: Sequence[dict[str, Any]], world_size: int, stop: int) -> list[tuple[int, list[int]]]:
    """Deal the positions below `stop` that no rank has released or dropped, each to exactly one new rank.

    Args:
        states: the values of `Loader.state` of all old ranks, in their order.

    Returns:
        For every new rank its next position and its backlog.

    Raises:
        InputError: if they are not the states of all ranks of one run.
    """
    old, ranks = len(states), [state["rank"] for state in states]
    if ranks != list(range(old)) or any(state["world_size"] != old for state in states):
        raise InputError(
            f"the saved data position is of {short(states[0]['world_size'])} ranks and only together they say what is left; "
            f"got those of ranks {short(ranks)}"
        )
    frontier = max(state["next"] for state in states)
    left: list[int] = []
    for state in states:
        left += [position for positions in state["open"] for position in positions]  # drawn, but in no released pack
        left += state.get("backlog", [])  # of an earlier change of ranks
        left += range(state["next"], min(frontier, stop), old)  # not drawn yet, though other ranks are past it
    left.sort()
    # Rank r goes on at the first position from the frontier on that is r modulo the new number of ranks.
    return [(frontier + (rank - frontier) % world_size, left[rank::world_size]) for rank in range(world_size)]
