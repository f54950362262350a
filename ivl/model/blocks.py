"""Which block of the key/value store belongs to whom, and which blocks a later prompt may find again by their content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """A block is free, used by one or more sequences, or kept: used by none, but known by a name for its content.

    Kept blocks are given up when no free ones are left, the one longest out of use first. What a name means is the
    caller's: a named block must go on holding what its name says, so only slots not yet covered may be written.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))
        self.kept: OrderedDict[int, None] = OrderedDict()
        """Oldest first."""
        self.users = [0] * num_blocks
        self.known: dict[bytes, int] = {}
        self.names: dict[int, list[bytes]] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `take` can hand out."""
        return len(self.free) + len(self.kept)

    def take(self, count: int) -> list[int]:
        """Blocks of unknown content, for one user; free ones first, then the oldest kept ones."""
        assert count <= self.num_available
        blocks = [self.free.pop() if self.free else self._give_up() for _ in range(count)]
        for block in blocks:
            self.users[block] = 1
        return blocks

    def _give_up(self) -> int:
        block, _ = self.kept.popitem(last=False)
        for name in self.names.pop(block):
            del self.known[name]
        return block

    def hold(self, blocks: Sequence[int]) -> None:
        """One user more for blocks that are used or kept."""
        for block in blocks:
            self.kept.pop(block, None)
            self.users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user less. Later blocks of a sequence are given up before earlier ones, without which they are never found."""
        for block in reversed(blocks):
            self.users[block] -= 1
            if self.users[block]:
                continue
            if block in self.names:
                self.kept[block] = None
            else:
                self.free.append(block)

    def name(self, block: int, name: bytes) -> None:
        """Make a block in use known. A name that another block has stays with that one."""
        if name not in self.known:
            self.known[name] = block
            self.names.setdefault(block, []).append(name)

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of a chain of names."""
        blocks: list[int] = []
        for name in names:
            if name not in self.known:
                break
            blocks.append(self.known[name])
        return blocks
