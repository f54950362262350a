"""Greedy search for alike items, by hash buckets on disk: each item gets the earliest kept one that it is alike to.

An item is kept if it is alike to no earlier kept item, as if items came one by one and each was compared with those kept so
far. Only items with a key in common are compared: they are found by merging sorted runs, a range of keys at a time, so that
memory holds one range, one byte and one number for each item, and the pairs that are alike. The items are read from disk.

N items of W words, K keys each; M members of buckets; P pairs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")

RANGE = 1 << 22
"""Keys that one process sorts at a time."""
PAIRS = 1 << 16
"""Pairs that are compared at a time."""


class MapInOrder(Protocol):
    """Calls a function on every item, in some processes, and yields the results in the order of the items."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]: ...


class Likeness(Protocol):
    """What items have in common that are alike."""

    name: ClassVar[str]
    width: ClassVar[int]

    def keys(self, items_NW: np.ndarray) -> np.ndarray:
        """uint32 [N, W] -> uint64 [N, K], spread evenly; items without a common key are not compared."""
        ...

    def alike(self, items_NW: np.ndarray, first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
        """Whether the two items of each pair are alike -> bool [P]."""
        ...


def write_items(kind: Likeness, folder: Path, part: int, items_NW: np.ndarray) -> int:
    """Write the items of a part, and their keys as a sorted run; returns N."""
    keys_NK = kind.keys(items_NW)
    number_NK = np.repeat(np.arange(len(items_NW), dtype=np.uint64), keys_NK.shape[1])
    order = np.argsort(keys_NK, axis=None, kind="stable")
    np.save(folder / f"{kind.name}.{part}.run.npy", np.stack([keys_NK.ravel()[order], number_NK[order]]))
    items_NW.astype("<u4").tofile(folder / f"{kind.name}.{part}.items")
    return len(items_NW)


def earliest_alike(kind: Likeness, folder: Path, sizes: Sequence[int], mapped: MapInOrder) -> np.ndarray:
    """Find for each item the earliest kept one that it is alike to; a kept item is its own.

    A pair is compared when its first item seems to be kept, the first such item of each bucket in the first round, then ever
    more. A kept item may turn out to be alike to one that was compared later; then some that were alike to it alone come
    back. The rounds end when every kept item has been compared with all later ones of its buckets.

    Args:
        sizes: the number of items of each part that `write_items` wrote.

    Returns:
        int64 [N].
    """
    total = sum(sizes)
    with (folder / f"{kind.name}.items").open("wb") as whole:
        for part in range(len(sizes)):
            with (folder / f"{kind.name}.{part}.items").open("rb") as file:
                shutil.copyfileobj(file, whole, 1 << 20)
            (folder / f"{kind.name}.{part}.items").unlink()
    runs = [folder / f"{kind.name}.{part}.run.npy" for part in range(len(sizes))]
    num_keys = sum(np.load(run, mmap_mode="r").shape[1] for run in runs)
    ranges = range(max(1, -(-num_keys // RANGE)))
    list(mapped(partial(_gather, kind.name, folder, sizes, len(ranges)), ranges))
    pairs_P, kept_N, alike_N = np.zeros(0, np.int64), np.ones(total, bool), np.arange(total)
    for turn in count():
        np.save(folder / f"{kind.name}.kept.npy", kept_N)
        rounds = list(mapped(partial(_compare, kind, folder, total, turn), ranges))
        if not any(compared for compared, _ in rounds):
            break
        pairs_P = np.unique(np.concatenate([pairs_P, *(found for _, found in rounds)]))
        kept_N, alike_N = _resolve(pairs_P, total)
    return alike_N


def _gather(name: str, folder: Path, sizes: Sequence[int], num_ranges: int, number: int) -> None:
    """Write the buckets of a range of keys that have several members: for each member its item, and first and last place."""
    low, high = (np.uint64(min((1 << 64) * each // num_ranges, (1 << 64) - 1)) for each in (number, number + 1))
    keys, items, base = [], [], 0
    for part, size in enumerate(sizes):
        run = np.load(folder / f"{name}.{part}.run.npy", mmap_mode="r")
        first = int(np.searchsorted(run[0], low))
        last = int(np.searchsorted(run[0], high)) if number + 1 < num_ranges else run.shape[1]
        keys.append(np.array(run[0, first:last]))
        items.append(run[1, first:last].astype(np.int64) + base)
        base += size
    key_M = np.concatenate(keys)
    order_M = np.argsort(key_M, kind="stable")
    key_M, item_M = key_M[order_M], np.concatenate(items)[order_M]
    starts = np.flatnonzero(np.concatenate([[True], key_M[1:] != key_M[:-1]])) if len(key_M) else np.zeros(0, np.int64)
    counts = np.diff(starts, append=len(key_M))
    item_M = item_M[np.repeat(counts > 1, counts)]
    counts = counts[counts > 1]
    ends = np.cumsum(counts)
    np.save(folder / f"{name}.{number}.buckets.npy", [item_M, np.repeat(ends - counts, counts), np.repeat(ends, counts)])
    np.save(folder / f"{name}.{number}.done-0.npy", np.zeros(len(item_M), bool))


def _compare(kind: Likeness, folder: Path, total: int, turn: int, number: int) -> tuple[bool, np.ndarray]:
    """Compare the first 2^turn kept items of each bucket, of those that have not been, with all that come later in it.

    Returns:
        Whether there were any, and the pairs that are alike as later * total + earlier.
    """
    item_M, start_M, end_M = np.load(folder / f"{kind.name}.{number}.buckets.npy", mmap_mode="r")
    done_M = np.load(folder / f"{kind.name}.{number}.done-{turn}.npy")
    kept_N = np.load(folder / f"{kind.name}.kept.npy", mmap_mode="r")
    items_NW = np.memmap(folder / f"{kind.name}.items", np.uint32, "r", shape=(total, kind.width)) if total else None
    new_M = kept_N[item_M] & ~done_M
    new_M &= np.arange(len(item_M)) + 1 < end_M
    before_M = np.cumsum(new_M) - new_M
    chosen_M = new_M & (before_M - before_M[start_M] < 1 << turn) if len(item_M) else new_M
    np.save(folder / f"{kind.name}.{number}.done-{turn + 1}.npy", done_M | chosen_M)
    found = [np.zeros(0, np.int64)]
    for first_P, second_P in _pairs(np.flatnonzero(chosen_M), end_M):
        earlier_P, later_P = item_M[first_P], item_M[second_P]
        alike_P = kind.alike(items_NW, earlier_P, later_P)  # type: ignore[arg-type]
        found.append(later_P[alike_P] * total + earlier_P[alike_P])
    return bool(chosen_M.any()), np.unique(np.concatenate(found))


def _pairs(chosen: np.ndarray, end_M: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the places of each chosen member and of all that follow in its bucket, some PAIRS at a time."""
    counts = end_M[chosen] - chosen - 1
    sums = np.cumsum(counts)
    at = 0
    while at < len(chosen):
        stop = max(at + 1, int(np.searchsorted(sums, (sums[at - 1] if at else 0) + PAIRS, side="right")))
        first_P = np.repeat(chosen[at:stop], counts[at:stop])
        inside_P = np.arange(len(first_P)) - np.repeat(np.cumsum(counts[at:stop]) - counts[at:stop], counts[at:stop])
        yield first_P, first_P + 1 + inside_P
        at = stop


def _resolve(pairs_P: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep each item, in order, unless it is alike to an earlier kept one -> bool [N], and that item, int64 [N]."""
    kept, alike_N = bytearray(b"\1") * total, np.arange(total)
    for at in range(0, len(pairs_P), 1 << 20):
        later_P, earlier_P = np.divmod(pairs_P[at : at + (1 << 20)], total)
        for later, earlier in zip(later_P.tolist(), earlier_P.tolist(), strict=True):
            if kept[later] and kept[earlier]:
                kept[later], alike_N[later] = 0, earlier
    return np.frombuffer(kept, dtype=bool), alike_N


def words_of(data: Any, width: int) -> np.ndarray:
    """The bytes of some items, one after another, as uint32 [N, width]."""
    return np.frombuffer(data, dtype="<u4").reshape(-1, width)
