"""Samples -> packs within a token and a tile budget: select, search, pack, maintain (arXiv:2412.05271, section 4).

Select: a sample that fits an empty pack; the caller decides about others. Search: the fullest open pack with room for the
sample. Pack: put it there, or into a new pack. Maintain: release a full pack at once, and the fullest one when more than
`max_buffer` are open. A pack is as full as its fuller budget, since that budget decides when nothing fits any more.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from ivl.types import Batch, Layout, Pack


class Sized(Protocol):
    """What the packer needs to know of a sample."""

    @property
    def num_tokens(self) -> int: ...  # noqa: D102

    @property
    def num_tiles(self) -> int: ...  # noqa: D102


Item = TypeVar("Item", bound=Sized)


@dataclass
class OpenPack(Generic[Item]):
    """A pack that may still grow. `positions` are the places of its samples in the stream."""

    num_tokens: int = 0
    num_tiles: int = 0
    items: list[Item] = field(default_factory=list[Item])
    positions: list[int] = field(default_factory=list[int])

    @property
    def size(self) -> tuple[int, int]:
        """Tokens and tiles."""
        return self.num_tokens, self.num_tiles

    def put(self, position: int, item: Item) -> None:
        """Add a sample."""
        self.num_tokens += item.num_tokens
        self.num_tiles += item.num_tiles
        self.items.append(item)
        self.positions.append(position)


class Packer(Generic[Item]):
    """Best fit over at most `max_buffer` open packs.

    Its packs follow from the order and the sizes of the samples alone, and its whole state is `positions()`. Search and
    release take time logarithmic in the budgets, however many packs are open.
    """

    def __init__(self, *, max_tokens: int, max_tiles: int, max_buffer: int, max_samples: int | None = None) -> None:
        self.max_tokens, self.max_tiles, self.max_buffer, self.max_samples = max_tokens, max_tiles, max_buffer, max_samples
        self._shelves: tuple[_Shelf[Item], _Shelf[Item]] = _Shelf(0, max_tokens), _Shelf(1, max_tiles)
        """Open packs; each lies on the shelf of the budget that it has used more of."""

    def __len__(self) -> int:
        """Open packs."""
        return sum(len(shelf) for shelf in self._shelves)

    def add(self, position: int, item: Item) -> OpenPack[Item] | None:
        """Place one sample; returns the pack that this released, if any.

        Raises:
            ValueError: if the sample is larger than a whole pack.
        """
        if item.num_tokens > self.max_tokens or item.num_tiles > self.max_tiles:
            size = f"{item.num_tokens} tokens and {item.num_tiles} tiles"
            raise ValueError(f"a sample of {size} exceeds a pack of {self.max_tokens} and {self.max_tiles}")
        pack = self._take((self.max_tokens - item.num_tokens, self.max_tiles - item.num_tiles)) or OpenPack()
        pack.put(position, item)
        if self._fullness(pack) >= 1 or len(pack.items) == self.max_samples:
            return pack
        self._shelf(pack).put(pack)
        return self.flush() if len(self) > self.max_buffer else None

    def flush(self) -> OpenPack[Item] | None:
        """Release the fullest open pack; None when nothing is open."""
        return self._take((self.max_tokens, self.max_tiles))

    def positions(self) -> list[list[int]]:
        """The positions of the samples of each open pack, in the order in which `reopen` needs them."""
        return [list(pack.positions) for shelf in self._shelves for pack in shelf]

    def reopen(self, positions: list[int], items: list[Item]) -> None:
        """Put back an open pack of `positions()`; call this in their order."""
        pack: OpenPack[Item] = OpenPack()
        for position, item in zip(positions, items, strict=True):
            pack.put(position, item)
        self._shelf(pack).put(pack)

    def _take(self, most: tuple[int, int]) -> OpenPack[Item] | None:
        """Close and return the fullest open pack of at most these tokens and tiles."""
        found = [pack for shelf in self._shelves if (pack := shelf.find(most))]
        if not found:
            return None
        fullest = max(found, key=self._fullness)
        self._shelf(fullest).remove(fullest)
        return fullest

    def _shelf(self, pack: OpenPack[Item]) -> _Shelf[Item]:
        return self._shelves[pack.num_tiles * self.max_tokens > pack.num_tokens * self.max_tiles]

    def _fullness(self, pack: OpenPack[Item]) -> float:
        return max(pack.num_tokens / self.max_tokens, pack.num_tiles / self.max_tiles)


class _Shelf(Generic[Item]):
    """Open packs by their size along one axis, tokens or tiles, for a search that respects both budgets.

    The question is: of the packs of at most `a` along this axis and at most `b` along the other one, which is the largest
    along this axis? A sorted list answers the first half, a scan the second; a tree answers both in logarithmic time.

    The tree is a complete binary tree in an array, as a heap has it: node n has the children 2n and 2n + 1, and the leaves come
    last. Leaf k stands for size k along this axis and holds the packs of exactly that size, sorted by the other axis. Every
    node stores the least size along the other axis among all packs below it, or infinity if there are none.
    """

    def __init__(self, axis: int, budget: int) -> None:
        self._axis = axis
        self._num_leaves = 1 << budget.bit_length()
        self._least: list[float] = [float("inf")] * (2 * self._num_leaves)
        self._packs: dict[int, list[OpenPack[Item]]] = {}
        """Packs of each leaf that has some."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[OpenPack[Item]]:
        for size in sorted(self._packs):
            yield from self._packs[size]

    def put(self, pack: OpenPack[Item]) -> None:
        # After its equals, so that packs put back in the order of iteration lie as they lay.
        insort(self._packs.setdefault(pack.size[self._axis], []), pack, key=self._other)
        self._count += 1
        self._update(pack.size[self._axis])

    def remove(self, pack: OpenPack[Item]) -> None:
        packs = self._packs[pack.size[self._axis]]
        del packs[next(i for i, other in enumerate(packs) if other is pack)]
        self._count -= 1
        self._update(pack.size[self._axis])

    def find(self, most: tuple[int, int]) -> OpenPack[Item] | None:
        """The largest pack along this axis that exceeds neither size; of equals, the largest along the other."""
        least, limit = self._least, most[1 - self._axis]
        # Start at the leaf of the largest size allowed. While nothing below the node is small enough along the other axis, go
        # on to the subtree that ends just before it: climb while the node is a left child (everything below the parent lies to
        # the right or was searched), then step to the left sibling. Subtrees grow on the way, so this takes one climb at most.
        node = self._num_leaves + most[self._axis]
        while least[node] > limit:
            while not node & 1:
                node >>= 1
            if node == 1:  # the root: no subtree is left
                return None
            node -= 1
        # Some pack below the node will do. Descend, to the right wherever a pack there will do, to the largest size.
        while node < self._num_leaves:
            node = 2 * node + (least[2 * node + 1] <= limit)
        packs = self._packs[node - self._num_leaves]
        return packs[bisect_right(packs, limit, key=self._other) - 1]

    def _other(self, pack: OpenPack[Item]) -> int:
        return pack.size[1 - self._axis]

    def _update(self, size: int) -> None:
        """Set the least values from the leaf of this size up, as far as they change."""
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


