"""Checkpoints of sharded runs: each rank has written what it held into a file of its own."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import torch

from ivl.checkpoint.tensor_file import TensorFile
from ivl.errors import InputError
from ivl.train.world import ParameterCut

FOLDER = "shards"
"""The folder of a checkpoint that has a file of each rank."""
OPEN_FILES = 16


def is_sharded_checkpoint(directory: Path) -> bool:
    """Whether a sharded run has written a directory as its checkpoint."""
    return (directory / FOLDER).is_dir()


class ShardedWeights:
    """The tensors of such a checkpoint under our names. Any number of ranks may read them, each the rows that it holds.

    A file names its parts as the safetensors files of torch.distributed.checkpoint do (HuggingFaceStorageReader).

    Args:
        directory: the checkpoint.
        state: whether the tensors are those of the optimizer, `PARAMETER|NAME`, or the parameters.

    Raises:
        InputError: if a file cannot be read, or rows of a tensor are missing.
    """

    def __init__(self, directory: Path, *, state: bool = False) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._file = lru_cache(OPEN_FILES)(TensorFile)
        self._parts: dict[str, list[tuple[int, int, Path]]] = defaultdict(list)
        """First row, last row and file of each part, in the order of rows."""
        self._shares: dict[str, tuple[ParameterCut, list[str]]] = {}
        """How tensor ranks have shared a tensor, and the names of their shares."""
        for path in sorted((directory / FOLDER).glob("rank-*.safetensors")):
            self._add(path, state)
        for name, parts in self._parts.items():
            parts.sort()
            if parts[0][0] or any(before[1] != part[0] for before, part in itertools.pairwise(parts)):
                raise InputError(f"{directory / FOLDER}: rows of {name!r} are missing")
        self._find_shares()

    def _add(self, path: Path, state: bool) -> None:
        file = self._file(path)
        try:
            places = json.loads(file.metadata["DCP_SHARDING_INFO"])
            for name, shape in file.shapes.items():
                if ("|" in name) == state:
                    first = places[name]["saved_offsets"][0] if shape else 0
                    last = first + (shape[0] if shape else 1)
                    self._parts[name].append((first, last, path))
                    rows = max(last, *self.shapes.get(name, (0,))[:1])
                    self.shapes[name] = (rows, *shape[1:]) if shape else ()
                    self.dtypes[name] = file.dtypes[name]
        except (ValueError, KeyError, LookupError, TypeError) as error:
            raise InputError(f"{path}: does not say where its rows belong ({error!r})") from None

    def _find_shares(self) -> None:
        """Show what tensor ranks have shared as whole tensors."""
        for first in [name for name in self.shapes if "@0/" in name]:
            lead, _, rest = first.partition("@0/")
            count, bar, moment = rest.partition("|")
            shares = [f"{lead}@{rank}/{count}{bar}{moment}" for rank in range(int(count))]
            if missing := [share for share in shares if share not in self.shapes]:
                raise InputError(f"{self.directory / FOLDER}: the share {missing[0]!r} is missing")
            dim, parts = json.loads(self._file(self._parts[first][0][2]).metadata["ivl.cuts"])[lead]
            whole, shape = f"{lead}{bar}{moment}", list(self.shapes[first])
            shape[dim] = sum(parts)
            self._shares[whole] = ParameterCut(dim, tuple(parts)), shares
            self.shapes[whole], self.dtypes[whole] = tuple(shape), self.dtypes[first]
            for share in shares:
                del self.shapes[share], self.dtypes[share]

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(iter(self.dtypes.values()))

    def get(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        if name in self._shares:
            cut, shares = self._shares[name]
            return cut.join([self.rows(share, 0, self._parts[share][-1][1]) for share in shares])
        shape = self.shapes[name]
        return self.rows(name, 0, shape[0]) if shape else self._file(self._parts[name][0][2]).get(name)

    def place(self, name: str) -> str:
        """Return the folder of a tensor and its name, for messages."""
        return f"{self.directory / FOLDER}: tensor {name!r}"

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read rows [first, last) of a tensor."""
        if name in self._shares:
            return self.get(name)[first:last]
        parts = [
            self._file(path).rows(name, max(first, begin) - begin, min(last, end) - begin)
            for begin, end, path in self._parts[name]
            if begin < last and first < end
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
