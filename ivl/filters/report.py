"""The report of a filter run: figures as JSON, and the same on one page with histograms and dropped rows, for a review."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ivl.data.records import media_of
from ivl.errors import InputError
from ivl.filters.chain import UNREADABLE, FilterStage
from ivl.filters.rows import RowChecker, RowEntry
from ivl.filters.text import shown_text
from ivl.processing.image import load_image
from ivl.types import ImageRef, Record
from ivl.utils import html

PER_REASON, MAX_REASONS = 4, 12
"""Dropped rows shown for each of the commonest reasons, and reasons shown."""
MAX_SHOWN = 4_000
"""Characters of a turn that are shown."""
STYLE = "h3 { font-size: 1rem } .card { margin-bottom: 1rem } .card pre { max-height: 12rem; overflow: auto }"


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
    examples: dict[str, list[RowEntry]] = field(default_factory=dict)
    """The first dropped rows by reason."""


class FilterReport:
    """Counts the entries of a journal, and shows them."""

    def __init__(self, checker: RowChecker) -> None:
        self.checker, self.chain = checker, checker.chain
        self.datasets = {name: {"rows": 0, "kept": 0, "dropped": Counter()} for name in checker.specs}
        self.stages = {name: StageFigures() for name in [UNREADABLE, *(stage.name for stage in self.chain.stages)]}

    def count(self, entry: RowEntry) -> None:
        last, dataset = entry.get("stage"), self.datasets[entry["dataset"]]
        dataset["rows"] += 1
        dataset["kept"] += entry["keep"]
        self.stages[UNREADABLE].reached += 1
        for stage in self.chain.stages if last != UNREADABLE else ():
            figures = self.stages[stage.name]
            if stage.exempts(entry["dataset"]):
                figures.exempt += 1
                continue
            figures.reached += 1
            figures.unjudged += stage.name in entry.get("unjudged", ())
            if (score := entry["scores"].get(stage.name)) is not None:
                scores = figures.dropped_scores if stage.name == last else figures.kept_scores
                scores[float(f"{score:.3g}")] += 1
            if stage.name == last:
                break
        if last is not None:
            dataset["dropped"][last] += 1
            figures, reason = self.stages[last], entry["reason"]
            figures.dropped += 1
            figures.reasons[reason] += 1
            if len(examples := figures.examples.setdefault(reason, [])) < PER_REASON:
                examples.append(entry)

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
            # A bin for each score of a judge; the last bin holds every higher score.
            edges = np.arange(-0.5, 11) if stage.judged else np.linspace(0, 2 * (stage.limit or 1), 41)
            figures["histogram"] = {"edges": edges.tolist()}
            for side, scores in (("kept", counted.kept_scores), ("dropped", counted.dropped_scores)):
                clipped = np.clip(list(scores), edges[0], edges[-1])
                figures["histogram"][side] = np.histogram(clipped, edges, weights=list(scores.values()))[0].astype(int).tolist()
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
            html.table(["stage", "rows", "dropped", "share", "exempt", "unjudged", "reasons"], stage_rows),
            "<h2>Data sets</h2>",
            html.table(["data set", "rows", "kept", "share", *(stage["name"] for stage in stages)], dataset_rows),
            *(self._section(stage) for stage in stages if stage["dropped"] or "histogram" in stage),
            f"<h2>Configuration</h2><pre>{html.text(json.dumps(figures['chain'], indent=2, ensure_ascii=False))}</pre>",
            style=STYLE,
        )

    def _section(self, figures: dict[str, Any]) -> str:
        name = figures["name"]
        text = f"<h2>{html.text(name)}</h2>" + (_plot(figures) if "histogram" in figures else "")
        for reason in list(figures["reasons"])[:MAX_REASONS]:
            examples = "".join(self._example(entry) for entry in self.stages[name].examples[reason])
            text += f"<h3>Dropped: {html.text(reason)}</h3>{examples}"
        return text

    def _example(self, entry: RowEntry) -> str:
        why = entry["reason"] + (f" score {entry['score']:.3g}" if entry["score"] is not None else "")
        twin = f"; duplicate of {entry['duplicate_of']}" if "duplicate_of" in entry else ""
        where = html.text(f"{entry['source']}, id {entry['id']}{twin}")
        try:
            body = _record(self.checker.record(entry))
        except InputError as error:
            body = _turn("problem", str(error))
        return f"<div class='card'><b class='bad'>{html.text(why)}</b><br>{where}{body}</div>"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "0%"


def _reasons(stage: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in list(stage["reasons"].items())[:8])


def _record(record: Record) -> str:
    """Show the first image of a row, and its turns."""
    image = next((ref for ref in media_of(record) if isinstance(ref, ImageRef)), None)
    shown = f"<br>{_thumbnail(image)}" if image else ""
    for message in (message for conversation in record.conversations for message in conversation):
        shown += _turn(message.role, shown_text(message))
    return shown


def _turn(role: str, text: str) -> str:
    more = f" ... {len(text) - MAX_SHOWN:,} more characters" if len(text) > MAX_SHOWN else ""
    return f"<pre><b>{html.text(role)}:</b> {html.text(text[:MAX_SHOWN])}{more}</pre>"


def _thumbnail(ref: ImageRef) -> str:
    try:
        return html.picture(load_image(ref))
    except InputError as error:
        return _turn("image", str(error))


def _plot(figures: dict[str, Any]) -> str:
    """Draw dropped scores above kept ones, and the limit."""
    edges, kept, dropped = (np.array(figures["histogram"][key]) for key in ("edges", "kept", "dropped"))
    figure, axis = html.pyplot().subplots(figsize=(8, 2.6), layout="constrained")
    axis.stairs(kept, edges, fill=True, color="#9ecae1", label=f"passed {kept.sum():,}")
    axis.stairs(kept + dropped, edges, baseline=kept, fill=True, color="#d62728", label=f"dropped {dropped.sum():,}")
    if figures["limit"] is not None:
        axis.axvline(figures["limit"], color="#222", linestyle="--", linewidth=1, label=f"limit {figures['limit']:g}")
    axis.set_yscale("symlog", linthresh=10)
    axis.set(xlabel="score; the last bar holds all above", ylabel="rows", ylim=(0, 2 * (kept + dropped).max()))
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return html.plot(figure, f"scores of {figures['name']}")
