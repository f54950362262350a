"""Grades replies and pairs them: correct against wrong, well formed against not, with images against without.

The rules are those of MPO's data pipeline (arXiv:2411.10442).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ivl.errors import InputError
from ivl.evaluation.scoring import compare, extract, fix_answer
from ivl.preference.questions import QuestionSource
from ivl.utils.files import write_json
from ivl.utils.jsonl import AppendLog, json_line, read_journal
from ivl.utils.strict_json import from_json

PairKind = Literal["correctness", "format", "dropout"]
MAX_PAIRS, MAX_PAIRS_HUGE, HUGE = 15, 3, 500_000
"""Most pairs of one question, and of one question among more than HUGE (arXiv:2411.10442, section 3)."""


@dataclass(frozen=True)
class Grade:
    """A reply with its answer.

    The text of a right reply has the answer in the form of the known one where it contained that.
    """

    text: str
    answer: str | None
    correct: bool | None
    """None where there is no answer to compare; `problem` then says why."""
    problem: str = ""
    """Why there is no answer, or which comparison of formulas was stopped and counts as different."""


def grade(text: str, finish_reason: str, answers: Sequence[str], source: QuestionSource) -> Grade:
    """Grade one reply by the accepted answers."""
    if finish_reason == "length":
        return Grade(text, None, None, "cut off at the limit")
    extracted = extract(text, source.style)
    if extracted.answer is None:
        return Grade(text, None, None, extracted.problem or "no answer")
    verdict = compare(extracted.answer, answers, mode=source.mode)
    fix = verdict.correct and source.style != "direct"
    fixed = fix_answer(text, extracted.answer, answers[0]) if fix else text
    return Grade(fixed, extracted.answer, verdict.correct, verdict.stopped)


@dataclass
class Tally:
    """Counts what became of the replies of one source."""

    mode: str = "auto"
    """How answers were compared."""
    questions: int = 0
    replies: int = 0
    correct: int = 0
    wrong: int = 0
    malformed: Counter[str] = field(default_factory=Counter)
    """Replies without an answer to compare, by problem."""
    given_up: int = 0
    """Comparisons of formulas that met a limit and count as different."""
    all_correct: int = 0
    all_wrong: int = 0
    with_pairs: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    """Pairs by kind."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Possible pairs and replies that were not used, by reason."""

    @property
    def accuracy(self) -> float:
        """Share of correct replies."""
        return self.correct / self.replies if self.replies else 0.0


def correctness_pairs(
    row: dict[str, Any], grades: list[Grade], tally: Tally, *, limit: int = MAX_PAIRS, seed: int = 0
) -> list[dict[str, Any]]:
    """Make the rows that MPO trains on, from the replies to one question: every correct one with every wrong one, and
    with every malformed one.

    A pair is left out where the right answer is part of the wrong one.

    Args:
        limit: Most pairs of each kind, drawn by a seed of the question's own.
    """
    right = [g for g in grades if g.correct]
    wrong = [g for g in grades if g.correct is False]
    malformed = [g for g in grades if g.correct is None]
    pairs: list[dict[str, Any]] = []
    for kind, losers in (("correctness", wrong), ("format", malformed)):
        possible: dict[tuple[str, str], None] = {}
        for winner, loser in product(right, losers):
            if kind == "correctness" and _within(winner.answer, loser.answer):
                tally.left_out["right answer within the wrong one"] += 1
            elif winner.text == loser.text or (winner.text, loser.text) in possible:
                tally.left_out["repeated"] += 1
            else:
                possible[winner.text, loser.text] = None
        chosen = list(possible)
        if len(chosen) > limit:
            tally.left_out["over the limit"] += len(chosen) - limit
            chosen = random.Random(f"{seed} {row['id']} {kind}").sample(chosen, limit)
        pairs += [_pair(row, kind, len(pairs) + i, *texts) for i, texts in enumerate(chosen)]  # type: ignore[arg-type]
    return pairs


def _within(right: str | None, wrong: str | None) -> bool:
    return bool(right) and bool(wrong) and right.strip().lower() in wrong.strip().lower()  # type: ignore[union-attr]


def dropout_pair(row: dict[str, Any], tally: Tally) -> list[dict[str, Any]]:
    """Pair the reply with the image with its first words continued without."""
    rejected = join(row["prefix"], row["continuation"])
    if rejected == row["chosen"]:
        tally.left_out["the same without the image"] += 1
        return []
    if row["finish_reason"] == "length":
        tally.left_out["continuation cut off"] += 1
        return []
    return [_pair(row, "dropout", row["index"], row["chosen"], rejected)]


