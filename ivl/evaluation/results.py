"""The scores of a run by question, beside its predictions, and the comparison of two runs on the same questions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.evaluation.figures import Figure, Ratio
from ivl.evaluation.predictions import Prediction, beside
from ivl.evaluation.task import Scored
from ivl.utils.files import write_atomic
from ivl.utils.jsonl import json_line, reading_line

FORMAT = "scores 1"


@dataclass(frozen=True)
class ScoredRun:
    """What a file of scores holds."""

    path: Path
    task: str
    model: str
    headline: Figure
    rows: dict[str, dict[str, Any]]


def write_scores(
    path: Path, about: dict[str, str], headline: Figure, scored: Sequence[Scored], predictions: Sequence[Prediction]
) -> None:
    """Write a line that says what was scored, with the headline's sums by cluster, and a line for each question."""
    terms = [[weight, [[cluster, *pair] for cluster, pair in part.sums.items()]] for weight, part in headline.terms]
    rows = [{"ivl": FORMAT, **about, "n": headline.n, "points": headline.points, "headline": terms}]
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
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); `ivl eval` writes it when a run is complete") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        with reading_line(path, number, "run ivl eval again, which writes the file anew from its predictions"):
            rows.append(dict(json.loads(line)))
    with reading_line(path, 1, "name a file of scores, or the predictions or the report beside it"):
        first, *rest = rows
        if first["ivl"] != FORMAT:
            raise ValueError(first["ivl"])
        terms = tuple((w, Ratio({name: (top, bottom) for name, top, bottom in sums})) for w, sums in first["headline"])
        figure = Figure(terms, first["n"], first["points"])
        return ScoredRun(path, first["task"], first["model"], figure, {row["id"]: row for row in rest})


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Compare two runs of a task on the questions that both have.

    Returns:
        The mean score of a question in each and their difference with its interval, which draws questions with both their
        replies; the same for the headline, if both runs asked the same questions; and McNemar's exact test of the questions
        that one run alone has right.

    Raises:
        InputError: if a file cannot be read, the tasks differ or no question is common.
    """
    a, b = read_scores(first), read_scores(second)
    common = [name for name in a.rows if name in b.rows and a.rows[name]["answers"] == b.rows[name]["answers"]]
    if a.task != b.task or not common:
        raise InputError(f"{a.path} ({a.task}) and {b.path} ({b.task}) have no question in common")
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
