"""Samples -> packs within a token and a tile budget: select, search, pack, maintain (paper; spec 9.2)."""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def num_tokens(self) -> int: ...

    @property
    def num_tiles(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


@dataclass
class Buffer(Generic[Item]):
    """A pack that may still grow. `positions` says where in the stream its samples came from."""

    num_tokens: int = 0
    num_tiles: int = 0
    items: list[Item] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def put(self, position: int, item: Item) -> None:
        self.num_tokens += item.num_tokens
        self.num_tiles += item.num_tiles
        self.items.append(item)
        self.positions.append(position)


class Packer(Generic[Item]):
    """Best fit over at most `max_buffer` open packs, kept sorted by tokens.

    What it does depends on the order and the sizes of the samples alone, and its whole state is `positions()`.
    """

    def __init__(self, *, max_tokens: int, max_tiles: int, max_buffer: int, max_samples: int | None = None) -> None:
        self.max_tokens, self.max_tiles, self.max_buffer, self.max_samples = max_tokens, max_tiles, max_buffer, max_samples
        self.buffers: list[Buffer[Item]] = []

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
        buffer = self._take(item)
        buffer.put(position, item)
        if self._fullness(buffer) >= 1:
            return buffer
        insort(self.buffers, buffer, key=_num_tokens)
        return self.flush() if len(self.buffers) > self.max_buffer else None

    def flush(self) -> Buffer[Item] | None:
        """Release the fullest open pack; None when nothing is open."""
        if not self.buffers:
            return None
        return self.buffers.pop(max(range(len(self.buffers)), key=lambda i: self._fullness(self.buffers[i])))

    def positions(self) -> list[list[int]]:
        return [list(buffer.positions) for buffer in self.buffers]

    def reopen(self, positions: list[int], items: list[Item]) -> None:
        """Put back an open pack of `positions()`; call in their order."""
        buffer: Buffer[Item] = Buffer()
        for position, item in zip(positions, items, strict=True):
            buffer.put(position, item)
        self.buffers.append(buffer)

    def _take(self, item: Item) -> Buffer[Item]:
        """The fullest open pack with room for the sample, taken off the list; else a new one."""
        end = bisect_right(self.buffers, self.max_tokens - item.num_tokens, key=_num_tokens)
        for i in range(end - 1, -1, -1):
            if self.buffers[i].num_tiles + item.num_tiles <= self.max_tiles:
                return self.buffers.pop(i)
        return Buffer()

    def _fullness(self, buffer: Buffer[Item]) -> float:
        samples = len(buffer.items) / self.max_samples if self.max_samples else 0.0
        return max(buffer.num_tokens / self.max_tokens, buffer.num_tiles / self.max_tiles, samples)


def _num_tokens(buffer: Buffer) -> int:
    return buffer.num_tokens
