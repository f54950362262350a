"""The report of an evaluation, and its page if there are several replies to a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.evaluation.curve import draw
from ivl.utils import html as pages
from ivl.utils.files import write_atomic, write_json

KEYS = {"task", "metric", "value", "ci95", "by_type", "versions"}
TITLE = "several replies to a question"


def check(out: Path, predictions: Path, *, several: bool) -> None:
    """Check that a report can be written, and its page for several replies, without harm to files of another kind.

    Raises:
        InputError: naming the file that is in the way, or the missing library.
    """
    page = out.with_suffix(".html")
    if len({path.absolute() for path in (out, predictions, page)}) < 3:
        raise InputError(f"{out}: report, predictions ({predictions}) and page ({page}) need different names; use NAME.json")
    pages.check_places(out, KEYS, page if several else None, TITLE, "ivl eval")


def write(out: Path, report: dict[str, Any]) -> None:
    """Write the report, and its page if there are several replies to a question."""
    try:
        write_json(out, report)
        if report.get("method", {}).get("samples", 1) > 1:
            _write_page(out.with_suffix(".html"), report)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None


def _write_page(path: Path, report: dict[str, Any]) -> None:
    """Write one HTML file: the metric by number of replies as a plot and a table, and by type of question."""
    method, samples = report["method"], report["samples"]
    points = samples["curve"]
    figure, axes = pages.pyplot().subplots(figsize=(6, 3.2), layout="constrained")
    draw(axes, points, method["select"])
    axes.set(ylabel=f"{report['metric']}, %", title=f"{report['task']}, temperature {report['params']['temperature']:g}")
    by_size = [[point["samples"], *_figures(point)] for point in points]
    rows = {"all": report, **report["by_type"]}
    by_type = [[name, f"{row['n']:,}", *_figures(row)] for name, row in rows.items()]
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
    write_atomic(path, pages.page(f"{report['task']}: {TITLE}", *sections))


def _figures(row: dict[str, Any]) -> tuple[str, str]:
    low, high = row["ci95"]
    return f"{row['value']:.2%}", f"{low:.2%} to {high:.2%}"
