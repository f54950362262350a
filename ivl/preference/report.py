"""Reports a set of pairs, for a look before training: yields, lengths, length bias, samples."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from ivl.preference.pairs import Tally, read_pairs
from ivl.utils import html as pages
from ivl.utils.files import write_atomic, write_json

NUM_SAMPLES = 24
"""Pairs shown."""


def write_report(out: Path, tallies: dict[str, Tally], *, seed: int = 0) -> dict[str, Any]:
    """Write out/report.json and out/report.html about the pairs in `out`, and return the content of report.json."""
    pairs = [pair for name in ("pairs", "format_pairs") for pair in read_pairs(out / f"{name}.jsonl")]
    sources = {name: {**vars(tally), "accuracy": tally.accuracy} for name, tally in tallies.items()}
    report: dict[str, Any] = {"sources": sources, "lengths": lengths(pairs)}
    write_json(out / "report.json", report)
    sections = [
        "<h2>Yield by source</h2>", pages.table(*_yields(tallies)),
        "<h2>What was not used</h2>", pages.table(*_left_out(tallies)),
    ]  # fmt: skip
    if pairs:
        sections += [
            "<h2>Lengths</h2>", pages.table(*_length_rows(report["lengths"])),
            "<h2>Samples</h2>", _samples(pairs, seed),
        ]  # fmt: skip
    write_atomic(out / "report.html", pages.page("Preference pairs", *sections))
    return report


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
    head = ["source", "questions", "replies", "correct", "wrong", "malformed", "all right", "all wrong", "with pairs", "pairs",
            "compared by mode", "comparisons of formulas given up at a limit (count as wrong)"]  # fmt: skip
    rows = []
    for name, t in tallies.items():
        pairs = ", ".join(f"{count:,} {kind}" for kind, count in sorted(t.pairs.items())) or "0"
        shares = (t.correct, t.wrong, sum(t.malformed.values()))
        rows.append([
            name, f"{t.questions:,}", f"{t.replies:,}", *(_share(count, t.replies) for count in shares),
            *(_share(count, t.questions) for count in (t.all_correct, t.all_wrong, t.with_pairs)), pairs,
            t.mode, f"{t.given_up:,}",
        ])  # fmt: skip
    return head, rows


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
    chosen = random.Random(seed).sample(pairs, min(NUM_SAMPLES, len(pairs)))
    return f"<div class='grid'>{''.join(map(_card, chosen))}</div>"


def _card(pair: dict[str, Any]) -> str:
    images = pair.get("image", [])
    shown = "".join(pages.picture(image) for image in ([images] if isinstance(images, str) else images))
    question = pages.text(pair["question"].replace("<image>", "").strip())
    truth = f" (answer: {pages.text(', '.join(pair['answer_gt']))})" if pair["answer_gt"] else ""
    return (
        f"<div class='card'>{shown}<br><b>{question}</b>{truth} <i>{pages.text(pair['kind'])}</i>"
        f"<pre class='good'>{pages.text(pair['chosen'])}</pre><pre class='bad'>{pages.text(pair['rejected'])}</pre></div>"
    )
