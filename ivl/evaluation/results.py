"""The files of a run: predictions, saved as they come, and the scores by question beside them; two runs compared."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ivl.errors import InputError, short
from ivl.evaluation.figures import Figure, Ratio
from ivl.evaluation.task import Scored
from ivl.evaluation.voting import Candidate
from ivl.utils.files import regular, write_atomic
from ivl.utils.jsonl import AppendLog, json_line, reading_line
from ivl.utils.strict_json import from_json

PREDICTIONS, SCORES = "predictions 2", "scores 1"
"""The first value of every file; a file of predictions without it is never changed."""
OPTIONAL = frozenset(("samples", "read", "cluster"))
"""Keys that are left out of a line where they hold nothing."""
REMEDY = "--fresh forgets them, --predictions names another file"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One line of a predictions file."""

    id: str
    asked: str
    """Hash of the question and of its answers."""
    group: str
    answers: tuple[str, ...]
    prediction: str
    """The reply that counts."""
    score: float
    samples: tuple[Candidate, ...] = ()
    """All replies, where the method notes more than the text of one."""
    read: str = ""
    """What the extractor read in the answer."""
    cluster: str = ""


def beside(predictions: Path, kind: str) -> Path:
    """Return the path of another file of the same run, such as `NAME.scores.jsonl`."""
    return predictions.with_name(predictions.name.removesuffix(".jsonl").removesuffix(".predictions") + f".{kind}")


class PredictionsFile:
    """A file of predictions that belongs to one process at a time, and that a later run continues.

    Args:
        about: What the predictions depend on; objects may be nested.
        fresh: Forget what the file holds.

    Raises:
        InputError: if another process writes the file, it is no predictions file, or it holds predictions of something else.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, fresh: bool = False) -> None:
        self.saved: list[Prediction] = []
        header = {"ivl": PREDICTIONS, **about}

        def take(number: int, row: dict[str, Any]) -> bool:
            if number == 1:
                _check_header(path, row, header, fresh=fresh)
            else:
                self.saved.append(from_json(Prediction, row, f"{path}:{number}"))
            return not fresh

        self._log = AppendLog(path)
        if not self._log.resume(f'{{"ivl": "{PREDICTIONS}"'.encode(), take, REMEDY):
            self._log.append([header])
            self._log.sync()

    def append(self, predictions: list[Prediction]) -> None:
        """Save predictions; they are on disk when this returns."""
        rows = (asdict(prediction) for prediction in predictions)
        self._log.append({key: value for key, value in row.items() if key not in OPTIONAL or value} for row in rows)
        self._log.sync()

    def __enter__(self) -> PredictionsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()


def _check_header(path: Path, row: dict[str, Any], header: dict[str, Any], *, fresh: bool) -> None:
    if row.get("ivl") != PREDICTIONS:
        raise InputError(f"{path}: is no file of predictions, or one of an older ivl; name another with --predictions")
    saved, expected = dict(_flat(row)), dict(_flat(header))
    for key in {**expected, **saved}:
        if not fresh and saved.get(key) != expected.get(key):
            values = f"{short(saved.get(key))}, this run has {short(expected.get(key))}"
            raise InputError(f"{path}: holds predictions with {key} {values}; {REMEDY}")


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested objects with their keys, as `params.temperature`."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, list(inner) if isinstance(inner, tuple) else inner


@dataclass(frozen=True)
class ScoredRun:
    """What a file of scores holds."""

    path: Path
    task: str
    metric: str  # ? in files of an older ivl
    model: str
    headline: Figure
    rows: dict[str, dict[str, Any]]


def check_scores(path: Path) -> None:
    """Refuse a file in the place of scores that holds something else."""
    begins = held = b'{"ivl": "scores'
    try:
        if os.path.lexists(path) and regular(path).st_size:
            with path.open("rb") as file:
                held = file.read(len(begins))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    if held != begins:
        raise InputError(f"{path}: exists and is no file of scores; name another --out or --predictions")


def write_scores(
    path: Path, about: dict[str, str], headline: Figure, scored: Sequence[Scored], predictions: Sequence[Prediction]
) -> None:
    """Write a line that says what was scored, with the headline's sums by cluster, and a line for each question."""
    terms = [[weight, [[cluster, *pair] for cluster, pair in part.sums.items()]] for weight, part in headline.terms]
    rows = [{"ivl": SCORES, **about, "n": headline.n, "points": headline.points, "headline": terms}]
    rows += [
        {
            "id": s.example.id, "cluster": s.cluster, "group": s.example.group, "value": s.score.value,
            "undecided": s.score.undecided is not None, "read": s.score.answer, **dict(s.score.numbers),
            "answers": s.example.answers, "reply": prediction.prediction,
        }
        for s, prediction in zip(scored, predictions, strict=True)
    ]  # fmt: skip
    write_atomic(path, b"".join(map(json_line, rows)).decode())


