"""attend(): causal attention over the flat token axis, by a backend.

BACKENDS is the only place in the model that looks at device and dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from ivl.model.cache import CacheStep
from ivl.model.devices import send
from ivl.types import Layout

MAX_PADDING_SHARE = 4
"""Sequences are padded to the longest of their group, by up to one part in this many of its length ..."""
MAX_PADDING_TOKENS = 16
"""... or by up to this many tokens, if that is more."""
MAX_GATHER = 2
"""Decoding sequences are padded into one rectangle if it has at most this many times their own tokens."""
SpanKind = Literal["fresh", "decoding", "continued"]


class Sdpa:
    """The attention backend for every device and dtype: torch's scaled_dot_product_attention.

    Groups of query heads share key/value heads in every method. Other backends override the methods that they speed up.
    """

    def rectangle(
        self, q_SNLH: torch.Tensor, k_SKLH: torch.Tensor, v_SKLH: torch.Tensor, mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Attend within sequences of one length. Returns out_SNLH."""
        return scaled_dot_product_attention(q_SNLH, k_SKLH, v_SKLH, mask, is_causal=causal, enable_gqa=True)

    def packed(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Attend causally within whole sequences that lie one after another. Returns out_TNH."""
        lens = layout.new_lens
        if min(lens) == max(lens):  # already a rectangle: no gathering
            shape = (len(lens), lens[0])
            q, k, v = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
            return self.rectangle(q, k, v, causal=lens[0] > 1).transpose(1, 2).reshape(q_TNH.shape)
        out_parts: list[torch.Tensor] = []
        index_parts: list[torch.Tensor] = []
        for group in _groups(layout, q_TNH.device):
            q, k, v = (x[group.index_SL].transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
            out_SLNH = self.rectangle(q, k, v, causal=True).transpose(1, 2)
            out_parts.append(out_SLNH.flatten(0, 1) if group.real is None else out_SLNH[group.real])
            index_parts.append(group.index_SL.flatten() if group.real is None else group.index_SL[group.real])
        return torch.empty_like(q_TNH).index_copy(0, torch.cat(index_parts), torch.cat(out_parts))

    def decoding(
        self, q_SNH: torch.Tensor, k_SLKH: torch.Tensor, v_SLKH: torch.Tensor, mask_SL: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend from one new token per sequence. Returns out_SNH.

        The query heads that share a key head become its rows, so keys are read once for all of them.
        """
        num_seqs, _, head_dim = q_SNH.shape
        q, k, v = q_SNH.view(num_seqs, k_SLKH.shape[2], -1, head_dim), k_SLKH.transpose(1, 2), v_SLKH.transpose(1, 2)
        mask = None if mask_SL is None else mask_SL[:, None, None, :]
        return self.rectangle(q, k, v, mask).flatten(1, 2)

    def continued(self, q_TNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor) -> torch.Tensor:
        """Attend causally from the last T tokens of one sequence to all of its L tokens. Returns out_TNH."""
        new, total = len(q_TNH), len(k_LKH)
        if new == 1:
            return self.decoding(q_TNH, k_LKH.unsqueeze(0), v_LKH.unsqueeze(0), None)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_LKH, v_LKH))
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        return self.rectangle(q, k, v, mask).squeeze(0).transpose(0, 1)

    def tiles(self, q_GPNH: torch.Tensor, k_GPNH: torch.Tensor, v_GPNH: torch.Tensor) -> torch.Tensor:
        """Attend from every patch of a tile to all patches of the tile. Returns out_GPNH."""
        q, k, v = (x.transpose(1, 2) for x in (q_GPNH, k_GPNH, v_GPNH))
        return self.rectangle(q, k, v).transpose(1, 2)

    def cached(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, cache: CacheStep, layer: int
    ) -> torch.Tensor:
        """Attend as `attend` where a cache holds the keys and values, each kind of sequence in its own way."""
        layout, spans = cache.layout, _spans(cache.layout)
        if len(spans) == 1 and spans[0][0] == "fresh":
            return self.packed(q_TNH, k_TKH, v_TKH, layout)
        out_TNH = torch.empty_like(q_TNH)
        for kind, first, stop in spans:
            part, start = cache.part(first, stop), layout.starts[first]
            tokens = slice(start, start + part.layout.num_tokens)
            lens = part.layout.total_lens
            if kind == "fresh":
                out_TNH[tokens] = self.packed(q_TNH[tokens], k_TKH[tokens], v_TKH[tokens], part.layout)
            elif kind == "decoding" and len(lens) > 1 and max(lens) * len(lens) <= MAX_GATHER * sum(lens):
                out_TNH[tokens] = self.decoding(q_TNH[tokens], *part.read_all(layer), part.mask_SL)
            else:
                for seq, (at, new) in enumerate(zip(part.layout.starts, part.layout.new_lens, strict=True), first):
                    own = slice(start + at, start + at + new)
                    out_TNH[own] = self.continued(q_TNH[own], *cache.read(layer, seq))
        return out_TNH


