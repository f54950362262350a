"""Paged key/value store: sequences own blocks of token slots, so memory is shared and nothing is ever moved."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ivl.config import DecoderConfig
from ivl.types import Layout


class CacheFull(RuntimeError):
    """No free block is left; the caller waits for a sequence to finish."""


@dataclass
class Sequence:
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
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.free = list(range(self.num_blocks - 1, -1, -1))

    def blocks_needed(self, sequence: Sequence, num_new: int) -> int:
        return -(-(sequence.length + num_new) // self.block_size) - len(sequence.blocks)

    def step(self, sequences: list[Sequence], new_lens: tuple[int, ...]) -> CacheStep:
        """Reserve room for new_lens tokens and return the store as one forward call sees it.

        Raises:
            CacheFull: if the free blocks do not suffice; nothing is reserved then.
        """
        needed = [max(0, self.blocks_needed(s, n)) for s, n in zip(sequences, new_lens, strict=True)]
        if sum(needed) > len(self.free):
            raise CacheFull(
                f"{sum(needed)} blocks of {self.block_size} tokens needed, {len(self.free)} of {self.num_blocks} free"
            )
        for sequence, count in zip(sequences, needed, strict=True):
            sequence.blocks += [self.free.pop() for _ in range(count)]
        layout = Layout(tuple(new_lens), tuple(s.length for s in sequences))
        for sequence, n in zip(sequences, new_lens, strict=True):
            sequence.length += n
        return CacheStep(self, layout, [self._slots(s) for s in sequences])

    def _slots(self, sequence: Sequence) -> torch.Tensor:
        starts = torch.tensor(sequence.blocks).unsqueeze(1) * self.block_size
        slots = (starts + torch.arange(self.block_size)).flatten()[: sequence.length]
        return slots.to(self.keys.device)

    def release(self, sequence: Sequence) -> None:
        self.free += sequence.blocks
        sequence.blocks, sequence.length = [], 0


class CacheStep:
    """A PagedCache during one forward call: slots_by_seq[s] are the slots of all tokens of sequence s, new ones last."""

    def __init__(self, store: PagedCache, layout: Layout, slots_by_seq: list[torch.Tensor]) -> None:
        self.store = store
        self.layout = layout
        self.slots_by_seq = slots_by_seq
        self.new_slots_T = torch.cat([slots[past:] for slots, past in zip(slots_by_seq, layout.past_lens, strict=True)])

    def write(self, layer: int, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> None:
        self.store.keys[layer].index_copy_(0, self.new_slots_T, k_TKH)
        self.store.values[layer].index_copy_(0, self.new_slots_T, v_TKH)

    def read(self, layer: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one sequence, [past + new, K, H] each."""
        slots = self.slots_by_seq[seq]
        return self.store.keys[layer].index_select(0, slots), self.store.values[layer].index_select(0, slots)
