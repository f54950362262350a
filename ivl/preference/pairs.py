"""Grades replies and pairs them: correct against wrong, well formed against not, with images against without.

The rules are those of MPO's data pipeline (arXiv:2411.10442).
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ivl.data.records import to_record
from ivl.errors import DataError, InputError
from ivl.evaluation.scoring import AnswerMode, AnswerStyle, compare, extract, fix_answer
from ivl.preference.questions import QuestionSource
from ivl.utils.files import NewFiles, write_json
from ivl.utils.jsonl import Journal, json_line, read_journal, reading_line, whole_text
from ivl.utils.strict_json import from_json
from ivl.utils.unicode import normal_form

FILES = ("pairs.jsonl", "format_pairs.jsonl", "grades.jsonl")
ABOUT = ("meta.json", "report.json", "report.html")
"""Files that are written beside the pairs."""
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

    style: str = "final_answer"
    """Where replies should show their answer."""
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
            elif not winner.text.strip() or not loser.text.strip():
                tally.left_out["empty reply"] += 1
            elif winner.text == loser.text or (winner.text, loser.text) in possible:
                tally.left_out["repeated"] += 1
            else:
                possible[winner.text, loser.text] = None
        chosen = list(possible)
        if len(chosen) > limit:
            tally.left_out["over the limit"] += len(chosen) - limit
            name = f"{seed} {row['id']} {kind}".encode("utf-8", "surrogatepass")
            chosen = random.Random(name).sample(chosen, limit)
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
    """Make a row of training data: image paths are absolute, and a lone surrogate of a text becomes U+FFFD."""
    images = [str(Path(image).absolute()) for image in row["images"]]
    marks = "" if "<image>" in row["question"] else "<image>\n" * len(images)
    texts = {"id": f"{row['id']}/{kind}-{index}", "question": marks + row["question"], "chosen": chosen, "rejected": rejected}
    pair: dict[str, Any] = {key: whole_text(text) for key, text in texts.items()}
    if images:
        pair["image"] = images[0] if len(images) == 1 else images
    answers = [whole_text(answer) for answer in row["answers"]]
    return pair | {"answer_gt": answers, "source": whole_text(row["source"]), "kind": kind}


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Which pairs are made of graded replies."""

    limit: int | None = None
    """Most pairs of a question and kind; by default 15, or 3 where there are more than 500,000 questions."""
    seed: int = 0
    """Chooses among possible pairs."""
    max_chars: int = 32_000
    """Most characters of a question and its two replies, about 8,000 tokens of English; longer pairs are left out."""
    style: AnswerStyle | None = None
    """Where replies show their answer; by default as they were asked to."""
    mode: AnswerMode | None = None
    """How answers are compared; by default as the source says."""


