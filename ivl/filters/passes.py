"""The passes of a run: each takes the parts of the mixture a few stages further.

A part is the work of one process, which reads what the pass before wrote of it and writes files of its own, whole or not at
all. So the processes need nothing of each other, and a run goes on at the first part that is missing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ivl.errors import InputError
from ivl.filters.chain import UNREADABLE, Chain, FilterStage
from ivl.filters.judge import DataJudge
from ivl.filters.outputs import part_outputs
from ivl.filters.rows import RowChecker, RowEntry, RowPart, add_verdict
from ivl.filters.rules import FilterVerdict
from ivl.utils.files import NewFiles
from ivl.utils.jsonl import json_line, reading_line

ASKED = 1024
"""Rows that are shown to the judge at a time."""
Stages = tuple[int, ...]
"""Numbers of the stages of a pass."""


def cut_passes(chain: Chain) -> list[Stages]:
    """Cut a chain behind each stage that compares rows, which needs all rows before, and around those that ask the judge.

    The first pass reads the rows, and the last one writes the results; both may have no stage.
    """
    passes: list[list[int]] = [[]]
    for number, stage in enumerate(chain.stages):
        last = chain.stages[passes[-1][-1]] if passes[-1] else None
        if (last.compares or last.judged != stage.judged) if last else stage.judged:
            passes.append([])
        passes[-1].append(number)
    if chain.stages[-1].compares:
        passes.append([])
    return list(map(tuple, passes))


class PartPass:
    """One pass over one part.

    Args:
        folder: of the files of parts: `PART.PASS` has the rows and their verdicts so far, `PART.STAGE.npz` the signatures of
            those that reach a stage that compares, `duplicates.STAGE.npy` what such a stage found, `PART.kept` and so on the
            results.
        parts, passes: all of them; `number` is the pass.
    """

    def __init__(
        self,
        checker: RowChecker,
        judge: DataJudge | None,
        folder: Path,
        parts: list[RowPart],
        passes: list[Stages],
        number: int,
    ) -> None:
        self.checker, self.folder, self.parts, self.passes, self.number = checker, folder, parts, passes, number
        self.stages = [checker.chain.stages[each] for each in passes[number]]
        self.judge = judge if self.judged else None  # a pass without it may go to another machine

    @property
    def last(self) -> bool:
        return self.number + 1 == len(self.passes)

    @property
    def judged(self) -> bool:
        return any(stage.judged for stage in self.stages)

    @property
    def compared(self) -> int | None:
        """The number of the stage that compares the rows when all parts are through the pass."""
        return self.passes[self.number][-1] if self.stages and self.stages[-1].compares else None

    def done(self, part: RowPart) -> bool:
        """Whether the part is through this pass."""
        needed = ["figures"] if self.last else [self.number, *([] if self.compared is None else [f"{self.compared}.npz"])]
        return all(self._path(part, suffix).is_file() for suffix in needed)

    def __call__(self, part: RowPart) -> tuple[int, int]:
        """Take a part through the pass; returns how many rows it has, and how many of them are kept so far."""
        entries = list(self._entries(part))
        if self.number and (before := self.passes[self.number - 1]) and self.checker.chain.stages[before[-1]].compares:
            self._drop_duplicates(part, before[-1], entries)
        if self.judged:
            for stage in self.stages:
                self._ask(stage, entries)
            signatures = []
        else:
            found = (self.checker.apply(self.stages, entry) for entry in entries if self.stages or not self.number)
            signatures = [(row, signature) for row, signature in enumerate(found) if signature is not None]
        self._write(part, entries, signatures)
        return len(entries), sum(entry["keep"] for entry in entries)

    def signatures(self, part: int) -> Iterator[tuple[int, bytes]]:
        """The rows of a part, by their numbers, that reach the stage that compares, and their signatures."""
        path = self._path(self.parts[part], f"{self.compared}.npz")
        with _reading(path), np.load(path) as arrays:
            data, ends = arrays["data"].tobytes(), arrays["ends"].tolist()
            for row, start, end in zip(arrays["rows"].tolist(), [0, *ends], ends, strict=False):
                yield self.parts[part].start + row, data[start:end]

    # -- the stages

    def _ask(self, stage: FilterStage, entries: list[RowEntry]) -> None:
        assert self.judge
        alive = [entry for entry in entries if entry["keep"] and not stage.exempts(entry["dataset"])]
        for at in range(0, len(alive), ASKED):
            block = alive[at : at + ASKED]
            asked = [(self.checker.record(entry), self.checker.chain.domain_of(entry["dataset"])) for entry in block]
            for entry, verdict in zip(block, self.judge.verdicts(stage.rule, asked), strict=True):
                add_verdict(entry, stage.name, verdict)

    def _drop_duplicates(self, part: RowPart, number: int, entries: list[RowEntry]) -> None:
        path = self.folder / f"duplicates.{number}.npy"
        with _reading(path):
            later_D, earlier_D = np.load(path, mmap_mode="r")
        first, last = np.searchsorted(later_D, [part.start, part.start + len(entries)])
        for later, earlier in zip(later_D[first:last].tolist(), earlier_D[first:last].tolist(), strict=True):
            entry = entries[later - part.start]
            dataset, row = self.checker.place(self.parts, earlier)
            entry |= {"duplicate_of": self.checker.files[dataset].source(row), "repeats": [dataset, row]}
            add_verdict(entry, self.checker.chain.stages[number].name, FilterVerdict(False, "near-duplicate"))

    # -- the files

    def _path(self, part: RowPart, suffix: str | int) -> Path:
        return self.folder / f"{part.number:06d}.{suffix}"

    def _entries(self, part: RowPart) -> Iterator[RowEntry]:
        """The rows of a part, as the pass before left them.

        Raises:
            InputError: at a line that is damaged or of another row.
        """
        if not self.number:
            yield from (self.checker.entry(part.dataset, row) for row in range(part.first, part.end))
            return
        path, names = self._path(part, self.number - 1), {UNREADABLE, *(stage.name for stage in self.checker.chain.stages)}
        lines, size = path.read_bytes().split(b"\n")[:-1], part.end - part.first
        for number in range(max(len(lines), size)):
            with reading_line(path, number + 1, f"remove {path}, and the same command goes on"):
                entry: RowEntry = json.loads(lines[number])
                if number >= size or (entry["dataset"], entry["row"]) != (part.dataset, part.first + number):
                    raise KeyError(f"row {entry['row']!r} of {entry['dataset']!r} is not one of this part")
                dropped = None if entry["keep"] is True else entry["stage"]
                texts, scores = (entry["id"], entry["source"], entry.get("reason", "")), entry["scores"].values()
                if dropped not in (None, *names) or not all(isinstance(text, str) for text in texts) or sum(scores) is None:
                    raise KeyError(f"stage {dropped!r} or a name of another type")
            yield entry

    def _write(self, part: RowPart, entries: list[RowEntry], signatures: list[tuple[int, bytes]]) -> None:
        """Write the files of the part; what says that it is done comes last."""
        files = part_outputs(self.checker, entries) if self.last else {}
        if self.compared is not None:
            files[f"{self.compared}.npz"] = _packed(signatures)
        if not self.last:
            files[str(self.number)] = b"".join(map(json_line, entries))
        with NewFiles(self.folder, [self._path(part, suffix).name for suffix in files]) as new:
            for suffix, data in files.items():
                new.write(self._path(part, suffix).name, data)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{path}: is damaged ({error}); remove it, and the same command goes on") from None


def _packed(signatures: Sequence[tuple[int, bytes]]) -> bytes:
    """The file of the signatures of a part: rows, ends of their signatures, and these."""
    with io.BytesIO() as file:
        rows = np.array([row for row, _ in signatures], dtype=np.int64)
        ends = np.cumsum(np.array([len(each) for _, each in signatures], dtype=np.int64))
        np.savez(file, rows=rows, ends=ends, data=np.frombuffer(bytearray().join(each for _, each in signatures), np.uint8))
        return file.getvalue()
