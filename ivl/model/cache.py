"""The paged key/value cache: sequences own blocks of token slots, so memory is shared and nothing ever moves. B blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

import torch

from ivl.config import DecoderConfig
from ivl.model.devices import send
from ivl.types import Layout

PAGE_ON_CARDS = 256
"""Flash attention reads pages of a whole multiple of this many tokens."""


class CacheFull(RuntimeError):
    """Raised when no free block is left; the caller waits for a sequence to finish."""


class BlockPool:
    """Hands out blocks. A block is free, in use by one or more sequences, or evictable: unused, but still cached.

    A cached block is registered under prefix hashes. When no block is free, the evictable block that has been unused for
    longest loses its hashes and is handed out. Slots that a registered hash covers must not be written again.
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
        """The prefix hashes of each cached block: that of the full block, and those of prompts that end within it."""

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
        return [self.cached[prefix_hash] for prefix_hash in takewhile(self.cached.__contains__, hashes)]


@dataclass
class CachedSequence:
    """The blocks of one sequence in a PagedCache and the number of its cached tokens."""

    blocks: list[int] = field(default_factory=list[int])
    length: int = 0


class PagedCache:
    """Stores the keys and values of every layer.

    keys, values: [num_layers, num_slots, K, H]; slot = block * block_size + offset. Pages of memory are only touched
    when written, so a generous number of blocks costs address space, not memory.
    """

    def __init__(
        self, config: DecoderConfig, *, num_tokens: int, block_size: int = 64,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.block_size = block_size
        self.num_blocks = -(-num_tokens // block_size)
        shape = (config.num_layers, self.num_blocks * block_size, config.num_kv_heads, config.head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.pool = BlockPool(self.num_blocks)

    def blocks_needed(self, sequence: CachedSequence, num_new: int) -> int:
        """Return how many more blocks a sequence needs for its next tokens."""
        return -(-(sequence.length + num_new) // self.block_size) - len(sequence.blocks)

    def step(self, sequences: list[CachedSequence], new_lens: tuple[int, ...]) -> CacheStep:
        """Reserve slots for the new tokens and return the cache as one forward call sees it.

        Raises:
            CacheFull: if too few blocks are free; nothing is reserved then.
        """
        needed = [max(0, self.blocks_needed(s, n)) for s, n in zip(sequences, new_lens, strict=True)]
        if sum(needed) > self.pool.num_available:
            raise CacheFull(
                f"{sum(needed)} blocks of {self.block_size} tokens needed, {self.pool.num_available} of {self.num_blocks} free"
            )
        for sequence, count in zip(sequences, needed, strict=True):
            if count:
                sequence.blocks += self.pool.take(count)
                self._clear(sequence.blocks[-1])
        layout = Layout(tuple(new_lens), tuple(s.length for s in sequences))
        for sequence, n in zip(sequences, new_lens, strict=True):
            sequence.length += n
        return CacheStep(self, layout, [tuple(s.blocks) for s in sequences])

    def _clear(self, block: int) -> None:
        """Zero a block: the unused slots of a sequence's last block are read and masked, so they must hold finite numbers."""
        slots = slice(block * self.block_size, (block + 1) * self.block_size)
        self.keys[:, slots] = 0
        self.values[:, slots] = 0

    def resume(self, sequence: CachedSequence, blocks: list[int]) -> None:
        """Begin an empty sequence with cached blocks, which it shares with other sequences."""
        assert not sequence.blocks
        self.pool.hold(blocks)
        sequence.blocks, sequence.length = list(blocks), len(blocks) * self.block_size

    def append_copy(self, sequence: CachedSequence, block: int, count: int) -> None:
        """Append a copy of the first tokens of a block to a sequence of full blocks; the block's owner may keep writing."""
        assert sequence.length == len(sequence.blocks) * self.block_size
        self.pool.hold([block])  # otherwise take() could evict it
        sequence.blocks += self.pool.take(1)
        self._clear(sequence.blocks[-1])
        source, target = block * self.block_size, sequence.blocks[-1] * self.block_size
        for slots in (self.keys, self.values):
            slots[:, target : target + count] = slots[:, source : source + count]
        sequence.length += count
        self.pool.release([block])

    def release(self, sequence: CachedSequence) -> None:
        """Give back the blocks of a sequence and empty it."""
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.length = [], 0


class CacheStep:
    """A PagedCache during one forward call.

    blocks[s] are the blocks of sequence s in order. The new tokens of a sequence come after its cached ones.
    """

    def __init__(self, store: PagedCache, layout: Layout, blocks: list[tuple[int, ...]]) -> None:
        self.store = store
        self.layout = layout
        self.blocks = blocks
        self._parts: dict[tuple[int, int], CacheStep] = {}

    def part(self, first: int, stop: int) -> CacheStep:
        """Return the forward call as the sequences from first up to stop see it."""
        if (first, stop) == (0, len(self.blocks)):
            return self
        if (first, stop) not in self._parts:
            self._parts[first, stop] = CacheStep(self.store, self.layout.part(first, stop), self.blocks[first:stop])
        return self._parts[first, stop]

    def write(self, layer: int, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> None:
        """Store the keys and values of the new tokens."""
        self.store.keys[layer].index_copy_(0, self.new_slots_T, k_TKH)
        self.store.values[layer].index_copy_(0, self.new_slots_T, v_TKH)

    def read(self, layer: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of one sequence, [past + new, K, H] each; views if its blocks are consecutive."""
        blocks, length = self.blocks[seq], self.layout.total_lens[seq]
        keys, values = self.store.keys[layer], self.store.values[layer]
        if blocks == tuple(range(blocks[0], blocks[0] + len(blocks))):
            start = blocks[0] * self.store.block_size
            return keys[start : start + length], values[start : start + length]
        table = send(torch.tensor(blocks), keys.device)
        return self._gather(keys, table)[:length], self._gather(values, table)[:length]

    def read_all(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all sequences, [S, L, K, H] each, padded to the blocks of the longest; see mask_SL."""
        return self._gather(self.store.keys[layer], self.table_SB), self._gather(self.store.values[layer], self.table_SB)

    @cached_property
    def new_slots_T(self) -> torch.Tensor:
        """The slots of the new tokens."""
        spans = zip(self.blocks, self.layout.past_lens, self.layout.total_lens, strict=True)
        size = self.store.block_size
        slots = [b[at // size] * size + at % size for b, past, total in spans for at in range(past, total)]
        return send(torch.tensor(slots), self.store.keys.device)

    @cached_property
    def mask_SL(self) -> torch.Tensor:
        """True where a position of read_all holds a token."""
        lens_S1 = send(torch.tensor(self.layout.total_lens), self.store.keys.device).unsqueeze(1)
        return torch.arange(self.table_SB.shape[1] * self.store.block_size, device=lens_S1.device) < lens_S1

    @cached_property
    def table_SB(self) -> torch.Tensor:
        """The blocks of every sequence, padded to the longest with the sequence's own last block."""
        return send(torch.tensor(self._padded_blocks()), self.store.keys.device).view(len(self.blocks), -1)

    @cached_property
    def addresses(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What flash attention asks, int32, in one copy: where sequences begin on the token axis and the last one ends,
        [S + 1]; their total lengths, [S]; and table_SB."""
        starts, num_seqs, blocks = (*self.layout.starts, self.layout.num_tokens), len(self.blocks), self._padded_blocks()
        numbers = torch.tensor([*starts, *self.layout.total_lens, *blocks], dtype=torch.int32)
        bounds, lens_S, table = send(numbers, self.store.keys.device).split((num_seqs + 1, num_seqs, len(blocks)))
        return bounds, lens_S, table.view(num_seqs, -1)

    def _padded_blocks(self) -> list[int]:
        """The blocks of every sequence, padded to the longest with the sequence's own last block."""
        longest = max(map(len, self.blocks))
        return [block for blocks in self.blocks for block in blocks + blocks[-1:] * (longest - len(blocks))]

    def _gather(self, slots_XKH: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        shape = slots_XKH.shape[1:]
        blocks = slots_XKH.view(-1, self.store.block_size, *shape).index_select(0, table.flatten())
        return blocks.view(*table.shape[:-1], -1, *shape)
