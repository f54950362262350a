"""One model on several cards of a machine, in one process: each card has some of the decoder's layers, in their order.

The first card has all the rest: ViT, projector, embeddings, final norm and head, so that it samples. The hidden state goes from
card to card and back to the first. One card computes at a time: this is for models that are too large for one, not for speed.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, islice
from typing import Any

import torch
from torch import nn

from ivl.checkpoint.model_dir import allocate
from ivl.errors import InputError
from ivl.inference.engine import CACHE_SHARE_OF_MEMORY, DEFAULT_CACHE_TOKENS, Engine, ProcessorLike
from ivl.model.cache import PAGE_ON_CARDS, CachedSequence, CacheStep, PagedCache
from ivl.model.decoder import Decoder
from ivl.model.devices import send
from ivl.model.vlm import VLM
from ivl.types import Layout


class SpreadCache(PagedCache):
    """A cache whose keys and values lie beside their layers; slots have the same numbers on every card."""

    stores: tuple[PagedCache, ...]
    """Keys and values by card; those of the first are this cache's own."""

    def _clear(self, block: int) -> None:
        super()._clear(block)
        for slots in self._elsewhere():
            slots[:, block * self.block_size : (block + 1) * self.block_size] = 0

    def append_copy(self, sequence: CachedSequence, block: int, count: int) -> None:
        """See `PagedCache.append_copy`."""
        super().append_copy(sequence, block, count)
        source, target = block * self.block_size, sequence.blocks[-1] * self.block_size
        for slots in self._elsewhere():
            slots[:, target : target + count] = slots[:, source : source + count]

    def _elsewhere(self) -> list[torch.Tensor]:
        """Return the keys and values of all cards but the first."""
        return [slots for store in self.stores[1:] for slots in (store.keys, store.values)]


class SpreadDecoder(Decoder):
    """A decoder whose layers lie on several cards. Its `config` counts the layers of the first, as the first cache does."""

    cards: tuple[tuple[torch.device, int], ...]
    """Each card, and the number of its layers."""

    def forward(self, x_TD: torch.Tensor, layout: Layout, cache: CacheStep | None = None) -> torch.Tensor:
        if layout.num_tokens != len(x_TD):
            raise ValueError(f"layout describes {layout.num_tokens} tokens but {len(x_TD)} were given")
        home, layers = x_TD.device, iter(self.layers)
        for place, (card, count) in enumerate(self.cards):
            x_TD, step = send(x_TD, card), None
            factors = self.rotary(x_TD, layout)
            if cache is not None:
                assert isinstance(cache.store, SpreadCache)
                step = CacheStep(cache.store.stores[place], layout, cache.blocks)
            for number, layer in enumerate(islice(layers, count)):
                x_TD = layer(x_TD, factors, layout, step, number)
        return self.norm(send(x_TD, home))


class SpreadEngine(Engine):
    """An engine for a model that `spread` has put on several cards."""

    def __init__(self, model: VLM, processor: ProcessorLike, *, max_cache_tokens: int | None = None, **options: Any) -> None:
        """Set up the engine, and the cache on every card. Arguments as `Engine`."""
        decoder = model.decoder
        assert isinstance(decoder, SpreadDecoder)
        config = decoder.config
        bytes_per_layer = 2 * config.num_kv_heads * config.head_dim * model.dtype.itemsize
        room = min(torch.cuda.mem_get_info(card)[0] // (bytes_per_layer * count) for card, count in decoder.cards)
        default = max(1, min(DEFAULT_CACHE_TOKENS, room // CACHE_SHARE_OF_MEMORY))
        tokens = default if max_cache_tokens is None else max_cache_tokens
        if isinstance(tokens, int) and tokens + PAGE_ON_CARDS > room:
            memory = f"the memory of the fullest card has room for {room} at most"
            raise InputError(f"max_cache_tokens is {tokens}, {memory}: lower it")
        super().__init__(model, processor, max_cache_tokens=tokens, **options)
        cache, sizes = self.cache, {"num_tokens": tokens, "block_size": self.cache.block_size}
        others = [
            PagedCache(replace(config, num_layers=count), dtype=model.dtype, device=card, **sizes)
            for card, count in decoder.cards[1:]
        ]
        cache.__class__ = SpreadCache
        assert isinstance(cache, SpreadCache)
        cache.stores = (cache, *others)


def spread(model: VLM, cards: Sequence[torch.device]) -> None:
    """Put the layers of an empty model on several cards, in place; the rest is to be put on the first.

    Raises:
        InputError: if there are more cards than layers.
    """
    decoder, layers = model.decoder, list(model.decoder.layers)
    if len(cards) > len(layers):
        raise InputError(f"device names {len(cards)} cards, but the decoder has {len(layers)} layers: name fewer")
    sizes = [_num_bytes(layer) for layer in layers]
    counts = shares(sizes, _num_bytes(model) - sum(sizes), [torch.cuda.mem_get_info(card)[0] for card in cards])
    rest = iter(layers)
    for card, count in zip(cards, counts, strict=True):
        for layer in islice(rest, count):
            allocate(layer, card)
    decoder.__class__, decoder.config = SpreadDecoder, replace(decoder.config, num_layers=counts[0])
    assert isinstance(decoder, SpreadDecoder)
    decoder.cards = tuple(zip(cards, counts, strict=True))


def shares(sizes: Sequence[int], first: int, room: Sequence[int]) -> list[int]:
    """Return how many layers each card gets, one at least, so that every card is filled to about the same part of its room.

    Args:
        sizes: bytes of each layer.
        first: bytes that lie on the first card beside its layers.
        room: free bytes of each card.
    """
    counts, place, before, ends = [0] * len(room), -1, first, list(accumulate(room))
    for number, size in enumerate(sizes):
        by_bytes = bisect(ends, (before + size / 2) / (first + sum(sizes)) * ends[-1])
        needed = len(room) - (len(sizes) - number)  # else too few layers would be left for the cards behind
        place = min(max(by_bytes, needed), place + 1)
        counts[place] += 1
        before += size
    return counts


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