class Varlen(Sdpa):
    """The attention backend for half precision on CUDA: one kernel over packed sequences, and over pages of the cache for
    fresh, continued and decoding sequences alike."""

    def packed(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, layout: Layout) -> torch.Tensor:
        """See `Sdpa.packed`."""
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = _bounds(layout, q_TNH.device), max(layout.new_lens)
        out = varlen_attn(q_TNH, k_TKH, v_TKH, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(out, torch.Tensor)
        return out

    def cached(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, cache: CacheStep, layer: int,  # noqa: ARG002
    ) -> torch.Tensor:  # fmt: skip
        """See `Sdpa.cached`; the new keys and values are read from the cache, too."""
        from torch.nn.attention.varlen import varlen_attn

        (bounds, lens_S, table_SB), store, layout = cache.addresses, cache.store, cache.layout
        keys, values = (slots[layer].unflatten(0, (-1, store.block_size)) for slots in (store.keys, store.values))
        out = varlen_attn(
            q_TNH, keys, values, bounds, None, max(layout.new_lens), max(layout.total_lens), window_size=(-1, 0),
            enable_gqa=True, seqused_k=lens_S, block_table=table_SB,
            num_splits=1,  # the kernel's own choice depends on the batch, and so would the last bits of a reply
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out


SDPA, VARLEN = Sdpa(), Varlen()
BACKENDS: dict[tuple[str, torch.dtype], Sdpa] = {("cuda", torch.float16): VARLEN, ("cuda", torch.bfloat16): VARLEN}
"""The attention backend by device type and dtype; SDPA for all others."""


def backend_for(q: torch.Tensor) -> Sdpa:
    """Return the backend of the table."""
    return BACKENDS.get((q.device.type, q.dtype), SDPA)


def attend(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, layout: Layout, cache: CacheStep | None = None,
    layer: int = 0, backend: Sdpa | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attend from each token to its own sequence up to itself, cached tokens included. Returns out_TNH.

    Args:
        cache: Where the new keys and values are written before they are read; None if no sequence has a past.
        layer: The layer's index in the cache.
        backend: None takes the backend of the table.

    Raises:
        ValueError: if the layout has past lengths but no cache holds them.
    """
    backend = backend or backend_for(q_TNH)
    if cache is not None:
        cache.write(layer, k_TKH, v_TKH)
        return backend.cached(q_TNH, k_TKH, v_TKH, cache, layer)
    if any(layout.past_lens):
        raise ValueError(f"layout has past lengths {layout.past_lens} but no cache was given")
    return backend.packed(q_TNH, k_TKH, v_TKH, layout)


@lru_cache(maxsize=64)
def _spans(layout: Layout) -> tuple[tuple[SpanKind, int, int], ...]:
    """Neighboring sequences of one kind as (kind, first, stop). A fresh sequence has no past, a decoding one has one new
    token, a continued one has more."""
    lens = zip(layout.new_lens, layout.past_lens, strict=True)
    kinds: list[SpanKind] = ["fresh" if past == 0 else "decoding" if new == 1 else "continued" for new, past in lens]
    bounds = [0, *(s for s in range(1, len(kinds)) if kinds[s] != kinds[s - 1]), len(kinds)]
    return tuple((kinds[first], first, stop) for first, stop in pairwise(bounds))


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # training may have the same layout, and saves what it indexes with
def _bounds(layout: Layout, device: torch.device) -> torch.Tensor:
    """Return where each sequence begins on the token axis and the last one ends, int32."""
    return send(torch.tensor((*layout.starts, layout.num_tokens), dtype=torch.int32), device)


@dataclass(frozen=True)
class _SequenceGroup:
    """Sequences of similar length, attended together.

    index_SL: Their positions on the token axis. Padding repeats the last position at the end. Causality keeps real tokens
        from attending to what follows them, so no mask is needed.
    real: Rows and columns of index_SL that are not padding; None if none is.
    """

    index_SL: torch.Tensor
    real: tuple[torch.Tensor, torch.Tensor] | None


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _groups(layout: Layout, device: torch.device) -> tuple[_SequenceGroup, ...]:
    lens = layout.new_lens
    groups: list[list[int]] = []
    for seq in sorted(range(len(lens)), key=lambda s: -lens[s]):
        longest = lens[groups[-1][0]] if groups else 0
        if groups and longest - lens[seq] <= max(longest // MAX_PADDING_SHARE, MAX_PADDING_TOKENS):
            groups[-1].append(seq)
        else:
            groups.append([seq])
    return tuple(_group([layout.starts[s] for s in group], [lens[s] for s in group], device) for group in groups)


def _group(starts: list[int], lens: list[int], device: torch.device) -> _SequenceGroup:
    starts_S1, lens_S1 = torch.tensor([starts, lens]).unsqueeze(2)
    column_1L = torch.arange(max(lens)).unsqueeze(0)
    index_SL = send(starts_S1 + torch.minimum(column_1L, lens_S1 - 1), device)
    if min(lens) == max(lens):
        return _SequenceGroup(index_SL, None)
    rows, columns = (column_1L < lens_S1).nonzero(as_tuple=True)
    return _SequenceGroup(index_SL, (send(rows, device), send(columns, device)))
