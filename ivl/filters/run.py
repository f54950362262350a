"""A chain over a mixture: kept rows, dropped rows with reasons, a verdict for every row, and a report.

The folder that comes out:

    meta.json, kept/*.jsonl   trains as it is; jsonl rows byte for byte as they were
    dropped.jsonl             every dropped row whole, with stage, reason and score
    verdicts.jsonl            a line for every row, with the score of every stage it reached
    report.html, report.json  to look at before training
    judge.sqlite              what the judge said (a cache, unless the caller gave another)

Outputs only grow. From time to time they are synced, and progress.json then says how long each of them is and which row is
next; a run that was killed cuts them to these lengths and goes on. So the outputs do not depend on where it was killed.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ivl.data.mixture import DatasetSpec, load_mixture
from ivl.data.records import read_record
from ivl.data.rows import from_record
from ivl.errors import DataError, InputError
from ivl.filters.chain import Chain, Index, Outcome, Pointwise
from ivl.filters.folder import Folder, write_atomic
from ivl.filters.judge import Judge
from ivl.filters.parallel import Blocks, Place, outcomes
from ivl.filters.report import UNREADABLE, write_report
from ivl.filters.verdict import Verdict
from ivl.formats.base import Rows

BLOCK = 64
"""Rows computed at a time; with a judge, several for each request in flight."""
TEXT = ("jsonl", "json")
"""Containers whose rows are kept as they are."""


@dataclass(frozen=True)
class Progress:
    done: int
    total: int
    resumed: int
    """Rows that an earlier run had done."""
    kept: int
    """Rows of this run that were kept."""


@dataclass
class _Row:
    """One row on its way through the stages."""

    dataset: int
    row: int
    outcome: Outcome
    scores: dict[str, float] = field(default_factory=dict)
    unjudged: list[str] = field(default_factory=list)
    stage: str = ""
    verdict: Verdict | None = None
    """Of the stage that dropped it."""
    twin: str = ""
    """Source of the earlier row it duplicates."""


def run(
    chain: Chain,
    mixture: str | Path,
    out: str | Path,
    *,
    root: str | None = None,
    format: str | None = None,
    judge: Judge | None = None,
    workers: int = 0,
    ray: str | None = None,
    fresh: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Filter every row of a mixture once, in order, and return what report.json holds.

    The same call goes on where an interrupted run stopped, and returns at once after a complete one. workers, ray: see
    `parallel.outcomes`; fresh: forget an earlier run in `out`, but not what the judge said.

    Raises:
        InputError: if the folder holds a run of other data or settings, a file cannot be read, a stage needs a judge and
            there is none, or the judge fails.
    """
    if chain.needs_judge and judge is None:
        names = ", ".join(stage.name for stage in chain.stages if stage.judged)
        raise InputError(f"the stages {names} need a judge: give a model or an endpoint, or take the filter `heuristic`")
    specs = load_mixture(mixture, root=root, format=format)
    pointwise = Pointwise(chain, specs)
    files = [pointwise.rows(n) for n in range(len(specs))]
    identity = {
        "chain": json.loads(chain.spelled_out()),
        "data": [[s.name, str(Path(s.root).absolute()), len(f), f.num_bytes] for s, f in zip(specs, files, strict=True)],
        "judge": judge.name if judge and chain.needs_judge else None,
    }
    with _writing(out), Folder(Path(out), identity, fresh=fresh) as folder:
        if not folder.complete:
            fold = _Fold(chain, pointwise, specs, folder, judge)
            fold.resume()
            size = max(BLOCK, 4 * judge.threads) if judge and chain.needs_judge else BLOCK
            blocks = Blocks(tuple(map(len, files)), folder.position, size)
            total, first = sum(map(len, files)), folder.position
            on_progress(Progress(first, total, first, 0))
            for places, found in outcomes(pointwise, blocks, workers=workers, ray=ray):
                fold.add(places, found)
                folder.position += len(places)
                folder.sync_sometimes()
                on_progress(Progress(folder.position, total, first, fold.kept))
            folder.sync()
            result = write_report(folder.path, chain, pointwise, judge.name if judge and chain.needs_judge else None)
            _write_meta(folder.path, specs, files, result)
            folder.finish()
        return json.loads((folder.path / "report.json").read_text("utf-8"))


