"""Samples -> packs within a token and a tile budget: select, search, pack, maintain (paper; spec 9.2).

Select: a sample that fits an empty pack; what becomes of others is the caller's policy. Search: the fullest open pack with
room for it. Pack: into that one, else into a new one. Maintain: a full pack leaves at once, and the fullest when more are
open than may be. Full means by the budget nearer its end, for that one decides when a pack can take no more.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

TOKENS, TILES = 0, 1


class Sized(Protocol):
    @property
    def num_tokens(self) -> int: ...

    @property
    def num_tiles(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


@dataclass
class Buffer(Generic[Item]):
    """A pack that may still grow. `positions` says where in the stream its samples came from."""

    size: tuple[int, int] = (0, 0)
    """Tokens and tiles."""
    items: list[Item] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.size[TOKENS]

    @property
    def num_tiles(self) -> int:
        return self.size[TILES]

    def put(self, position: int, item: Item) -> None:
        self.size = self.num_tokens + item.num_tokens, self.num_tiles + item.num_tiles
        self.items.append(item)
        self.positions.append(position)


class Packer(Generic[Item]):
    """Best fit over at most `max_buffer` open packs.

    What it does depends on the order and the sizes of the samples alone, and its whole state is `positions()`. Search and
    release take time logarithmic in the budgets, however many packs are open.
    """

    def __init__(self, *, max_tokens: int, max_tiles: int, max_buffer: int, max_samples: int | None = None) -> None:
        self.max_tokens, self.max_tiles, self.max_buffer, self.max_samples = max_tokens, max_tiles, max_buffer, max_samples
        self._shelves: tuple[Shelf[Item], Shelf[Item]] = Shelf(TOKENS, max_tokens), Shelf(TILES, max_tiles)
        """Open packs, each by the budget that it has used more of."""

    def __len__(self) -> int:
        """Open packs."""
        return sum(len(shelf) for shelf in self._shelves)

    def fits(self, item: Item) -> bool:
        """Whether the sample fits an empty pack."""
        return item.num_tokens <= self.max_tokens and item.num_tiles <= self.max_tiles

    def add(self, position: int, item: Item) -> Buffer[Item] | None:
        """Place one sample; returns the pack that this released, if any.

        Raises:
            ValueError: if the sample is larger than a whole pack; what to do with it is the caller's policy.
        """
        if not self.fits(item):
            size = f"{item.num_tokens} tokens and {item.num_tiles} tiles"
            raise ValueError(f"a sample of {size} exceeds a pack of {self.max_tokens} and {self.max_tiles}")
        buffer = self._take((self.max_tokens - item.num_tokens, self.max_tiles - item.num_tiles)) or Buffer()
        buffer.put(position, item)
        if self._fullness(buffer) >= 1 or len(buffer.items) == self.max_samples:
            return buffer
        self._shelf(buffer).put(buffer)
        return self.flush() if len(self) > self.max_buffer else None

    def flush(self) -> Buffer[Item] | None:
        """Release the fullest open pack; None when nothing is open."""
        return self._take((self.max_tokens, self.max_tiles))

    def positions(self) -> list[list[int]]:
        return [list(buffer.positions) for shelf in self._shelves for buffer in shelf]

    def reopen(self, positions: list[int], items: list[Item]) -> None:
        """Put back an open pack of `positions()`; call in their order."""
        buffer: Buffer[Item] = Buffer()
        for position, item in zip(positions, items, strict=True):
            buffer.put(position, item)
        self._shelf(buffer).put(buffer)

    def _take(self, most: tuple[int, int]) -> Buffer[Item] | None:
        """The fullest open pack of no more than these tokens and tiles, which is then no longer open."""
        found = [buffer for shelf in self._shelves if (buffer := shelf.find(most))]
        if not found:
            return None
        fullest = max(found, key=self._fullness)
        self._shelf(fullest).remove(fullest)
        return fullest

    def _shelf(self, buffer: Buffer[Item]) -> Shelf[Item]:
        return self._shelves[buffer.num_tiles * self.max_tokens > buffer.num_tokens * self.max_tiles]

    def _fullness(self, buffer: Buffer[Item]) -> float:
        return max(buffer.num_tokens / self.max_tokens, buffer.num_tiles / self.max_tiles)


class Shelf(Generic[Item]):
    """Packs by their size along one axis, tokens or tiles.

    A binary tree over all sizes from 0 to the budget: a leaf holds the packs of its size, and every node knows the least
    size along the other axis of the packs below it.
    """

    def __init__(self, axis: int, budget: int) -> None:
        self._axis, self._other = axis, lambda buffer: buffer.size[1 - axis]
        self._num_leaves = 1 << budget.bit_length()
        self._least: list[float] = [float("inf")] * (2 * self._num_leaves)
        """Node n has the children 2n and 2n + 1; the leaves come last."""
        self._packs: dict[int, list[Buffer[Item]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self):
        for size in sorted(self._packs):
            yield from self._packs[size]

    def put(self, buffer: Buffer[Item]) -> None:
        # After its equals, so that packs put back in the order of iteration lie as they lay.
        insort(self._packs.setdefault(buffer.size[self._axis], []), buffer, key=self._other)
        self._count += 1
        self._update(buffer.size[self._axis])

    def remove(self, buffer: Buffer[Item]) -> None:
        packs = self._packs[buffer.size[self._axis]]
        del packs[next(i for i, each in enumerate(packs) if each is buffer)]
        self._count -= 1
        self._update(buffer.size[self._axis])

    def find(self, most: tuple[int, int]) -> Buffer[Item] | None:
        """The largest pack along this axis that exceeds neither size; of equals, the largest along the other."""
        least, limit = self._least, most[1 - self._axis]
        node = self._num_leaves + most[self._axis]
        while least[node] > limit:  # to the next subtree on the left
            while not node & 1:
                node >>= 1
            if node == 1:
                return None
            node -= 1
        while node < self._num_leaves:  # down to its rightmost leaf that will do
            node = 2 * node + (least[2 * node + 1] <= limit)
        packs = self._packs[node - self._num_leaves]
        return packs[bisect_right(packs, limit, key=self._other) - 1]

    def _update(self, size: int) -> None:
        packs = self._packs[size]
        value = self._other(packs[0]) if packs else float("inf")
        if not packs:
            del self._packs[size]
        least, node = self._least, self._num_leaves + size
        least[node] = value
        while node > 1:
            node >>= 1
            value = min(least[2 * node], least[2 * node + 1])
            if least[node] == value:
                return
            least[node] = value
