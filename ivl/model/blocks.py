"""Blocks of the key/value store: who uses each, and which can be found again by a prefix hash."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Hands out blocks. A block is free, in use by one or more sequences, or evictable: unused, but still cached.

    A cached block is registered under one or more prefix hashes. When no block is free, the evictable block that has been
    unused for longest loses its hashes and is handed out. The caller decides what a hash covers. Slots that a registered
    hash covers must not be written again.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))
        self.evictable: OrderedDict[int, None] = OrderedDict()
        """Oldest first."""
        self.users = [0] * num_blocks
        """Number of sequences that use each block."""
        self.cached: dict[bytes, int] = {}
        """The block of each prefix hash."""
        self.hashes: dict[int, list[bytes]] = {}
        """The prefix hashes of each cached block."""

    @property
    def num_available(self) -> int:
        """Blocks that `take` can hand out."""
        return len(self.free) + len(self.evictable)

    def take(self, count: int) -> list[int]:
        """Return blocks of unknown content for one user: free blocks first, then the oldest evictable ones."""
        assert count <= self.num_available
        blocks = [self.free.pop() if self.free else self._evict() for _ in range(count)]
        for block in blocks:
            self.users[block] = 1
        return blocks

    def _evict(self) -> int:
        block, _ = self.evictable.popitem(last=False)
        for prefix_hash in self.hashes.pop(block):
            del self.cached[prefix_hash]
        return block

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a user to blocks that are in use or evictable."""
        for block in blocks:
            self.evictable.pop(block, None)
            self.users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a user from the blocks of a sequence.

        Later blocks become evictable before earlier ones, since a block is found only through those before it.
        """
        for block in reversed(blocks):
            self.users[block] -= 1
            if self.users[block]:
                continue
            if block in self.hashes:
                self.evictable[block] = None
            else:
                self.free.append(block)

    def register(self, block: int, prefix_hash: bytes) -> None:
        """Make a block in use findable by a prefix hash. A hash that another block has stays with that block."""
        if prefix_hash not in self.cached:
            self.cached[prefix_hash] = block
            self.hashes.setdefault(block, []).append(prefix_hash)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the cached blocks of the longest prefix of a chain of hashes."""
        blocks: list[int] = []
        for prefix_hash in hashes:
            if prefix_hash not in self.cached:
                break
            blocks.append(self.cached[prefix_hash])
        return blocks
