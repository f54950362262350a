"""attend(): causal attention over the flat token axis; attend_all(): every patch of a tile sees every other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from ivl.cpu import kernels
from ivl.model.cache import CacheStep
from ivl.types import Layout

# A group of sequences may be padded by this share of its longest member, or by this many tokens each if that is more.
MAX_PADDING_SHARE = 4
MAX_PADDING_TOKENS = 16
# Decoding sequences are gathered into one rectangle unless it would be this many times larger than they are.
MAX_GATHER = 2

# From so many new tokens on, a continued prompt is padded to what the attention kernel takes: torch's takes longer.
MIN_PADDED = 28

# Up to this length, training on a CPU spells attention out: the fused kernel's backward costs about 0.2 ms for every
# head of every sequence there, however short, which is several times the arithmetic.
MAX_SPELLED_OUT = 256


def sdpa(
    q_SNLH: torch.Tensor,
    k_SKLH: torch.Tensor,
    v_SKLH: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention of sequences of one length; key/value heads are shared by groups of query heads."""
    short = max(q_SNLH.shape[2], k_SKLH.shape[2]) <= MAX_SPELLED_OUT
    if short and attn_mask is None and torch.is_grad_enabled() and q_SNLH.requires_grad and not q_SNLH.is_cuda:
        return _spelled_out(q_SNLH, k_SKLH, v_SKLH, is_causal)
    return scaled_dot_product_attention(q_SNLH, k_SKLH, v_SKLH, attn_mask, is_causal=is_causal, enable_gqa=True)


def _spelled_out(q_SNLH: torch.Tensor, k_SKLH: torch.Tensor, v_SKLH: torch.Tensor, is_causal: bool) -> torch.Tensor:
    num_seqs, num_heads, length, head_dim = q_SNLH.shape
    num_kv_heads = k_SKLH.shape[1]
    # The query heads of one key/value head become rows of one product, so keys and values are never repeated.
    q = (q_SNLH * head_dim**-0.5).reshape(num_seqs, num_kv_heads, -1, head_dim)
    scores = (q @ k_SKLH.transpose(-1, -2)).float().view(num_seqs, num_heads, length, -1)
    if is_causal:
        scores = scores + torch.full((length, length), float("-inf"), device=q.device).triu(1)
    weights = scores.softmax(-1).to(v_SKLH.dtype).view(num_seqs, num_kv_heads, -1, k_SKLH.shape[2])
    return (weights @ v_SKLH).view(q_SNLH.shape)


def attend(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    layout: Layout,
    cache: CacheStep | None = None,
    layer: int = 0,
) -> torch.Tensor:
    """Each token sees its own sequence up to itself: what the cache holds and what is new.

    With a cache, the new keys and values are written to it first. Returns out_TNH.

    Raises:
        ValueError: if the layout says there is past but no cache holds it.
    """
    if cache is not None:
        cache.write(layer, k_TKH, v_TKH)
    elif any(layout.past_lens):
        raise ValueError(f"layout has past lengths {layout.past_lens} but no cache was given")
    kinds = _kinds(layout)
    if len(kinds) == 1 and kinds[0][0] == "fresh":
        return _attend_fresh(q_TNH, k_TKH, v_TKH, layout)
    assert cache is not None
    out_TNH = torch.empty_like(q_TNH)
    for kind, first, stop in kinds:
        part, start = cache.part(first, stop), layout.starts[first]
        tokens = slice(start, start + part.layout.num_tokens)
        if kind == "fresh":
            out_TNH[tokens] = _attend_fresh(q_TNH[tokens], k_TKH[tokens], v_TKH[tokens], part.layout)
        elif kind == "decoding" and _gathers(part.layout):
            out_TNH[tokens] = _attend_decode(q_TNH[tokens], *part.read_all(layer), part.mask_SL)
        else:
            for seq, (at, new) in enumerate(zip(part.layout.starts, part.layout.new_lens, strict=True), first):
                own = slice(start + at, start + at + new)
                out_TNH[own] = _attend_one(q_TNH[own], *cache.read(layer, seq))
    return out_TNH


@lru_cache(maxsize=64)
def _kinds(layout: Layout) -> tuple[tuple[str, int, int], ...]:
    """Neighbouring sequences of one kind, as (kind, first, stop): fresh without past, decoding one token, or continued."""
    lens = zip(layout.new_lens, layout.past_lens, strict=True)
    kinds = ["fresh" if past == 0 else "decoding" if new == 1 else "continued" for new, past in lens]
    bounds = [0, *(s for s in range(1, len(kinds)) if kinds[s] != kinds[s - 1]), len(kinds)]
    return tuple((kinds[first], first, stop) for first, stop in pairwise(bounds))


def _gathers(layout: Layout) -> bool:
    lens = layout.total_lens
    return len(lens) > 1 and max(lens) * len(lens) <= MAX_GATHER * sum(lens)


def _attend_fresh(q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, layout: Layout) -> torch.Tensor:
    attend_fresh = _attend_varlen if q_TNH.is_cuda else _attend_packed
    return attend_fresh(q_TNH, k_TKH, v_TKH, layout)


