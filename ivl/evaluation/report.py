"""The page of an evaluation with several replies to a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ivl.evaluation.curve import CurvePoint, draw
from ivl.utils import html as pages
from ivl.utils.files import write_atomic


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write one HTML file: the metric by number of replies as a plot and a table, and by type of question."""
    method, samples = report["method"], report["samples"]
    points = [CurvePoint(**point) for point in samples["curve"]]
    figure, axes = pages.pyplot().subplots(figsize=(6, 3.2), layout="constrained")
    draw(axes, points, method["select"])
    axes.set(ylabel=f"{report['metric']}, %", title=f"{report['task']}, temperature {report['params']['temperature']:g}")
    by_size = [[point.samples, *_figures(point.value, point.ci95)] for point in points]
    rows = {"all": report, **report["by_type"]}
    by_type = [[name, f"{row['n']:,}", *_figures(row["value"], row["ci95"])] for name, row in rows.items()]
    counts = [["all", f"{samples['replies']:,}"], ["without an answer", f"{samples['without_answer']:,}"]]
    if samples["without_rating"] is not None:
        counts.append(["without a rating", f"{samples['without_rating']:,}"])
    counted = f"of {method['samples']} replies to a question, one counts, by {method['select']}"
    sections = (
        f"<p>{pages.text(report['model'])}: {counted}.</p>",
        pages.plot(figure, "the metric against the number of replies"),
        pages.table(["replies to a question", report["metric"], "95% interval"], by_size),
        "<h2>By type of question</h2>",
        pages.table(["type", "questions", report["metric"], "95% interval"], by_type),
        "<h2>Replies</h2>",
        pages.table(["replies", "number"], counts),
    )
    write_atomic(path, pages.page(f"{report['task']}: several replies to a question", *sections))


def _figures(value: float, ci95: tuple[float, float] | list[float]) -> tuple[str, str]:
    return f"{value:.2%}", f"{ci95[0]:.2%} to {ci95[1]:.2%}"
