"""The report of a filter run: figures as JSON, and the same on one page with histograms and examples, for a review."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ivl.data.records import media_of
from ivl.errors import InputError
from ivl.filters.chain import UNREADABLE, FilterStage
from ivl.filters.rows import RowChecker, RowEntry
from ivl.processing.image import load_image
from ivl.types import ImageRef, Record, Text
from ivl.utils import html

PER_REASON, EXAMPLES = 4, 12
"""Dropped rows shown for each of the commonest reasons; reasons shown, and kept rows that a stage nearly dropped."""
NEAR = 0.5
"""A kept score farther from the limit than this share of the limit is not near it."""
THUMB, MAX_IMAGES = 160, 3
SHOWN, MAX_SHOWN = 500, 4_000
"""Characters of a turn that are shown, and that can be unfolded."""
STYLE = """
h3 { font-size: 1rem; margin-bottom: .3rem }
.row { border: 1px solid #ddd; border-radius: .3rem; padding: .5rem .8rem; margin: .5rem 0; overflow-wrap: anywhere }
.why { color: #b00020; font-weight: 600 } .near { color: #8a6100; font-weight: 600 } .where { color: #777; font-size: .85rem }
.turn { white-space: pre-wrap; margin: .25rem 0 } .turn b { color: #555; font-weight: 600 } .row img { margin: .2rem .4rem 0 0 }
"""


@dataclass
class StageFigures:
    """The figures of one stage."""

    reached: int = 0
    dropped: int = 0
    exempt: int = 0
    unjudged: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    kept_scores: Counter[float] = field(default_factory=Counter)
    dropped_scores: Counter[float] = field(default_factory=Counter)
    examples: dict[str, list[tuple[float, int, RowEntry]]] = field(default_factory=dict)
    """A few random rows by reason; the empty reason has the kept rows whose score lies closest to the limit."""

    def keep(self, reason: str, few: int, *example: Any) -> None:
        """Keep the few examples of the least worth; of equals, those of the least random number."""
        examples = self.examples.setdefault(reason, [])
        bisect.insort(examples, example, key=lambda each: each[:2])
        del examples[few:]


class FilterReport:
    """Counts the entries of a journal, and shows them."""

    def __init__(self, checker: RowChecker) -> None:
        self.checker, self.chain = checker, checker.chain
        self.datasets = {name: {"rows": 0, "kept": 0, "dropped": Counter()} for name in checker.specs}
        self.stages = {name: StageFigures() for name in [UNREADABLE, *(stage.name for stage in self.chain.stages)]}

    def count(self, entry: RowEntry) -> None:
        place = f"{entry['dataset']}\n{entry['source']}".encode("utf-8", "replace")
        lot = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest())
        dataset = self.datasets[entry["dataset"]]
        dataset["rows"] += 1
        dataset["kept"] += entry["keep"]
        self.stages[UNREADABLE].reached += 1
        for stage in self.chain.stages if entry.get("stage") != UNREADABLE else ():
            figures, dropped, score = self.stages[stage.name], entry.get("stage") == stage.name, entry["scores"].get(stage.name)
            if stage.exempts(entry["dataset"]):
                figures.exempt += 1
                continue
            figures.reached += 1
            figures.unjudged += stage.name in entry.get("unjudged", ())
            if score is not None:
                (figures.dropped_scores if dropped else figures.kept_scores)[float(f"{score:.3g}")] += 1
                if entry["keep"] and stage.limit and abs(score - stage.limit) <= NEAR * stage.limit:
                    figures.keep("", EXAMPLES, abs(score - stage.limit), lot, entry)
            if dropped:
                break
        if not entry["keep"]:
            figures, reason = self.stages[entry["stage"]], entry["reason"]
            dataset["dropped"][entry["stage"]] += 1
            figures.dropped += 1
            figures.reasons[reason] += 1
            figures.keep(reason, PER_REASON, 0, lot, entry)

    def figures(self, judge: str | None) -> dict[str, Any]:
        """Return the content of report.json."""
        return {
            "rows": sum(each["rows"] for each in self.datasets.values()),
            "kept": sum(each["kept"] for each in self.datasets.values()),
            "judge": judge,
            "datasets": self.datasets,
            "stages": [self._stage_figures(UNREADABLE, None), *(self._stage_figures(s.name, s) for s in self.chain.stages)],
            "chain": self.chain.spelled_out(),
        }

    def _stage_figures(self, name: str, stage: FilterStage | None) -> dict[str, Any]:
        counted = self.stages[name]
        figures = {"name": name, "use": stage and stage.use, "limit": stage and stage.limit}
        figures |= {key: getattr(counted, key) for key in ("reached", "dropped", "exempt", "unjudged")}
        figures["reasons"] = dict(sorted(counted.reasons.items(), key=lambda item: (-item[1], item[0])))
        if stage and (counted.kept_scores or counted.dropped_scores):
            edges = _edges([*counted.kept_scores, *counted.dropped_scores], judged=stage.judged)
            sides = {"kept": counted.kept_scores, "dropped": counted.dropped_scores}
            counts = {side: np.histogram(list(s), edges, weights=list(s.values()))[0] for side, s in sides.items()}
            figures["histogram"] = {"edges": edges.tolist()} | {k: v.astype(int).tolist() for k, v in counts.items()}
        return figures

    def page(self, figures: dict[str, Any]) -> str:
        """Return report.html for the content of report.json."""
        stages, kept, rows = figures["stages"], figures["kept"], figures["rows"]
        judge = f" Judge: {html.text(figures['judge'])}." if figures["judge"] else ""
        about = html.text(figures["chain"]["about"])
        stage_rows = [
            [s["name"], s["reached"], s["dropped"], _share(s["dropped"], s["reached"]), s["exempt"], s["unjudged"], _reasons(s)]
            for s in stages
        ]
        dataset_rows = [
            [name, d["rows"], d["kept"], _share(d["kept"], d["rows"]), *(d["dropped"][s["name"]] for s in stages)]
            for name, d in figures["datasets"].items()
        ]
        return html.page(
            "Filtered data",
            f"<p><b>{kept:,}</b> of {rows:,} rows kept ({_share(kept, rows)}). {about}{judge}</p><h2>Stages</h2>",
            _table(["stage", "rows", "dropped", "share", "exempt", "unjudged", "reasons"], stage_rows),
            "<h2>Data sets</h2>",
            _table(["data set", "rows", "kept", "share", *(stage["name"] for stage in stages)], dataset_rows),
            *(self._section(stage) for stage in stages if stage["dropped"] or "histogram" in stage),
            f"<h2>Configuration</h2><pre>{html.text(json.dumps(figures['chain'], indent=2, ensure_ascii=False))}</pre>",
            style=STYLE,
        )

    def _section(self, figures: dict[str, Any]) -> str:
        name, examples = figures["name"], self.stages[figures["name"]].examples
        text = f"<h2>{html.text(name)}</h2>" + (_plot(figures) if "histogram" in figures else "")
        for reason in [*list(figures["reasons"])[:EXAMPLES], ""]:
            if reason in examples:
                head = f"Dropped: {reason}" if reason else f"Kept, but closest to the limit of {figures['limit']:g}"
                text += f"<h3>{html.text(head)}</h3>" + "".join(self._example(entry, name) for *_, entry in examples[reason])
        return text

    def _example(self, entry: RowEntry, stage: str) -> str:
        score = entry["scores"].get(stage)
        why = entry.get("reason", "") + (f" score {score:.3g}" if score is not None else "")
        twin = f"; duplicate of {entry['duplicate_of']}" if "duplicate_of" in entry else ""
        where = html.text(f"{entry['source']}, id {entry['id']}{twin}")
        style = "near" if entry["keep"] else "why"
        try:
            body = _record(self.checker.record(entry))
        except InputError as error:
            body = _turn("problem", str(error))
        return f"<div class='row'><span class='{style}'>{html.text(why)}</span><div class='where'>{where}</div>{body}</div>"


def _edges(scores: list[float], *, judged: bool) -> np.ndarray:
    """Return the edges of a histogram: a bin for each score of a judge, bins of equal ratio where scores are far apart."""
    low, high = min(scores), max(scores)
    if judged:
        edges = np.arange(-0.5, 11)
    elif low >= 0 and high > 100:
        edges = np.expm1(np.linspace(np.log1p(low), np.log1p(high) + 1e-9, 41))
    else:
        edges = np.linspace(low, high if high > low else low + 1, 41)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # the logarithm rounds
    return edges


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "0%"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    return html.table(head, [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows])


def _reasons(stage: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in list(stage["reasons"].items())[:8])


def _record(record: Record) -> str:
    messages = [message for conversation in record.conversations for message in conversation]
    images = [ref for ref in media_of(record) if isinstance(ref, ImageRef)]
    text = "".join(map(_thumbnail, images[:MAX_IMAGES]))
    text += f" and {len(images) - MAX_IMAGES} more images" if len(images) > MAX_IMAGES else ""
    for message in messages:
        text += _turn(message.role, "".join(part.text if isinstance(part, Text) else "[media]" for part in message.content))
    return text


def _turn(role: str, text: str) -> str:
    more = f" ... {len(text) - MAX_SHOWN:,} more characters" if len(text) > MAX_SHOWN else ""
    rest = text[SHOWN:MAX_SHOWN]
    fold = f"<details><summary>more</summary>{html.text(rest)}{more}</details>" if rest else ""
    return f"<div class='turn'><b>{html.text(role)}:</b> {html.text(text[:SHOWN])}{fold}</div>"


def _thumbnail(ref: ImageRef) -> str:
    try:
        return html.picture(load_image(ref), size=THUMB)
    except InputError as error:
        return _turn("image", str(error))


def _plot(figures: dict[str, Any]) -> str:
    """Draw dropped scores above kept ones, and the limit."""
    edges, kept, dropped = (np.array(figures["histogram"][key]) for key in ("edges", "kept", "dropped"))
    figure, axis = html.pyplot().subplots(figsize=(8, 2.6), layout="constrained")
    width = np.diff(edges)
    axis.bar(edges[:-1], kept, width, align="edge", color="#9ecae1", label=f"passed {kept.sum():,}")
    axis.bar(edges[:-1], dropped, width, bottom=kept, align="edge", color="#d62728", label=f"dropped {dropped.sum():,}")
    if figures["limit"] is not None:
        axis.axvline(figures["limit"], color="#222", linestyle="--", linewidth=1, label=f"limit {figures['limit']:g}")
    axis.set_yscale("symlog", linthresh=10)
    axis.set_ylim(0, 2 * (kept + dropped).max())
    if edges[0] >= 0 and edges[-1] > 100:
        axis.set_xscale("symlog", linthresh=1)
    axis.set(xlabel="score", ylabel="rows")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return html.plot(figure, f"scores of {figures['name']}")
