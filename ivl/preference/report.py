"""Reports a set of pairs, for a look before training: yields, lengths, length bias, samples."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from ivl.preference.pairs import Tally, read_pairs, why_none
from ivl.utils import html as pages
from ivl.utils.files import write_atomic, write_json

SIDES = (("chosen", "good"), ("rejected", "bad"))
NUM_SAMPLES = 24
"""Pairs shown."""
ABOUT = (
    "Every question was answered several times, and each reply was checked against the known answer. A right reply (chosen) "
    "and a wrong one (rejected) make a pair. MPO makes the chosen reply more likely than the rejected one, by more than the "
    "model it starts from does, and learns to write it. Where chosen replies are mostly longer, or shorter, it learns that too."
)


def write_report(out: Path, tallies: dict[str, Tally], *, seed: int = 0) -> dict[str, Any]:
    """Write out/report.json and out/report.html about the pairs in `out`, and return the content of report.json."""
    pairs = [pair for name in ("pairs", "format_pairs") for pair in read_pairs(out / f"{name}.jsonl")]
    sources = {name: {**vars(tally), "accuracy": tally.accuracy} for name, tally in tallies.items()}
    report: dict[str, Any] = {"sources": sources, "lengths": lengths(pairs)}
    write_json(out / "report.json", report)
    sections = [
        _facts(tallies), f"<p>{ABOUT}</p>",
        "<h2>Yield by source</h2>", pages.table(*_yields(tallies)),
        "<h2>What was not used</h2>", pages.table(*_left_out(tallies), words={"what"}),
    ]  # fmt: skip
    if pairs:
        sections += [
            "<h2>Lengths</h2>", pages.table(*_length_rows(report["lengths"])),
            "<h2>Samples</h2>", _samples(pairs, seed),
        ]  # fmt: skip
    sections.append(pages.next_steps(*_next_steps(tallies)))
    write_atomic(out / "report.html", pages.page("Preference pairs", *sections))
    return report


def _facts(tallies: dict[str, Tally]) -> str:
    all_of = list(tallies.values())
    pairs, replies = sum(tally.pairs.total() for tally in all_of), sum(tally.replies for tally in all_of)
    right = _share(sum(tally.correct for tally in all_of), replies)
    return pages.facts(pairs=f"{pairs:,}", replies=f"{replies:,}", of_them_right=right)


def _next_steps(tallies: dict[str, Tally]) -> list[tuple[str, str]]:
    """What to do with the pairs, in the folder of the page; where a source gave none, why and what helps."""
    none = [(f"{name} gave no pairs: {why_none(tally)}.", "") for name, tally in tallies.items() if not tally.pairs]
    if len(none) == len(tallies):
        return none
    return [
        *none,
        ("Read the samples: where the rejected reply is as good as the chosen one, the answers or --mode are wrong.", ""),
        ("Train the model that was sampled, in this folder:", "ivl train mpo --model MODEL --data meta.json"),
    ]


def lengths(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, by kind of pair, the words of chosen and rejected replies and how often the chosen one is longer."""
    by_kind = {}
    for kind in sorted({pair["kind"] for pair in pairs}):
        own = [pair for pair in pairs if pair["kind"] == kind]
        chosen, rejected = (np.array([len(pair[side].split()) for pair in own]) for side in ("chosen", "rejected"))
        by_kind[kind] = {
            "pairs": len(own), "chosen_mean": chosen.mean().item(), "rejected_mean": rejected.mean().item(),
            "chosen_median": float(np.median(chosen)), "rejected_median": float(np.median(rejected)),
            "chosen_longer": (chosen > rejected).mean().item(), "rejected_longer": (rejected > chosen).mean().item(),
        }  # fmt: skip
    return by_kind


def _yields(tallies: dict[str, Tally]) -> tuple[list[str], list[list[str]]]:
    """Return a row for each figure and a column for each source."""
    figures: dict[str, list[str]] = {}
    for t in tallies.values():
        shares = {"replies that are right": t.correct, "wrong": t.wrong, "without a readable answer": t.malformed.total()}
        questions = {"questions with right replies alone": t.all_correct, "with wrong ones alone": t.all_wrong,
                     "with pairs": t.with_pairs}  # fmt: skip
        for name, value in {
            "questions": f"{t.questions:,}",
            "replies": f"{t.replies:,}",
            **{name: _share(count, t.replies) for name, count in shares.items()},
            **{name: _share(count, t.questions) for name, count in questions.items()},
            "pairs": ", ".join(f"{count:,} {kind}" for kind, count in sorted(t.pairs.items())) or "0",
            "answers are compared by mode": t.mode,
            "comparisons of formulas given up at a limit, which count as wrong": f"{t.given_up:,}",
        }.items():
            figures.setdefault(name, []).append(value)
    return ["", *tallies], [[name, *values] for name, values in figures.items()]


def _share(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else "-"


def _left_out(tallies: dict[str, Tally]) -> tuple[list[str], list[list[str]]]:
    rows = [[name, what, f"{n:,}"] for name, t in tallies.items() for what, n in sorted((t.malformed + t.left_out).items())]
    return ["source", "what", "how many"], rows or [["-", "nothing", "0"]]


def _length_rows(by_kind: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["kind", "pairs", "words chosen (mean, median)", "rejected", "chosen longer", "rejected longer"]
    return head, [
        [
            kind, f"{f['pairs']:,}", f"{f['chosen_mean']:.1f}, {f['chosen_median']:.0f}",
            f"{f['rejected_mean']:.1f}, {f['rejected_median']:.0f}", f"{f['chosen_longer']:.1%}", f"{f['rejected_longer']:.1%}",
        ]
        for kind, f in by_kind.items()
    ]  # fmt: skip


def _samples(pairs: list[dict[str, Any]], seed: int) -> str:
    return pages.grid(map(_card, random.Random(seed).sample(pairs, min(NUM_SAMPLES, len(pairs)))))


def _card(pair: dict[str, Any]) -> str:
    images = pair.get("image", [])
    shown = "".join(pages.picture(image) for image in ([images] if isinstance(images, str) else images))
    question = pages.text(pair["question"].replace("<image>", "").strip())
    truth = f" (answer: {pages.text(', '.join(pair['answer_gt']))})" if pair["answer_gt"] else ""
    replies = (f"<span class='{kind}'>{side}</span>{pages.block(pair[side], kind)}" for side, kind in SIDES)
    return pages.card(f"{shown}<br><b>{question}</b>{truth} <i>{pages.text(pair['kind'])}</i><br>", *replies)
