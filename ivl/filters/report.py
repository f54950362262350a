"""What a filter run did, on one page, so that a person can review it before training; the same figures as JSON."""

from __future__ import annotations

import hashlib
import heapq
import html
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ivl.data.records import media_of
from ivl.errors import DataError, InputError
from ivl.filters.chain import Chain, Pointwise, Stage
from ivl.processing.image import load_image
from ivl.types import ImageRef, Record, Text
from ivl.utils import html as pages
from ivl.utils.files import write_atomic

UNREADABLE = "unreadable"
EXAMPLES = 12
"""Dropped rows shown for each stage, spread over its reasons; and rows shown that a stage nearly dropped."""
PER_REASON = 4
NEAR = 0.5
"""A kept score farther from the limit than this share of it was not nearly dropped."""
THUMB = 160
MAX_IMAGES = 3
LONG = 500
"""Characters of a turn that are shown before it must be unfolded."""
MAX_SHOWN = 4_000
STYLE = """
h3 { font-size: 1rem; margin-bottom: .3rem } table { display: block; overflow-x: auto } .zero { color: #aaa }
.row { border: 1px solid #ddd; border-radius: .3rem; padding: .5rem .8rem; margin: .5rem 0; overflow-wrap: anywhere }
.why { color: #b00020; font-weight: 600 } .near { color: #8a6100; font-weight: 600 } .where { color: #777; font-size: .85rem }
.turn { white-space: pre-wrap; margin: .25rem 0 } .turn b { color: #555; font-weight: 600 } .row img { margin: .2rem .4rem 0 0 }
"""


@dataclass
class _Stage:
    """Figures of one stage."""

    reached: int = 0
    dropped: int = 0
    exempt: int = 0
    unjudged: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    kept_scores: Counter[float] = field(default_factory=Counter)
    dropped_scores: Counter[float] = field(default_factory=Counter)
    examples: dict[str, list[tuple[float, int, dict[str, Any]]]] = field(default_factory=dict)
    """For each reason a random few, as a heap."""
    near: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    """Kept rows whose score lies closest to the limit, as a heap."""


def write_report(out: Path, chain: Chain, pointwise: Pointwise, judge: str | None) -> dict[str, Any]:
    """Read verdicts.jsonl and write report.json and report.html; returns what report.json holds."""
    names = [spec.name for spec in pointwise.specs]
    datasets: dict[str, dict[str, Any]] = {name: {"rows": 0, "kept": 0, "dropped": Counter()} for name in names}
    stages = {name: _Stage() for name in [UNREADABLE, *(stage.name for stage in chain.stages)]}
    for line in _lines(out / "verdicts.jsonl"):
        row = json.loads(line)
        each = datasets[row["dataset"]]
        each["rows"] += 1
        each["kept"] += row["keep"]
        if not row["keep"]:
            each["dropped"][row["stage"]] += 1
        _count(row, chain, stages)
    result = {
        "rows": sum(each["rows"] for each in datasets.values()),
        "kept": sum(each["kept"] for each in datasets.values()),
        "judge": judge,
        "datasets": {name: each | {"dropped": dict(each["dropped"])} for name, each in datasets.items()},
        "stages": [_figures(name, stages[name], _named(chain, name)) for name in stages],
        "chain": json.loads(chain.spelled_out()),
    }
    write_atomic(out / "report.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / "report.html", _page(result, chain, stages, pointwise))
    return result


def _lines(path: Path):
    if path.is_file():
        with path.open("rb") as file:
            yield from file


def _named(chain: Chain, name: str) -> Stage | None:
    return next((stage for stage in chain.stages if stage.name == name), None)


def _count(row: dict[str, Any], chain: Chain, stages: dict[str, _Stage]) -> None:
    place = f"{row['dataset']}\n{row['source']}".encode("utf-8", "replace")
    lot = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest())
    stages[UNREADABLE].reached += 1
    if row.get("stage") != UNREADABLE:
        for stage in chain.stages:
            found = stages[stage.name]
            if stage.exempts(row["dataset"]):
                found.exempt += 1
                continue
            found.reached += 1
            dropped = row.get("stage") == stage.name
            score = row["scores"].get(stage.name)
            found.unjudged += stage.name in row.get("unjudged", ())
            if score is not None:
                (found.dropped_scores if dropped else found.kept_scores)[float(f"{score:.3g}")] += 1
                if row["keep"] and stage.limit is not None and abs(score - stage.limit) <= NEAR * stage.limit:
                    _keep_few(found.near, -abs(score - stage.limit), lot, row, EXAMPLES)
            if dropped:
                break
    if not row["keep"]:
        found = stages[row["stage"]]
        found.dropped += 1
        found.reasons[row["reason"]] += 1
        _keep_few(found.examples.setdefault(row["reason"], []), -float(lot), lot, row, PER_REASON)