@contextmanager
def _writing(out: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{out}: {error.strerror or error}; the same command goes on from here") from error


class _Fold:
    """The part that sees rows in order: the judge, near-duplicates, and writing."""

    def __init__(
        self, chain: Chain, pointwise: Pointwise, specs: tuple[DatasetSpec, ...], folder: Folder, judge: Judge | None
    ) -> None:
        self.chain, self.pointwise, self.specs, self.folder, self.judge = chain, pointwise, specs, folder, judge
        self.kept = 0
        names = kept_files(specs)
        self.outputs = [f"kept/{name}" for name in names]
        self.indexes: dict[str, Index] = {s.name: s.rule.index() for s in chain.stages if s.deduplicates}

    def resume(self) -> None:
        """Feed the indexes what the earlier run fed them."""
        for n, name in enumerate(self.indexes):
            for key, signature in self.folder.entries(_log_name(n)):
                self.indexes[name].seen(signature, key)

    def add(self, places: list[Place], found: list[Outcome]) -> None:
        rows = [_Row(dataset, row, outcome) for (dataset, row), outcome in zip(places, found, strict=True)]
        alive = []
        for row in rows:
            if row.outcome.problem:
                row.stage, row.verdict = UNREADABLE, Verdict(False, row.outcome.problem[0])
            else:
                alive.append(row)
        for n, stage in enumerate(self.chain.stages):
            here = [row for row in alive if not stage.exempts(self.specs[row.dataset].name)]
            if stage.judged:
                self._judge(n, here)
            else:
                for row in here:
                    result = row.outcome.results[n]
                    self._take(row, n, self._look_up(row, n, result) if isinstance(result, bytes) else result)
            alive = [row for row in alive if row.verdict is None]
        for row in rows:
            self._write(row)

    def _judge(self, n: int, rows: list[_Row]) -> None:
        stage = self.chain.stages[n]
        assert self.judge is not None
        asked = [(self.pointwise.record(r.dataset, r.row), self.chain.domain_of(self.specs[r.dataset].name)) for r in rows]
        for row, verdict in zip(rows, self.judge.verdicts(stage.rule, asked), strict=True):
            self._take(row, n, verdict)

    def _look_up(self, row: _Row, n: int, signature: bytes) -> Verdict:
        name = self.chain.stages[n].name
        key = self._source(row)
        self.folder.log(_log_name(list(self.indexes).index(name)), key, signature)
        row.twin = self.indexes[name].seen(signature, key) or ""
        return Verdict(not row.twin, "near-duplicate" if row.twin else "")

    def _take(self, row: _Row, n: int, verdict: Verdict | bytes | None) -> None:
        assert isinstance(verdict, Verdict)
        name = self.chain.stages[n].name
        if verdict.score is not None:
            row.scores[name] = verdict.score
        elif verdict.reason == "unjudged":
            row.unjudged.append(name)
        if not verdict.keep:
            row.stage, row.verdict = name, verdict

    def _source(self, row: _Row) -> str:
        return self.pointwise.rows(row.dataset).source(row.row)

    def _write(self, row: _Row) -> None:
        rows = self.pointwise.rows(row.dataset)
        head: dict[str, Any] = {
            "id": row.outcome.id, "dataset": self.specs[row.dataset].name, "row": row.row, "source": self._source(row),
        }  # fmt: skip
        why: dict[str, Any] = {}
        if row.verdict:
            why = {"stage": row.stage, "reason": row.verdict.reason, "score": row.verdict.score}
            if row.twin:
                why["duplicate_of"] = row.twin
        extra = {"unjudged": row.unjudged} if row.unjudged else {}
        self.folder.append("verdicts.jsonl", _line(head | {"keep": not why} | why | {"scores": row.scores} | extra))
        if not why:
            self.folder.append(self.outputs[row.dataset], self._kept(rows, row))
            self.kept += 1
            return
        problem = {"problem": row.outcome.problem[1]} if row.outcome.problem else {}
        text = _line(head | why | problem)
        self.folder.append("dropped.jsonl", text[:-2] + b', "row": ' + _dropped(rows, row.row) + b"}\n")

    def _kept(self, rows: Rows, row: _Row) -> bytes:
        """The row as a line: its own bytes if they are one, the same JSON, or else the Record written anew."""
        data = rows.raw(row.row)
        if isinstance(data, bytes) and rows.container in TEXT:
            return data + b"\n" if rows.container == "jsonl" else _line(json.loads(data))
        spec = self.specs[row.dataset]
        record = read_record(rows, row.row, root=Path(spec.root).absolute(), dataset=spec.name)
        try:
            return _line(from_record(record))
        except DataError:  # the reference's rows cannot hold it, such as a question about the word <image>
            return _line(from_record(record, layout="openai"))


def _dropped(rows: Rows, index: int) -> bytes:
    """The row as JSON; a string if it is none, null if even its bytes are out of reach."""
    try:
        data = rows.raw(index)
    except DataError:
        return b"null"
    if not isinstance(data, bytes):
        return json.dumps(data, ensure_ascii=False, default=_plain).encode("utf-8", "backslashreplace")
    try:
        text = data.decode().strip()
        row = json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(data.decode("utf-8", "backslashreplace"), ensure_ascii=False).encode()
    return _line(row)[:-1] if "\n" in text or "\r" in text else text.encode()


def _plain(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else str(value)


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair can be written as an escape only
        return json.dumps(row).encode() + b"\n"


def _log_name(n: int) -> str:
    return f"signatures-{n}.bin"


def kept_files(specs: tuple[DatasetSpec, ...]) -> list[str]:
    """A file name for each data set, close to its name and used once."""
    taken: Counter[str] = Counter()
    names = []
    for spec in specs:
        stem = re.sub(r"[^\w.-]+", "_", spec.name).strip("._")[:100] or "rows"
        taken[stem.casefold()] += 1
        count = taken[stem.casefold()]
        names.append(f"{stem}.jsonl" if count == 1 else f"{stem}~{count}.jsonl")
    return names


def _write_meta(out: Path, specs: tuple[DatasetSpec, ...], files: list[Rows], report: dict[str, Any]) -> None:
    """The mixture again, with the kept rows; a data set that lost all of its rows is left out."""
    meta = {}
    for spec, rows, name in zip(specs, files, kept_files(specs), strict=True):
        kept = report["datasets"][spec.name]["kept"]
        if kept:
            entry: dict[str, Any] = {"root": str(Path(spec.root).absolute()), "annotation": f"kept/{name}"}
            entry |= {"data_augment": spec.data_augment, "repeat_time": spec.repeat_time, "length": kept}
            if spec.max_dynamic_patch is not None:
                entry["max_dynamic_patch"] = spec.max_dynamic_patch
            if rows.container in TEXT and rows.layout is not None:
                entry["format"] = rows.layout
            meta[spec.name] = entry
    write_atomic(out / "meta.json", json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
