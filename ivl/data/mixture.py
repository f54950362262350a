"""A mixture of data sets: the rows that one epoch draws, and their order. D data sets, N positions of the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from ivl.data.config import Weighting
from ivl.data.records import read_record
from ivl.errors import InputError
from ivl.formats.base import GroupCache
from ivl.formats.layouts import ROW_KEYS
from ivl.formats.rows import RowFormat, container_of, hash_rows, open_rows
from ivl.formats.split import part_of
from ivl.types import Record
from ivl.utils.checks import check_choices
from ivl.utils.shuffles import GroupOrder, Permutation
from ivl.utils.strict_json import from_json, read_json

T = TypeVar("T")
MAX_REPEAT = 4
"""Most draws of a row by weighting (InternVL2.5, arXiv:2412.05271, section 4), unless its repeat_time is larger."""

CHAPTER_BYTES, CHAPTER_DRAWS = 1 << 28, 1 << 18
"""Row groups in memory, and draws, that a chapter of the epoch has: the buffer in which parquet is shuffled."""
LANES_L = np.array([int(f"{lane:06b}"[::-1], 2) for lane in range(64)])
"""Order of the lanes, positions modulo 64, in which the row groups of a chapter are dealt. Bits are reversed, so that
neighboring positions are far apart, and the lanes of one of 2, 4, 8, ... ranks are neighbors."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One entry of a meta JSON; the field names are the reference's."""

    name: str
    annotation: str
    """A file or folder of rows: jsonl, JSON, parquet, arrow or tar."""
    root: str = ""
    """Folder that relative media paths start from."""
    data_augment: bool = False
    """Degrade images by random JPEG compression."""
    max_dynamic_patch: int | None = None
    """Tile budget that the images of a conversation share; None takes the run's."""
    repeat_time: float = 1.0
    """Draws per row and epoch; a fraction is a seeded random subset, the same in every epoch."""
    length: int | None = None
    """Rows, for people only."""
    format: RowFormat | None = None
    """How the rows are read; None looks."""

    def __post_init__(self) -> None:
        if not self.annotation:
            raise InputError("annotation must be a path")
        if self.max_dynamic_patch is not None and self.max_dynamic_patch < 1:
            raise InputError(f"max_dynamic_patch must be >= 1, got {self.max_dynamic_patch}")
        if not 0 < self.repeat_time <= 1e9:
            raise InputError(f"repeat_time must be in (0, 1e9], got {self.repeat_time}")
        check_choices(self)


def load_mixture(
    path: str | Path | tuple[str, ...], *, root: str | None = None, format: RowFormat | None = None
) -> tuple[DatasetSpec, ...]:
    """Read a meta JSON, or take one file or folder of rows as a mixture of itself.

    Relative annotation and root paths are taken from the meta file's folder where they exist there, else from the working
    folder. `root` and `format` are for rows only; None is the file's folder, and to look.

    Raises:
        InputError: naming the file, the entry and the key.
    """
    if isinstance(path, tuple):
        return tuple(spec for each in path for spec in load_mixture(each, root=root, format=format))
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; a mixture is a meta JSON or a file or folder of rows")
    rows = format is not None or path.is_dir() or path.suffix == ".jsonl" or container_of(path) not in ("json", "jsonl")
    meta = None if rows else _read_meta(path)
    if meta is None:
        folder = str(path if path.is_dir() else path.parent)
        return (DatasetSpec(name=path.stem, annotation=str(path), root=folder if root is None else root, format=format),)
    if root is not None:
        raise InputError(f"{path}: is a meta JSON, whose entries have a root each; root {root!r} cannot be given beside it")
    if not meta:
        raise InputError(f"{path}: has no data sets")
    return tuple(_read_spec(path, name, entry) for name, entry in meta.items())


