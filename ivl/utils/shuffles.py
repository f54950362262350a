"""Seeded orders of very many rows, of which nothing or little is stored."""

from __future__ import annotations

import numpy as np


class Permutation:
    """A seeded permutation of range(size), computed on demand and never stored.

    A Feistel network of any round function is a permutation of 2^(2 * bits) numbers: each round swaps the halves of a number
    and changes one by a function of the other, which the inverse undoes in reverse. To permute fewer numbers, a value outside
    range(size) goes through the network again until it lands inside (cycle walking). Starting inside, it must return there,
    since the network's cycles are closed, and two values that start inside cannot meet. The network permutes fewer than 4 *
    size numbers, so this takes fewer than 4 passes on average.

    Source: Black and Rogaway, Ciphers with arbitrary finite domains (2002).
    """

    ROUNDS = 8

    def __init__(self, size: int, *seed: int) -> None:
        self.size = size
        # At least 256 numbers, for a handful of rounds shuffles tiny ranges badly.
        self._bits = np.uint64(max(4, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._bits)) - 1)
        self._keys = np.random.SeedSequence(seed).generate_state(self.ROUNDS, np.uint64)

    def __call__(self, index_N: np.ndarray) -> np.ndarray:
        """int64 [N] -> int64 [N], every value in range(size)."""
        if self.size == 1:
            return np.zeros_like(index_N)
        value_N = self._network(index_N.astype(np.uint64))
        while (outside := value_N >= self.size).any():
            value_N[outside] = self._network(value_N[outside])
        return value_N.astype(np.int64)

    def _network(self, value_N: np.ndarray) -> np.ndarray:
        left_N, right_N = value_N >> self._bits, value_N & self._mask
        for key in self._keys:
            left_N, right_N = right_N, left_N ^ (mix(right_N ^ key) & self._mask)
        return (left_N << self._bits) | right_N


class GroupOrder:
    """The rows of a data set group by group, the groups in a seeded order. G groups."""

    def __init__(self, ends_G: np.ndarray, *seed: int) -> None:
        sizes_G = np.diff(ends_G, prepend=0)
        order_G = np.random.default_rng(seed).permutation(len(ends_G))
        self.ends_G = np.cumsum(sizes_G[order_G])
        """The number of rows up to the end of each group, in that order."""
        self._shift_G = ends_G[order_G] - self.ends_G

    def __call__(self, index_N: np.ndarray) -> np.ndarray:
        """int64 [N] -> int64 [N], every value in range(rows)."""
        return index_N + self._shift_G[np.searchsorted(self.ends_G, index_N, side="right")]


def mix(x_N: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64; array arithmetic wraps modulo 2^64."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))