def _keep_few(heap: list[tuple[float, int, dict[str, Any]]], worth: float, lot: int, row: dict[str, Any], few: int) -> None:
    """The rows of greatest worth; lots, which follow from the row, decide between equals."""
    entry = (worth, lot, row)
    if len(heap) < few:
        heapq.heappush(heap, entry)
    elif entry[:2] > heap[0][:2]:
        heapq.heapreplace(heap, entry)


def _figures(name: str, found: _Stage, stage: Stage | None) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "name": name, "use": stage.use if stage else None, "limit": stage.limit if stage else None, "reached": found.reached,
        "dropped": found.dropped, "exempt": found.exempt, "unjudged": found.unjudged,
        "reasons": dict(sorted(found.reasons.items(), key=lambda item: (-item[1], item[0]))),
    }  # fmt: skip
    if found.kept_scores or found.dropped_scores:
        edges, kept, dropped = _histogram(found, bool(stage and stage.judged))
        figures["histogram"] = {"edges": edges.tolist(), "kept": kept.tolist(), "dropped": dropped.tolist()}
    return figures


def _histogram(found: _Stage, judged: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges and counts; a bin for each whole score of a judge, bins of equal ratio where scores are far apart."""
    scores = np.array([*found.kept_scores, *found.dropped_scores])
    low, high = float(scores.min()), float(scores.max())
    if judged:
        edges = np.arange(-0.5, 11)
    elif low >= 0 and high > 100:
        edges = np.expm1(np.linspace(np.log1p(low), np.log1p(high) + 1e-9, 41))
    else:
        edges = np.linspace(low, high if high > low else low + 1, 41)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # what the logarithm rounded off
    return edges, _counts(found.kept_scores, edges), _counts(found.dropped_scores, edges)


def _counts(scores: Counter[float], edges: np.ndarray) -> np.ndarray:
    return np.histogram(np.array(list(scores)), bins=edges, weights=np.array(list(scores.values())))[0].astype(int)


def _page(result: dict[str, Any], chain: Chain, stages: dict[str, _Stage], pointwise: Pointwise) -> str:
    rows, kept = result["rows"], result["kept"]
    share = f" ({kept / rows:.2%})" if rows else ""
    judge = f" Judge: {html.escape(result['judge'])}." if result["judge"] else ""
    sections = "".join(
        _section(figures, stages[figures["name"]], _named(chain, figures["name"]), pointwise)
        for figures in result["stages"]
        if figures["dropped"] or "histogram" in figures
    )
    about = html.escape(str(result["chain"].get("about", "")))
    return pages.page(
        "Filtered data",
        f"<p><b>{kept:,}</b> of {rows:,} rows kept{share}. {about}{judge}</p>",
        f"<h2>Stages</h2>{_stage_table(result)}<h2>Data sets</h2>{_dataset_table(result)}{sections}",
        f"<h2>Configuration</h2><pre>{html.escape(json.dumps(result['chain'], indent=2, ensure_ascii=False))}</pre>",
        style=STYLE,
    )


def _stage_table(result: dict[str, Any]) -> str:
    def reasons(figures: dict[str, Any]) -> str:
        return ", ".join(f"{html.escape(reason)} {count:,}" for reason, count in list(figures["reasons"].items())[:8])

    rows = "".join(
        f"<tr><td>{html.escape(f['name'])}<td>{f['reached']:,}{_cell(f['dropped'])}<td>{_share(f['dropped'], f['reached'])}"
        f"{_cell(f['exempt'])}{_cell(f['unjudged'])}<td style='text-align:left'>{reasons(f)}"
        for f in result["stages"]
    )
    head = "<th>stage<th>rows<th>dropped<th>share<th>exempt<th>unjudged<th style='text-align:left'>reasons"
    return f"<table><tr>{head}{rows}</table>"


def _dataset_table(result: dict[str, Any]) -> str:
    names = [figures["name"] for figures in result["stages"]]
    head = "".join(f"<th>{html.escape(name)}" for name in names)
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{each['rows']:,}<td>{each['kept']:,}<td>{_share(each['kept'], each['rows'])}"
        + "".join(_cell(each["dropped"].get(stage, 0)) for stage in names)
        for name, each in result["datasets"].items()
    )
    return f"<table><tr><th>data set<th>rows<th>kept<th>share{head}{rows}</table>"


def _cell(count: int) -> str:
    return f"<td>{count:,}" if count else "<td class='zero'>0"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else ""


def _section(figures: dict[str, Any], found: _Stage, stage: Stage | None, pointwise: Pointwise) -> str:
    text = f"<h2>{html.escape(figures['name'])}</h2>"
    if "histogram" in figures:
        text += _plot(figures)
    if dropped := _spread(found):
        examples = "".join(_example(row, pointwise, "why") for row in dropped)
        text += f"<h3>Dropped: {len(dropped)} of {found.dropped:,}</h3>{examples}"
    if found.near:
        near = [row for _, _, row in sorted(found.near, key=lambda entry: entry[:2], reverse=True)]
        examples = "".join(_example(row, pointwise, "near", figures["name"]) for row in near)
        text += f"<h3>Kept, but closest to the limit of {figures['limit']:g}</h3>{examples}"
    return text


def _spread(found: _Stage) -> list[dict[str, Any]]:
    """A few rows of every reason, commonest reason first."""
    queues = [sorted(found.examples[reason], key=lambda entry: entry[1]) for reason, _ in found.reasons.most_common()]
    chosen = [queue[n][2] for n in range(PER_REASON) for queue in queues if n < len(queue)]
    return sorted(chosen[:EXAMPLES], key=lambda row: (-found.reasons[row["reason"]], row["reason"]))


def _example(row: dict[str, Any], pointwise: Pointwise, style: str, stage: str = "") -> str:
    score = row["scores"].get(stage or row.get("stage"))
    why = html.escape(row.get("reason", "") if style == "why" else "") + (f" score {score:.3g}" if score is not None else "")
    twin = f"; duplicate of {html.escape(row['duplicate_of'])}" if row.get("duplicate_of") else ""
    where = f"<div class='where'>{html.escape(row['source'])}, id {html.escape(row['id'])}{twin}</div>"
    names = [spec.name for spec in pointwise.specs]
    try:
        body = _record(pointwise.record(names.index(row["dataset"]), row["row"]))
    except DataError as error:
        body = _turn("problem", error.problem)
    return f"<div class='row'><span class='{style}'>{why}</span>{where}{body}</div>"


def _record(record: Record) -> str:
    images = [ref for ref in media_of(record) if isinstance(ref, ImageRef)]
    text = "".join(map(_thumbnail, images[:MAX_IMAGES]))
    text += f" and {len(images) - MAX_IMAGES} more images" if len(images) > MAX_IMAGES else ""
    for conversation in record.conversations:
        for message in conversation:
            parts = (part.text if isinstance(part, Text) else "[media]" for part in message.content)
            text += _turn(message.role, "".join(parts))
    return text


def _turn(role: str, text: str) -> str:
    more = f" ... {len(text) - MAX_SHOWN:,} more characters" if len(text) > MAX_SHOWN else ""
    shown, rest = text[:LONG], text[LONG:MAX_SHOWN]
    fold = f"<details><summary>more</summary>{html.escape(rest)}{more}</details>" if rest else ""
    return f"<div class='turn'><b>{html.escape(role)}:</b> {html.escape(shown)}{fold}</div>"


def _thumbnail(ref: ImageRef) -> str:
    try:
        image = load_image(ref)
    except InputError as error:
        return _turn("image", str(error))
    return pages.picture(image, size=THUMB)


def _plot(figures: dict[str, Any]) -> str:
    """Kept and dropped scores above each other, and the limit."""
    edges, kept, dropped = (np.array(figures["histogram"][key]) for key in ("edges", "kept", "dropped"))
    figure, axis = pages.pyplot().subplots(figsize=(8, 2.6), layout="constrained")
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
    return pages.plot(figure, f"scores of {figures['name']}")