def _read_meta(path: Path) -> dict[str, Any] | None:
    """The object in a meta JSON; None if the file holds rows."""
    with path.open("rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        return None
    try:
        meta = read_json(path)
    except InputError as error:
        if "Extra data" in str(error) or "bytes of JSON" in str(error):  # jsonl under another name
            return None
        if "not valid JSON" in str(error) and first != b"{":
            kinds = "JSON lines, a JSON array, Parquet, Arrow or tar"
            raise InputError(f"{path}: is neither a meta JSON nor rows, which are {kinds}") from None
        raise
    is_meta = isinstance(meta, dict) and not any(isinstance(meta.get(key), str | list) for key in ROW_KEYS)
    return cast(dict[str, Any], meta) if is_meta else None


def _read_spec(path: Path, name: str, entry: Any) -> DatasetSpec:
    where = f"{path}: dataset {name!r}"
    if isinstance(entry, list) and entry and isinstance(entry[0], dict):
        raise InputError(f"{where}: is a list of {len(entry)} rows; write that list alone, as `jq .{name}` does")
    if isinstance(entry, dict):
        if "name" in entry:
            raise InputError(f"{where}: unknown key 'name'; the entry's own key is its name")
        entry = {key: value for key, value in cast(dict[str, Any], entry).items() if value is not None} | {"name": name}
    spec = from_json(DatasetSpec, entry, where)
    return replace(
        spec, annotation=_resolve(path, spec.annotation), root=_resolve(path, spec.root) if spec.root else str(path.parent)
    )


def _resolve(meta: Path, ref: str) -> str:
    places = [place for name in (ref, ref.replace("\\", "/")) for place in (meta.parent / name, Path(name)) if place.exists()]
    return str(places[0] if places else meta.parent / ref)


class Draw(NamedTuple):
    """One row drawn at one position of the endless stream of epochs."""

    position: int
    epoch: int
    dataset: int
    row: int
    copy: int
    """Number of this draw among the epoch's draws of the row, from 0, whatever their order in the stream."""


class Mixture:
    """Data sets opened for random access, and the order of the stream.

    The stream is one epoch after another; position p is in epoch p // len(self). Its order follows from the files and the seed
    alone. An epoch is one permutation of its draws. With parquet, where a row costs the decoding of its row group, it is a
    number of chapters, each a permutation of its own: a chapter has the next draws of every data set, in proportion; those of
    parquet are the next row groups of a permutation of the groups.
    """

    def __init__(
        self, specs: tuple[DatasetSpec, ...], *, seed: int, shuffle: bool = True, weighting: Weighting = "size",
        val_share: float = 0.0, validation: bool = False,
    ) -> None:  # fmt: skip
        self.specs, self.seed, self.shuffle = specs, seed, shuffle
        files = [open_rows(spec.annotation, format=spec.format) for spec in specs]
        self.files = [part_of(rows, val_share, validation=validation) for rows in files]
        self._sizes_D = np.array([len(rows) for rows in self.files])
        self._draws_D = weighted(
            [_num_draws(len(rows), spec) for rows, spec in zip(self.files, specs, strict=True)], self._sizes_D, weighting
        )
        for spec, size, draws in zip(specs, self._sizes_D, self._draws_D, strict=True):
            if not draws:
                raise InputError(f"dataset {spec.name!r}: repeat_time {spec.repeat_time} of {size} rows leaves none")
        self._ends = np.cumsum(self._draws_D)
        self._starts = self._ends - self._draws_D
        self._subsets = [Permutation(len(rows), seed, 1, index) for index, rows in enumerate(self.files)]
        self._groups = [rows.groups() for rows in self.files]
        self._chapters_CD = self._cut_chapters() if shuffle else None
        self._memo: dict[tuple[Any, ...], Any] = {}
        self._fingerprint: list[list[Any]] | None = None

    def __len__(self) -> int:
        """Draws of one epoch."""
        return int(self._ends[-1])

    def num_draws(self, dataset: int) -> int:
        """Draws of one epoch from one data set."""
        return int(self._draws_D[dataset])

    def draws(self, positions: Sequence[int]) -> Iterator[Draw]:
        """What the stream has at these positions, a block at a time."""
        block = 512
        for at in range(0, len(positions), block):
            yield from self._draw(np.asarray(positions[at : at + block], dtype=np.int64))

    def _draw(self, positions_N: np.ndarray) -> list[Draw]:
        # A place is a draw of the epoch before shuffling: the draws of the first data set, then those of the second, and so on;
        # within one data set all its rows once, then all once more, and last an incomplete copy.
        epoch_N, place_N = np.divmod(positions_N, len(self))
        if self.shuffle:
            for epoch in np.unique(epoch_N):
                here = epoch_N == epoch
                place_N[here] = self._shuffled(int(epoch), place_N[here])
        dataset_N = np.searchsorted(self._ends, place_N, side="right")
        place_N -= self._starts[dataset_N]
        copy_N, row_N = np.divmod(place_N, self._sizes_D[dataset_N])
        # The last, incomplete copy is a random subset, not the first rows of the file.
        partial_N = copy_N == (self._draws_D // self._sizes_D)[dataset_N]
        for epoch, dataset, partial in set(zip(epoch_N.tolist(), dataset_N.tolist(), partial_N.tolist(), strict=True)):
            if partial or self._groups[dataset] is not None:
                here = (epoch_N == epoch) & (dataset_N == dataset) & (partial_N == partial)
                row_N[here] = self._rows(epoch, dataset, partial, row_N[here])
        columns = (positions_N, epoch_N, dataset_N, row_N, copy_N)
        return [Draw(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

    def _rows(self, epoch: int, dataset: int, partial: bool, row_N: np.ndarray) -> np.ndarray:
        """The rows at these places of a copy of a data set."""
        if (groups := self._groups[dataset]) is None:
            return self._subsets[dataset](row_N)
        subset = self._memoized(GroupOrder, groups[0], self.seed, 1, dataset) if partial else None
        if self.shuffle:
            ends_G = groups[0]
            if subset:
                size = int(self._draws_D[dataset] % self._sizes_D[dataset])
                ends_G = np.append(subset.ends_G[subset.ends_G < size], size)
            row_N = self._memoized(GroupOrder, ends_G, self.seed, 3, dataset, epoch, partial)(row_N)
        return subset(row_N) if subset else row_N

    def _shuffled(self, epoch: int, position_N: np.ndarray) -> np.ndarray:
        """The places at these positions of an epoch."""
        if self._chapters_CD is None:
            return self._memoized(Permutation, len(self), self.seed, 0, epoch)(position_N)
        start_C = self._chapters_CD.sum(axis=1)
        chapter_N = np.searchsorted(start_C, position_N, side="right") - 1
        place_N = np.empty_like(position_N)
        for chapter in np.unique(chapter_N).tolist():
            here = chapter_N == chapter
            place_N[here] = self._memoized(self._chapter, epoch, chapter)[position_N[here] - start_C[chapter]]
        return place_N

    def _cut_chapters(self) -> np.ndarray | None:
        """The draws of each data set before each chapter, and at the end; None if every row is read alone.

        Every data set of groups keeps those of a chapter in memory, and two more, since chapters end within groups.
        """
        bytes_D = np.array([0 if groups is None else groups[1].sum() for groups in self._groups])
        if not any(groups is not None for groups in self._groups):
            return None
        bytes_D = bytes_D / self._sizes_D * self._draws_D
        count = max(1, int(-(-bytes_D.sum() // CHAPTER_BYTES)), -(-len(self) // CHAPTER_DRAWS))
        for rows, groups, size in zip(self.files, self._groups, bytes_D, strict=True):
            if groups is not None:
                rows.keep(GroupCache(int(size / count + 2 * groups[1].max())))
        return np.arange(count + 1)[:, None] * self._draws_D // count

    def _chapter(self, epoch: int, chapter: int) -> np.ndarray:
        """The places at all positions of a chapter.

        The draws of one lane take neighboring places of a data set, so that each of several ranks reads groups of its own.
        """
        first_D, last_D = cast(np.ndarray, self._chapters_CD)[chapter : chapter + 2]
        random = np.random.default_rng((self.seed, 2, epoch, chapter))
        dataset_N = random.permutation(np.repeat(np.arange(len(first_D)), last_D - first_D))
        lane_N = LANES_L[(epoch * len(self) + first_D.sum() + np.arange(len(dataset_N))) % len(LANES_L)]
        parts = []
        for dataset, (first, last) in enumerate(zip(first_D.tolist(), last_D.tolist(), strict=True)):
            draw_N = np.arange(first, last)
            if self._groups[dataset] is None:
                draw_N = self._memoized(Permutation, int(self._draws_D[dataset]), self.seed, 3, dataset, epoch)(draw_N)
            parts.append(self._starts[dataset] + draw_N)
        place_N = np.empty(len(dataset_N), dtype=np.int64)
        place_N[np.lexsort((random.random(len(dataset_N)), lane_N, dataset_N))] = np.concatenate(parts)
        return place_N

    def _memoized(self, make: Callable[..., T], *arguments: Any) -> T:
        """What `make` returns, kept for some calls."""
        key = (make, *(each for each in arguments if not isinstance(each, np.ndarray)))
        if key not in self._memo:
            while len(self._memo) > 4 * len(self.specs):
                del self._memo[next(iter(self._memo))]
            self._memo[key] = make(*arguments)
        return self._memo[key]

    def record(self, dataset: int, row: int) -> Record:
        """Read one row; raises DataError if it is not what it should be."""
        spec, rows = self.specs[dataset], self.files[dataset]
        return read_record(rows, row, root=Path(spec.root), dataset=spec.name)

    def fingerprint(self) -> list[list[Any]]:
        """What a saved position depends on, the rows' content included; a position of one mixture means nothing in another."""
        if self._fingerprint is None:
            order = "" if self._chapters_CD is None else f" in {len(self._chapters_CD) - 1} chapters"
            self._fingerprint = [
                [spec.name, len(rows), rows.num_bytes, draws, hash_rows(spec.annotation, rows.container) + order]
                for spec, rows, draws in zip(self.specs, self.files, self._draws_D.tolist(), strict=True)
            ]
        return self._fingerprint

    def matches(self, saved: list[list[Any]]) -> bool:
        """Whether a saved fingerprint is of this mixture. Those of older versions have no hash of the content."""
        now = self.fingerprint()
        return len(saved) == len(now) and all(old in (new, new[:-1]) for old, new in zip(saved, now, strict=True))


def _num_draws(num_rows: int, spec: DatasetSpec) -> int:
    return int(spec.repeat_time * num_rows)


def weighted(draws: Sequence[int], rows_D: np.ndarray, weighting: Weighting) -> np.ndarray:
    """Draws of each data set by its own repeat_time -> int64 draws by weight, as many in all.

    A temperature T makes shares proportional to draws^(1/T): 1 is by size, 2 by root (the reference's resampling), larger is
    more even. No row is drawn more than MAX_REPEAT or its repeat_time times; what that takes from small sets goes to others,
    by weight.
    """
    draws_D = np.asarray(draws, dtype=np.int64)
    temperature = {"size": 1.0, "root": 2.0}.get(weighting, weighting) if isinstance(weighting, str) else weighting
    if temperature == 1:
        return draws_D
    weight_D = (draws_D / draws_D.max()) ** (1 / float(temperature))
    most_D = np.maximum(MAX_REPEAT * rows_D, draws_D)
    share_D, capped_D = np.zeros(len(draws_D)), np.zeros(len(draws_D), dtype=bool)
    while True:
        left = draws_D.sum() - most_D[capped_D].sum()
        share_D = np.where(capped_D, most_D, left * weight_D / max(weight_D[~capped_D].sum(), 1e-300))
        if not (over_D := ~capped_D & (share_D > most_D)).any():
            break
        capped_D |= over_D
    whole_D = np.floor(share_D).astype(np.int64)
    rest = int(draws_D.sum() - whole_D.sum())
    whole_D[np.argsort(whole_D - share_D, kind="stable")[:rest]] += 1  # the largest remainders
    return whole_D
