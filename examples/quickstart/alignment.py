"""The preference chain on nano: careless supervised data, replies sampled and checked, pairs, Mixed Preference Optimization.

The quickstart runs it once; studies/claims/preference.py compares it with other ways.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.quickstart.compositions import careless, compositions, training_row
from ivl.evaluation.tasks.easy_vqa import Split
from ivl.types import SamplingParams
from ivl.utils.progress import reporting

CARELESS = 0.45
"""Share of the supervised rows that carry the mistake. The model learns the mistake nearly as well as the answer; checking its
own replies against right answers tells the two apart."""
ROWS_PER_STEP = 64
"""Rows that the packs of a step of nano-reason hold, at most: no row comes twice."""
SAMPLED = SamplingParams(temperature=0.7, top_p=0.95, max_new_tokens=64)
GREEDY = SamplingParams(max_new_tokens=64)
ASKED = ("id", "image", "question", "answer")


def write_reasoning(path: Path, num_steps: int) -> Path:
    """Write supervised rows for so many steps."""
    rows = compositions("train", ROWS_PER_STEP * num_steps, seed=1, prefix="sft")
    return write_rows(path, map(training_row, careless(rows, CARELESS, seed=1)))


def write_pairs(model: Path, out: Path, *, questions: int, replies: int) -> Path:
    """Ask fresh questions several times and write pairs of the replies to out/pairs; returns the journal of replies.

    An interrupted call goes on where it stopped.

    Args:
        model: directory of the model that replies.
        out: where the files go.
        questions: number of questions.
        replies: replies to each question.
    """
    from ivl.api import load
    from ivl.preference.questions import load_sources
    from ivl.preference.sampling import SamplingConfig, sample

    rows = compositions("train", questions, seed=2, prefix="fresh")
    path = write_rows(out / "fresh.jsonl", ({key: row[key] for key in ASKED} for row in rows))
    sources = load_sources(path, style="final_answer", instruct=False)
    config = SamplingConfig(num_replies=replies, params=SAMPLED, chunk=16)
    with reporting("sampling", "questions") as show:
        journal = sample(
            load(model).engine, sources, out / "replies.jsonl", model=str(model), config=config,
            on_progress=lambda done, resumed: show(done, questions, resumed=resumed),
        )  # fmt: skip
    pair_up(journal, out / "pairs")
    return journal


def pair_up(journal: Path, out: Path) -> None:
    """Write pairs of the replies, and their report."""
    from ivl.preference.pairs import PairsConfig, build_pairs
    from ivl.preference.report import write_report

    write_report(out, build_pairs(journal, out, PairsConfig(limit=4)))


def held_out(model: Path, count: int, folder: Path, *, seed: int = 9, split: Split = "test") -> dict[str, Any]:
    """Measure greedy accuracy on questions about pictures of a split, drawn by the seed.

    Returns also the shares of malformed replies, of replies that run into the limit, and of replies whose reasoning is right.
    """
    from ivl.api import load
    from ivl.preference.pairs import grade
    from ivl.preference.questions import QuestionSource, read_questions

    rows = compositions(split, count, seed=seed, prefix=split)
    path = write_rows(folder / f"{split}.jsonl", ({key: row[key] for key in ASKED} for row in rows))
    source = QuestionSource(name=split, questions=str(path), instruct=False)
    questions = list(read_questions((source,)))
    replies = load(model).generate([question.conversation() for question in questions], GREEDY, progress=True)
    grades = [grade(r.text, r.finish_reason, q.answers, source) for r, q in zip(replies, questions, strict=True)]
    shares = {
        "accuracy": [g.correct is True for g in grades],
        "malformed": [g.correct is None for g in grades],
        "endless": [r.finish_reason == "length" for r in replies],
        "reasoning": [r.text.startswith(f"{row['reasoning']}\n") for r, row in zip(replies, rows, strict=True)],
    }
    return {name: sum(hits) / len(hits) for name, hits in shares.items()} | {"n": count}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON lines; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