def join(prefix: str, continuation: str) -> str:
    """Join a prefix, which ends with a whole word, and its continuation.

    A continuation that begins with a letter or digit, as decoders that drop a leading space give it, needs a space; Chinese
    and punctuation do not.
    """
    first, last = continuation[:1], prefix[-1:]
    spaced = first.isalnum() and last.isalnum() and max(first, last) < "\u2e80"
    return f"{prefix} {continuation}" if spaced else prefix + continuation


def _pair(row: dict[str, Any], kind: PairKind, index: int, chosen: str, rejected: str) -> dict[str, Any]:
    images = row["images"]
    marks = "" if "<image>" in row["question"] else "<image>\n" * len(images)
    pair = {
        "id": f"{row['id']}/{kind}-{index}", "question": marks + row["question"], "chosen": chosen, "rejected": rejected,
    }  # fmt: skip
    if images:
        pair["image"] = images[0] if len(images) == 1 else images
    return pair | {"answer_gt": row["answers"], "source": row["source"], "kind": kind}


def build_pairs(
    replies: Path,
    out: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Tally]:
    """Grade the replies of a journal and write out/pairs.jsonl, out/format_pairs.jsonl, out/grades.jsonl and out/meta.json.

    A journal of continuations gives out/pairs.jsonl of Dropout-NTP pairs. Files appear whole or not at all, and follow from
    the journal, the limit and the seed alone.

    Args:
        limit: Most pairs of a question and kind; None is 15, or 3 among over 500,000 questions.

    Raises:
        InputError: for a journal that is broken, or whose questions have no answers to compare with.
    """
    about, rows = read_journal(replies)
    sources = {entry["name"]: from_json(QuestionSource, entry, str(replies)) for entry in about["sources"]}
    total = sum(1 for _ in read_journal(replies)[1])
    if limit is None:
        limit = MAX_PAIRS_HUGE if total > HUGE else MAX_PAIRS
    tallies = {name: Tally(mode=source.mode) for name, source in sources.items()}
    with _Files(out, ("pairs.jsonl", "format_pairs.jsonl", "grades.jsonl")) as files:
        for done, (number, row) in enumerate(rows, 1):
            tally = tallies[row["source"]]
            tally.questions += 1
            if about["kind"] == "dropout":
                tally.replies += 1
                pairs = dropout_pair(row, tally)
            else:
                grades = _grades(row, sources[row["source"]], tally, f"{replies}:{number}")
                pairs = correctness_pairs(row, grades, tally, limit=limit, seed=seed)
                graded = [{"answer": g.answer, "correct": g.correct, "problem": g.problem} for g in grades]
                files.write("grades.jsonl", {"id": row["id"], "source": row["source"], "grades": graded})
            for pair in pairs:
                files.write("format_pairs.jsonl" if pair["kind"] == "format" else "pairs.jsonl", pair)
                tally.pairs[pair["kind"]] += 1
            tally.with_pairs += bool(pairs)
            on_progress(done, total)
    meta = {
        name.removesuffix(".jsonl"): {"annotation": name, "root": "", "data_augment": False}
        for name in ("pairs.jsonl", "format_pairs.jsonl")
        if files.count[name]
    }
    write_json(out / "meta.json", meta)
    return tallies


def _grades(row: dict[str, Any], source: QuestionSource, tally: Tally, where: str) -> list[Grade]:
    """Grade the replies to a question and count them."""
    if not row["answers"]:
        raise InputError(
            f"{where}: question {row['id']!r} has no answer to check replies with; use `ivl prefer dropout` for it"
        )
    grades = [grade(r["text"], r["finish_reason"], row["answers"], source) for r in row["replies"]]
    tally.given_up += sum(bool(g.problem) for g in grades if g.correct is False)
    tally.replies += len(grades)
    tally.correct += sum(g.correct is True for g in grades)
    tally.wrong += sum(g.correct is False for g in grades)
    tally.malformed.update(g.problem for g in grades if g.correct is None and g.problem)
    tally.all_correct += all(g.correct for g in grades)
    tally.all_wrong += not any(g.correct for g in grades)
    return grades


class _Files:
    """Several jsonl files of one directory that appear together when all are complete; empty ones do not appear."""

    def __init__(self, out: Path, names: tuple[str, ...]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.count: Counter[str] = Counter()
        self._out, self._logs = out, {name: AppendLog(out / f".{name}.new", keep=0) for name in names}

    def __enter__(self) -> _Files:
        return self

    def write(self, name: str, row: dict[str, Any]) -> None:
        self._logs[name].append_bytes(json_line(row))
        self.count[name] += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for log in self._logs.values():
            log.sync()
            log.close()
        for name, log in self._logs.items():
            if kind is None and self.count[name]:
                log.path.replace(self._out / name)
                continue
            log.path.unlink()
            if kind is None:
                (self._out / name).unlink(missing_ok=True)


def read_pairs(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pairs file; none if there is no such file, for then there were no pairs."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
