"""Paged key/value store: sequences own blocks of token slots, so memory is shared and nothing is ever moved."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from ivl.config import DecoderConfig
from ivl.cpu import kernels
from ivl.cpu.memory import small_pages
from ivl.model.blocks import BlockPool
from ivl.types import Layout


class CacheFull(RuntimeError):
    """No free block is left; the caller waits for a sequence to finish."""


@dataclass
class CachedSequence:
    """One sequence's blocks in a PagedCache and the number of tokens stored there."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class PagedCache:
    """Keys and values of every layer.

    keys, values: [num_layers, num_slots, K, H]; slot = block * block_size + offset. Pages of memory are only touched
    when written, so a generous number of blocks costs address space, not memory.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_tokens: int,
        block_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.block_size = block_size
        self.num_blocks = -(-num_tokens // block_size)
        shape = (config.num_layers, self.num_blocks * block_size, config.num_kv_heads, config.head_dim)
        self.keys, self.values = (small_pages(torch.empty(shape, dtype=dtype, device=device)) for _ in range(2))
        self.pool = BlockPool(self.num_blocks)

    def blocks_needed(self, sequence: CachedSequence, num_new: int) -> int:
        return -(-(sequence.length + num_new) // self.block_size) - len(sequence.blocks)

    def step(self, sequences: list[CachedSequence], new_lens: tuple[int, ...]) -> CacheStep:
        """Reserve room for new_lens tokens and return the store as one forward call sees it.

        Raises:
            CacheFull: if the free blocks do not suffice; nothing is reserved then.
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
        """Slots past the end of a sequence are read and masked, so they must hold numbers; all other new blocks are
        written whole before anything reads them."""
        slots = slice(block * self.block_size, (block + 1) * self.block_size)
        self.keys[:, slots] = 0
        self.values[:, slots] = 0

    def resume(self, sequence: CachedSequence, blocks: list[int]) -> None:
        """Begin an empty sequence with cached blocks, which it shares them."""
        assert not sequence.blocks
        self.pool.hold(blocks)
        sequence.blocks, sequence.length = list(blocks), len(blocks) * self.block_size

    def append_copy(self, sequence: CachedSequence, block: int, count: int) -> None:
        """Add the first count tokens of a block to a sequence of full blocks, as its own: others may go on writing there."""
        assert sequence.length == len(sequence.blocks) * self.block_size
        self.pool.hold([block])  # or it might be the one that is taken
        sequence.blocks += self.pool.take(1)
        self._clear(sequence.blocks[-1])
        source, target = block * self.block_size, sequence.blocks[-1] * self.block_size
        for slots in (self.keys, self.values):
            slots[:, target : target + count] = slots[:, source : source + count]
        sequence.length += count
        self.pool.release([block])

    def release(self, sequence: CachedSequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.length = [], 0


class CacheStep:
    """A PagedCache during one forward call. Blocks of sequence s, in order, are blocks[s]; its new tokens come last."""

    def __init__(self, store: PagedCache, layout: Layout, blocks: list[tuple[int, ...]]) -> None:
        self.store = store
        self.layout = layout
        self.blocks = blocks
        self._parts: dict[tuple[int, int], CacheStep] = {}

    def part(self, first: int, stop: int) -> CacheStep:
        """The same forward call as the sequences from first up to stop see it."""
        if (first, stop) == (0, len(self.blocks)):
            return self
        if (first, stop) not in self._parts:
            self._parts[first, stop] = CacheStep(self.store, self.layout.part(first, stop), self.blocks[first:stop])
        return self._parts[first, stop]

    def write(self, layer: int, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> None:
        self.store.keys[layer].index_copy_(0, self.new_slots_T, k_TKH)
        self.store.values[layer].index_copy_(0, self.new_slots_T, v_TKH)

    def decode(self, layer: int, qkv_SXH: torch.Tensor, cos_S1H: torch.Tensor, sin_S1H: torch.Tensor) -> torch.Tensor:
        """Rotary positions, writing and attention of one new token per sequence in one kernel; returns out_SNH."""
        store = self.store
        return kernels.decode_attention(
            qkv_SXH, cos_S1H, sin_S1H, store.keys[layer], store.values[layer], self.table_SB, self.past_S, store.block_size,
            self.longest,
        )  # fmt: skip

    def read(self, layer: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one sequence, [past + new, K, H] each; views where its blocks lie in a row."""
        blocks, length = self.blocks[seq], self.layout.total_lens[seq]
        keys, values = self.store.keys[layer], self.store.values[layer]
        if blocks == tuple(range(blocks[0], blocks[0] + len(blocks))):
            start = blocks[0] * self.store.block_size
            return keys[start : start + length], values[start : start + length]
        table = torch.tensor(blocks, device=keys.device)
        return self._gather(keys, table)[:length], self._gather(values, table)[:length]

    def read_all(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all sequences, [S, L, K, H] each, padded to whole blocks of the longest: see mask_SL."""
        keys, values = (self._gather(x[layer], self.table_SB.flatten()) for x in (self.store.keys, self.store.values))
        return keys.unflatten(0, (len(self.blocks), -1)), values.unflatten(0, (len(self.blocks), -1))

    @cached_property
    def new_slots_T(self) -> torch.Tensor:
        """Where the new tokens go."""
        spans = zip(self.blocks, self.layout.past_lens, self.layout.total_lens, strict=True)
        size = self.store.block_size
        slots = [b[at // size] * size + at % size for b, past, total in spans for at in range(past, total)]
        return torch.tensor(slots, device=self.store.keys.device)

    @cached_property
    def mask_SL(self) -> torch.Tensor:
        """Which positions of read_all hold a token."""
        lens_S1 = torch.tensor(self.layout.total_lens, device=self.store.keys.device).unsqueeze(1)
        longest = max(map(len, self.blocks)) * self.store.block_size
        return torch.arange(longest, device=lens_S1.device) < lens_S1

    @cached_property
    def table_SB(self) -> torch.Tensor:
        """Blocks of every sequence, each padded to the longest with its own last block."""
        longest = max(map(len, self.blocks))
        padded = [block for blocks in self.blocks for block in blocks + blocks[-1:] * (longest - len(blocks))]
        return torch.tensor(padded, device=self.store.keys.device).view(-1, longest)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence, or a bound of it."""
        return max(self.layout.total_lens)

    @cached_property
    def past_S(self) -> torch.Tensor:
        return torch.tensor(self.layout.past_lens, device=self.store.keys.device)

    def _gather(self, slots_XKH: torch.Tensor, blocks_B: torch.Tensor) -> torch.Tensor:
        whole_blocks = slots_XKH.unflatten(0, (-1, self.store.block_size))
        return whole_blocks.index_select(0, blocks_B).flatten(0, 1)