def build_pairs(
    replies: Path,
    out: Path,
    config: PairsConfig | None = None,
    *,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Tally]:
    """Grade the replies of a journal and write out/pairs.jsonl, out/format_pairs.jsonl, out/grades.jsonl and out/meta.json.

    A journal of continuations gives out/pairs.jsonl of Dropout-NTP pairs. Files appear whole or not at all, and follow from
    the journal and the configuration alone. A pair that training would refuse is not written but counted.

    Raises:
        InputError: for a journal that is broken, or whose questions have no answers to compare with; for a folder that holds
            files of something else, or the journal under the name of a file that is written.
    """
    config = config or PairsConfig()
    about, rows = read_journal(replies)
    for place in (out / name for name in (*FILES, *ABOUT)):
        if place.exists() and replies.samefile(place):
            raise InputError(f"{out}: the pairs would replace the journal {replies}; choose another folder")
    with reading_line(replies, 1):
        kind, entries = about["kind"], [from_json(QuestionSource, entry, f"{replies}:1") for entry in about["sources"]]
    changes = {name: value for name in ("style", "mode") if (value := getattr(config, name)) is not None}
    sources = {source.name: replace(source, **changes) for source in entries}
    total = sum(1 for _ in read_journal(replies)[1])
    limit = config.limit if config.limit is not None else MAX_PAIRS_HUGE if total > HUGE else MAX_PAIRS
    tallies = {name: Tally(style=source.style, mode=source.mode) for name, source in sources.items()}
    written: Counter[str] = Counter()
    with claimed(out), NewFiles(out, FILES) as files:
        for done, (number, row) in enumerate(rows, 1):
            with reading_line(replies, number, "sample the question again into another file"):
                tally = tallies[row["source"]]
                tally.questions += 1
                if kind == "dropout":
                    tally.replies += 1
                    pairs = dropout_pair(row, tally)
                else:
                    grades = _grades(row, sources[row["source"]], tally, f"{replies}:{number}")
                    pairs = correctness_pairs(row, grades, tally, limit=limit, seed=config.seed)
                    graded = [{"answer": g.answer, "correct": g.correct, "problem": g.problem} for g in grades]
                    files.write("grades.jsonl", json_line({"id": row["id"], "source": row["source"], "grades": graded}))
                    written["grades.jsonl"] += 1
            for pair in _trainable(pairs, tally, config.max_chars):
                name = "format_pairs.jsonl" if pair["kind"] == "format" else "pairs.jsonl"
                files.write(name, json_line(pair))
                written[name] += 1
                tally.pairs[pair["kind"]] += 1
            on_progress(done, total)
    for name in FILES:
        if not written[name]:
            (out / name).unlink()
    meta = {Path(name).stem: {"annotation": name, "root": "", "data_augment": False} for name in FILES[:2] if written[name]}
    write_json(out / "meta.json", meta)
    return tallies


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold a folder of pairs for this process; one that holds files of something else is refused.

    The journal out/progress.jsonl, which has no chunks, tells whose the folder is.
    """
    marker = out / "progress.jsonl"
    if not os.path.lexists(marker):
        for name in (*FILES, *ABOUT):
            if os.path.lexists(out / name):
                raise InputError(f"{out / name}: was not written by `ivl prefer pairs`; choose another folder")
    with Journal(marker, {"kind": "pairs"}):
        yield


def _trainable(pairs: list[dict[str, Any]], tally: Tally, max_chars: int) -> list[dict[str, Any]]:
    """Leave out and count the pairs that training refuses: asked of the reader of its rows, and of the files of images."""
    kept = []
    for pair in pairs:
        texts = [normal_form("NFC", pair[side]) for side in ("chosen", "rejected")]
        images = [pair["image"]] if isinstance(pair.get("image"), str) else pair.get("image", [])
        reason = ""
        if texts[0] == texts[1]:
            reason = "replies equal but for how letters are encoded"
        elif len(pair["question"]) + sum(map(len, texts)) > max_chars:
            reason = f"more than {max_chars:,} characters"
        elif not all(Path(image).is_file() for image in images):
            reason = "image no longer there"
        try:
            "".join(images).encode()
            to_record(pair, source=pair["id"], root=Path())
        except UnicodeEncodeError:
            reason = "an image whose name is not UTF-8"
        except DataError as error:
            reason = reason or f"training refuses it: {error.problem[:80]}"
        if reason:
            tally.left_out[reason] += 1
        else:
            kept.append(pair)
    tally.with_pairs += bool(kept)
    return kept


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


def why_none(tally: Tally) -> str:
    """Explain in a few words why a source gave no pairs, and what to do about it."""
    malformed = tally.malformed.total()
    if tally.replies and malformed == tally.replies:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.malformed.most_common(3))
        return (
            f"{malformed:,} of {tally.replies:,} replies show no answer in the style {tally.style} ({reasons}); sample again, "
            "with --style direct if the model answers in a few words, or with a larger --max-new-tokens if replies are cut off"
        )
    if tally.replies and not tally.correct:
        return f"no reply is right by the mode {tally.mode}; add another --mode, or sample a stronger model or more replies"
    if tally.correct and tally.correct + malformed == tally.replies and not tally.left_out:
        return "every readable reply is right; sample at a higher temperature, or ask harder questions"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.left_out.most_common(3))
    return f"left out: {reasons}" if reasons else "no question has both right and wrong replies; sample more replies"


def read_pairs(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pairs file; none if there is no such file, for then there were no pairs."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