def read_scores(path: Path) -> ScoredRun:
    """Read a file of scores, named by itself, by the predictions or by the report that it lies beside.

    Raises:
        InputError: if there is none, or it is damaged.
    """
    if not path.name.endswith(".scores.jsonl"):
        path = beside(path.with_suffix("") if path.suffix == ".json" else path, "scores.jsonl")
    try:
        regular(path)
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); `ivl eval` writes it when a run is complete") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        with reading_line(path, number, "run ivl eval again, which writes the file anew from its predictions"):
            row = dict(json.loads(line))
            if number > 1:
                row |= {"id": str(row["id"]), "cluster": str(row["cluster"]), "value": float(row["value"])}
                row["answers"] = list(row["answers"])
            rows.append(row)
    with reading_line(path, 1, "name a file of scores, or the predictions or the report beside it"):
        first, *rest = rows
        if first["ivl"] != SCORES:
            raise ValueError(first["ivl"])
        terms = tuple(
            (float(w), Ratio({str(name): (float(top), float(bottom)) for name, top, bottom in sums}))
            for w, sums in first["headline"]
        )
        figure, by_id = Figure(terms, int(first["n"]), first["points"]), {row["id"]: row for row in rest}
        return ScoredRun(path, first["task"], first.get("metric", "?"), first["model"], figure, by_id)


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Compare two runs of a task on the questions that both have.

    Returns:
        The mean score of a question in each and their difference with its interval, which draws questions with both their
        replies; the same for the headline, if both runs asked the same questions; and McNemar's exact test of the questions
        that one run alone has right.

    Raises:
        InputError: if a file cannot be read, the tasks or the metrics differ, or no question is common.
    """
    a, b = read_scores(first), read_scores(second)
    if a.task != b.task or ("?" not in (a.metric, b.metric) and a.metric != b.metric):
        raise InputError(f"{a.path} is of {a.task} by {a.metric}, {b.path} of {b.task} by {b.metric}; compare runs of one kind")
    common = [name for name in a.rows if name in b.rows and a.rows[name]["answers"] == b.rows[name]["answers"]]
    if not common:
        raise InputError(f"{a.path} and {b.path} have no question in common")
    pairs = [(a.rows[name]["cluster"], a.rows[name]["value"], b.rows[name]["value"]) for name in common]
    sums: dict[str, tuple[float, float]] = {}
    for cluster, left, right in pairs:
        top, bottom = sums.get(cluster, (0.0, 0.0))
        sums[cluster] = top + right - left, bottom + 1
    only = [sum(x == 1 and y != 1 for _, x, y in pairs), sum(y == 1 and x != 1 for _, x, y in pairs)]
    result = {
        "task": a.task, "n": len(common), "left_out": len(a.rows) + len(b.rows) - 2 * len(common),
        "models": [a.model, b.model], "means": [math.fsum(pair[side] for pair in pairs) / len(pairs) for side in (1, 2)],
        **_difference(Figure(((1.0, Ratio(sums)),), len(common))), "only_right": only, "mcnemar_p": mcnemar(*only),
    }  # fmt: skip
    if not result["left_out"]:
        terms = (*b.headline.terms, *((-weight, part) for weight, part in a.headline.terms))
        values = {"values": [a.headline.value, b.headline.value], "points": a.headline.points}
        result["headline"] = values | _difference(Figure(terms, len(common)))
    return result


def _difference(figure: Figure) -> dict[str, Any]:
    return {"difference": figure.value, "ci95": list(figure.interval())}


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided probability of so unequal a split of the questions that one run alone has right."""
    total = only_first + only_second
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)
