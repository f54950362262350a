"""A prompt whose parts have names: what lies in a cache is found again by content, whoever asks."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Sequence

import torch

from ivl.config import ModelConfig
from ivl.types import Prompt


class NamedPrompt:
    """Tokens, the tile that each placeholder shows, and a name for every block of tokens. Never changed, so that several
    requests may share one.

    A block's name covers everything up to its end: token ids, and for placeholders the tile's content and the place in
    its run. The last block may be short. Without block_size nothing is named. keys: the content of each tile.

    Raises:
        ValueError: unless there is exactly one placeholder per vision token.
    """

    def __init__(self, prompt: Prompt, keys: list[bytes], config: ModelConfig, block_size: int | None) -> None:
        self.tokens_T = prompt.tokens_T
        self.num_tiles = len(keys)
        self.run_keys = [keys[tile] for tile in prompt.tile_ids_R.tolist()]
        self.run_length = config.tokens_per_tile
        self.marks = array("q", (prompt.tokens_T == config.image_token_id).nonzero().flatten().tolist())
        """Positions of the placeholders."""
        if len(self.marks) != len(self.run_keys) * self.run_length:
            raise ValueError(
                f"{len(self.marks)} image placeholder tokens but {len(self.run_keys) * self.run_length} vision tokens"
            )
        self.names: list[bytes] = []
        if block_size is not None:
            tokens, name = prompt.tokens_T.tolist(), b""
            for start in range(0, len(tokens), block_size):
                name = self.name(name, start, tokens[start : start + block_size])
                self.names.append(name)

    def name(self, before: bytes, start: int, tokens: Sequence[int]) -> bytes:
        """The name of the tokens at start that follow the block named before; they may go on into the reply."""
        digest = hashlib.blake2b(before, digest_size=16)
        digest.update(array("q", tokens).tobytes())
        first, stop = self._placeholders(start, start + len(tokens))
        if first < stop:
            digest.update(array("q", (first % self.run_length,)).tobytes())
            digest.update(b"".join(self._runs(first, stop)))
        return digest.digest()

    def tile_keys(self, start: int, stop: int) -> list[bytes]:
        """Distinct tiles shown between two positions, in order."""
        return list(dict.fromkeys(self._runs(*self._placeholders(start, stop))))

    def vision(self, start: int, stop: int, encoded: dict[bytes, torch.Tensor]) -> torch.Tensor | None:
        """Vision tokens [X, D] of the placeholders between two positions, which may cut their runs."""
        first, last = self._placeholders(start, stop)
        if first == last:
            return None
        runs_XD = torch.cat([encoded[key] for key in self._runs(first, last)])
        skipped = first % self.run_length
        return runs_XD[skipped : skipped + last - first]

    def _placeholders(self, start: int, stop: int) -> tuple[int, int]:
        """Which placeholders lie between two positions."""
        return bisect_left(self.marks, start), bisect_left(self.marks, stop)

    def _runs(self, first: int, stop: int) -> list[bytes]:
        """Tiles of the runs that hold these placeholders."""
        return self.run_keys[first // self.run_length : -(-stop // self.run_length)] if first < stop else []
