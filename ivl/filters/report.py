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
from ivl.types import ImageRef, Record
from ivl.utils import html

PER_REASON, MAX_REASONS = 4, 12
"""Dropped rows shown for each of the commonest reasons, and reasons shown."""
NUM_REPEATED = 12
"""Near-duplicates shown, each beside the row that it repeats."""


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
    """Counts the rows of a part, or of all parts, and shows them."""

    def __init__(self, checker: RowChecker) -> None:
        self.checker, self.chain = checker, checker.chain
        self.datasets: dict[str, dict[str, Any]] = {
            name: {"rows": 0, "kept": 0, "dropped": Counter()} for name in checker.specs
        }
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
            most = NUM_REPEATED if "repeats" in entry else PER_REASON
            if len(examples := figures.examples.setdefault(reason, [])) < most:
                examples.append(entry)

    def counted(self) -> dict[str, Any]:
        """Return all counts as values of JSON, for `add`."""
        return {"datasets": self.datasets, "stages": {name: vars(figures) for name, figures in self.stages.items()}}

    def add(self, counted: dict[str, Any]) -> None:
        """Add the counts of the next part."""
        for name, each in counted["datasets"].items():
            self.datasets[name]["rows"] += each["rows"]
            self.datasets[name]["kept"] += each["kept"]
            self.datasets[name]["dropped"].update(each["dropped"])
        for name, each in counted["stages"].items():
            figures = self.stages[name]
            for key in ("reached", "dropped", "exempt", "unjudged"):
                setattr(figures, key, getattr(figures, key) + each[key])
            figures.reasons.update(each["reasons"])
            for side in ("kept_scores", "dropped_scores"):
                getattr(figures, side).update({float(score): rows for score, rows in each[side].items()})
            for reason, examples in each["examples"].items():
                shown = figures.examples.setdefault(reason, [])
                most = NUM_REPEATED if any("repeats" in entry for entry in examples) else PER_REASON
                shown += examples[: most - len(shown)]

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
        dropping = [stage for stage in stages if stage["dropped"]]
        judge = f" Judge: {html.text(figures['judge'])}." if figures["judge"] else ""
        about = html.text(figures["chain"]["about"])
        stage_rows = [
            [s["name"], f"{s['reached']:,}", f"{s['dropped']:,}", _share(s["dropped"], s["reached"]),
             f"{s['exempt']:,}", f"{s['unjudged']:,}", _reasons(s)]
            for s in stages
        ]  # fmt: skip
        dataset_rows = [
            [name, f"{d['rows']:,}", f"{d['kept']:,}", _share(d["kept"], d["rows"]),
             *(d["dropped"][stage["name"]] for stage in dropping)]
            for name, d in figures["datasets"].items()
        ]  # fmt: skip
        names = [f"dropped by {stage['name']}" for stage in dropping]
        configuration = json.dumps(figures["chain"], indent=2, ensure_ascii=False)
        return html.page(
            "Filtered data",
            html.facts(rows_kept=f"{kept:,}", of=f"{rows:,}", share_kept=_share(kept, rows)),
            f"<p>{about}{judge}</p><h2>Stages</h2>",
            html.table(["stage", "rows", "dropped", "share", "exempt", "unjudged", "reasons"], stage_rows, words={"reasons"}),
            "<h2>Data sets</h2>",
            html.table(["data set", "rows", "kept", "share", *names], dataset_rows),
            *map(self._section, dropping),
            html.next_steps(*_next_steps(dropping)),
            f"<h2>Configuration</h2>{html.block(configuration, most=10**6)}",
        )

    def _section(self, figures: dict[str, Any]) -> str:
        name = figures["name"]
        text = f"<h2>{html.text(name)}</h2>" + (_plot(figures) if "histogram" in figures else "")
        for reason in list(figures["reasons"])[:MAX_REASONS]:
            shown, count = self.stages[name].examples[reason], figures["reasons"][reason]
            few = "" if count == len(shown) else f", the first {len(shown)} shown"
            text += f"<h3>Dropped: {html.text(reason)} ({count:,}{few})</h3>"
            if any("repeats" in entry for entry in shown):
                text += "".join(html.grid(map(self._example, [entry, *_repeated(entry)]), "pair") for entry in shown)
            else:
                text += html.grid(map(self._example, shown), "plots")
        return text

    def _example(self, entry: RowEntry) -> str:
        if reason := entry.get("reason"):
            why = reason + (f" score {entry['score']:.4g}" if entry["score"] is not None else "")
            head = f"<b class='bad'>{html.text(why)}</b><br>{html.text(entry['source'])}, id {html.text(entry['id'])}"
        else:
            head = f"<b class='good'>the row that it repeats</b><br>{html.text(entry['source'])}"
        try:
            body = _record(self.checker.record(entry))
        except InputError as error:
            body = _turn("problem", str(error))
        return html.card(head, body)


def _repeated(entry: RowEntry) -> list[RowEntry]:
    """The entry of the row that a near-duplicate repeats."""
    if "repeats" not in entry:  # of an older journal
        return []
    dataset, row = entry["repeats"]
    return [{"dataset": dataset, "row": row, "source": entry["duplicate_of"]}]


def _next_steps(dropping: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What to do with the result, in the folder of the page."""
    train = ("Where the dropped rows above deserve it, train on what was kept, in this folder:",
             "ivl train finetune --model MODEL --data meta.json")  # fmt: skip
    if not dropping:
        return [("Nothing was dropped. Train on the rows, in this folder:", train[1])]
    names = ", ".join(stage["name"] for stage in dropping)
    return [
        train,
        (f"Where a reason is wrong, loosen or remove its stage ({names}) in a copy of the configuration, and filter again:",
         "ivl data filter heuristic > mine.json"),
        ("Rows that should come back are in dropped.jsonl, whole, with stage and reason.", ""),
    ]  # fmt: skip


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
    return html.block(f"{role}: {text}")


def _thumbnail(ref: ImageRef) -> str:
    from ivl.processing.image import load_image  # here, since it imports torch, which other commands for data do without

    try:
        return html.picture(load_image(ref))
    except InputError as error:
        return _turn("image", str(error))


def _plot(figures: dict[str, Any]) -> str:
    """Draw dropped scores above kept ones, and the limit."""
    edges, kept, dropped = (np.array(figures["histogram"][key]) for key in ("edges", "kept", "dropped"))
    figure, axis = html.pyplot().subplots(figsize=(4.6, 2.5), layout="constrained")
    axis.stairs(kept, edges, fill=True, color=html.COLORS[0], label=f"passed {kept.sum():,}")
    axis.stairs(kept + dropped, edges, baseline=kept, fill=True, color=html.COLORS[1], label=f"dropped {dropped.sum():,}")
    if figures["limit"] is not None:
        axis.axvline(figures["limit"], color=html.INK, linestyle="--", linewidth=1, label=f"limit {figures['limit']:g}")
    axis.set_yscale("symlog", linthresh=10)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set(xlabel="score; the last bar holds all above", ylabel="rows", ylim=(0, 2 * (kept + dropped).max()))
    axis.legend(fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return html.plot(figure, f"scores of {figures['name']}")