def attend_all(q_GPNH: torch.Tensor, k_GPNH: torch.Tensor, v_GPNH: torch.Tensor) -> torch.Tensor:
    """Each patch of a tile sees all patches of the tile. Returns out_GPNH."""
    if kernels.attention_usable(q_GPNH[0], k_GPNH.shape[1]):
        tiles = zip(q_GPNH, k_GPNH, v_GPNH, strict=True)
        return torch.stack([kernels.attention(q, k, v, causal=False) for q, k, v in tiles])
    q, k, v = (x.transpose(1, 2) for x in (q_GPNH, k_GPNH, v_GPNH))
    return sdpa(q, k, v).transpose(1, 2)


def _attend_one(q_TNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor) -> torch.Tensor:
    """The last len(q) tokens of one sequence against all of its L tokens."""
    new, total = len(q_TNH), len(k_LKH)
    if MIN_PADDED <= new < kernels.MIN_QUERIES <= total and q_TNH.dtype is torch.bfloat16 and not torch.is_grad_enabled():
        padded = torch.cat([q_TNH.new_zeros(kernels.MIN_QUERIES - new, *q_TNH.shape[1:]), q_TNH])
        if kernels.attention_usable(padded, total):
            return kernels.attention(padded, k_LKH, v_LKH, causal=True)[-new:]
    if kernels.attention_usable(q_TNH, total):
        return kernels.attention(q_TNH, k_LKH, v_LKH, causal=True)
    if new == 1:
        return _attend_decode(q_TNH, k_LKH.unsqueeze(0), v_LKH.unsqueeze(0), None)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_LKH, v_LKH))
    mask = None
    if new < total:
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    out = sdpa(q, k, v, attn_mask=mask, is_causal=new == total and new > 1)
    return out.squeeze(0).transpose(0, 1)


def _attend_decode(
    q_SNH: torch.Tensor, k_SLKH: torch.Tensor, v_SLKH: torch.Tensor, mask_SL: torch.Tensor | None
) -> torch.Tensor:
    """One query token per sequence. The query heads that share a key head are its rows: keys are read once for all."""
    q, k, v = q_SNH.unflatten(1, (k_SLKH.shape[2], -1)), k_SLKH.transpose(1, 2), v_SLKH.transpose(1, 2)
    mask = None if mask_SL is None else mask_SL[:, None, None, :]
    return sdpa(q, k, v, attn_mask=mask).flatten(1, 2)


@dataclass(frozen=True)
class _Group:
    """Sequences of like length, attended together. index_SL: their positions on the token axis, padded at the end by
    repeating the last one: causality keeps real tokens from seeing what comes after them, so no mask is needed.
    real_SL tells the positions that are not padding; None when there is none."""

    index_SL: torch.Tensor
    real_SL: torch.Tensor | None


@lru_cache(maxsize=64)
def _groups(layout: Layout, device: torch.device) -> tuple[_Group, ...]:
    by_length = sorted(range(len(layout.new_lens)), key=lambda s: -layout.new_lens[s])
    groups: list[list[int]] = []
    for seq in by_length:
        longest = layout.new_lens[groups[-1][0]] if groups else 0
        slack = max(longest // MAX_PADDING_SHARE, MAX_PADDING_TOKENS)
        if groups and longest - layout.new_lens[seq] <= slack:
            groups[-1].append(seq)
        else:
            groups.append([seq])
    return tuple(_group([layout.starts[s] for s in g], [layout.new_lens[s] for s in g], device) for g in groups)


def _group(starts: list[int], lens: list[int], device: torch.device) -> _Group:
    lens_S1 = torch.tensor(lens, device=device).unsqueeze(1)
    column_1L = torch.arange(max(lens), device=device).unsqueeze(0)
    index_SL = torch.tensor(starts, device=device).unsqueeze(1) + torch.minimum(column_1L, lens_S1 - 1)
    return _Group(index_SL, None if min(lens) == max(lens) else column_1L < lens_S1)


def _attend_packed(q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, layout: Layout) -> torch.Tensor:
    lens = layout.new_lens
    if all(kernels.attention_usable(q_TNH[:n], n) for n in lens):
        parts = zip(q_TNH.split(lens), k_TKH.split(lens), v_TKH.split(lens), strict=True)
        return torch.cat([kernels.attention(q, k, v, causal=True) for q, k, v in parts])
    if min(lens) == max(lens):  # already a rectangle: no gathering
        shape = (len(lens), lens[0])
        q, k, v = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
        return sdpa(q, k, v, is_causal=lens[0] > 1).transpose(1, 2).reshape(q_TNH.shape)
    out_parts, index_parts = [], []
    for group in _groups(layout, q_TNH.device):
        q, k, v = (x[group.index_SL].transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
        out_SLNH = sdpa(q, k, v, is_causal=True).transpose(1, 2)
        if group.real_SL is None:
            out_parts.append(out_SLNH.flatten(0, 1))
            index_parts.append(group.index_SL.flatten())
        else:
            out_parts.append(out_SLNH[group.real_SL])
            index_parts.append(group.index_SL[group.real_SL])
    order_T = torch.cat(index_parts)
    return torch.empty_like(q_TNH).index_copy(0, order_T, torch.cat(out_parts))


def _attend_varlen(q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, layout: Layout) -> torch.Tensor:
    """GPU: one fused kernel over all sequences, no grouping."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor((*layout.starts, layout.num_tokens), dtype=torch.int32, device=q_TNH.device)
    longest = max(layout.new_lens)
    out = varlen_attn(q_TNH, k_TKH, v_TKH, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(out, torch.Tensor)
    return out