def collate(pack: Pack) -> Batch:
    """Concatenate the samples of a pack on one token axis. Placeholder runs keep showing their own tiles.

    Raises:
        ValueError: if the pack is empty, or a sample's sequence lengths do not cover its tokens.
    """
    if not pack:
        raise ValueError("an empty pack makes no batch")
    seq_lens: list[int] = []
    tile_ids: list[torch.Tensor] = []
    num_tiles = 0
    for sample in pack:
        if sum(sample.seq_lens) != sample.num_tokens:
            raise ValueError(f"{sample.source}: sequences of {sample.seq_lens} tokens but {sample.num_tokens} tokens in all")
        seq_lens.extend(sample.seq_lens)
        tile_ids.append(sample.tile_ids_R + num_tiles)
        num_tiles += sample.num_tiles
    # A sample of text has no tiles, and need not know how large they are.
    tiles = [sample.tiles_GSSC for sample in pack if sample.num_tiles] or [pack[0].tiles_GSSC]
    return Batch(
        tokens_T=torch.cat([sample.tokens_T for sample in pack]),
        labels_T=torch.cat([sample.labels_T for sample in pack]),
        weights_T=torch.cat([sample.weights_T for sample in pack]),
        tiles_GSSC=torch.cat(tiles),
        tile_ids_R=torch.cat(tile_ids),
        layout=Layout.packed(tuple(seq_lens)),
        ids=tuple(sample.id for sample in pack),
        sources=tuple(sample.source for sample in pack),
        datasets=tuple(sample.dataset for sample in pack),
        sample_lens=tuple(sample.num_tokens for sample in pack),
    )
