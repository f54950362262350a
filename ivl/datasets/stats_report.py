"""DatasetStats as tables for a terminal, as stats.json, and as stats.html: one self-contained page of plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ivl.datasets.stats import PERCENTILES, DatasetStats, Histogram, total
from ivl.errors import InputError
from ivl.utils import html as pages
from ivl.utils.files import write_atomic, write_json

MAX_SOURCES = 12
"""Data sets that a plot tells apart; the smaller ones are drawn as one. The tables name them all."""


KEYS = {"mixture", "model", "datasets", "total"}
TITLE = "<title>What "
"""What every page begins with."""


def check(out: str | Path) -> None:
    """Check, before rows are read, that a directory can take a report without harm to files of another kind.

    Raises:
        InputError: naming the file that is in the way, or if matplotlib is not installed.
    """
    pages.check_places(Path(out) / "stats.json", KEYS, Path(out) / "stats.html", TITLE, "ivl data stats")


def tables(datasets: Sequence[DatasetStats]) -> list[Table]:
    """Counts of each data set and of all, then percentiles of lengths."""
    return [_table(*_counts(datasets)), *(_table(*part) for part in _lengths(datasets))]


def write_report(out: str | Path, datasets: Sequence[DatasetStats], *, mixture: str, model: str | None) -> Path:
    """Write stats.json and stats.html into a directory; returns the page.

    Raises:
        InputError: if matplotlib is not installed, or nothing could be read.
    """
    out = Path(out)
    whole = total(datasets)
    values = {
        "mixture": mixture, "model": model, "datasets": {each.name: each.to_json() for each in datasets},
        "total": whole.to_json(),
    }  # fmt: skip
    write_json(out / "stats.json", values)
    if not whole.conversations:
        raise InputError(f"{mixture}: no row could be read, so there is nothing to plot")
    page = out / "stats.html"
    write_atomic(page, _page(datasets, whole, mixture, model))
    return page


Cells = tuple[str, list[str], list[list[str]]]
"""A title, the head and the rows of a table."""


def _counts(datasets: Sequence[DatasetStats]) -> Cells:
    encoded = any(each.encoded for each in datasets)
    sizes = ["tokens", "tiles", "characters"] if encoded else ["characters"]
    columns = ["rows", "bad", "conversations", "turns", "images", "videos", *sizes]
    every = [*datasets, total(datasets)] if len(datasets) > 1 else datasets
    whole = sum(getattr(each, sizes[0]) for each in datasets) or 1
    rows = [
        [
            each.name,
            each.format,
            *(f"{getattr(each, column):,}" for column in columns),
            f"{getattr(each, sizes[0]) / whole:.1%}",
        ]
        for each in every
    ]
    return "", ["dataset", "format", *columns, f"of {sizes[0]}"], rows


def _lengths(datasets: Sequence[DatasetStats]) -> list[Cells]:
    parts = []
    for title, name in _histograms(datasets):
        rows = []
        for each in [*datasets, total(datasets)] if len(datasets) > 1 else datasets:
            histogram: Histogram = getattr(each, name)
            if histogram.number:
                marks = [f"{histogram.percentile(percent):,}" for percent in (*PERCENTILES, 100)]
                rows.append([each.name, f"{histogram.mean:,.1f}", *marks])
        if rows:
            parts.append((title, ["dataset", "mean", *(f"p{percent}" for percent in PERCENTILES), "max"], rows))
    return parts


def _histograms(datasets: Sequence[DatasetStats]) -> list[tuple[str, str]]:
    encoded = any(each.encoded for each in datasets)
    return [
        *([("tokens per sample", "tokens_per_sample"), ("tiles per sample", "tiles_per_sample")] if encoded else []),
        ("characters per sample", "characters_per_sample"),
        ("characters per answer", "characters_per_answer"),
        ("turns per conversation", "turns_per_conversation"),
    ]


def _table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, header_style="bold", title=f"\n{title}" if title else None, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number and name != "format" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _page(datasets: Sequence[DatasetStats], whole: DatasetStats, mixture: str, model: str | None) -> str:
    unit = f"Tokens and tiles are those of {pages.text(model)}." if model else "No model was given: lengths are in characters."
    _, *counts = _counts(datasets)
    sections = [f"<p>{unit}</p>", pages.table(*counts)]
    if whole.bad:
        sections += [
            "<h2>Bad rows</h2><p>They are in no other figure.</p>",
            pages.table(["kind", "rows"], whole.kinds.most_common()),
        ]
    sections += ["<h2>Plots</h2>", _plots(datasets)]
    for title, *lengths in _lengths(datasets):
        sections += [f"<h2>{title.capitalize()}</h2>", pages.table(*lengths)]
    return pages.page(f"What {mixture} holds", *sections)


def _plots(datasets: Sequence[DatasetStats]) -> str:
    drawn, histograms = _drawn(datasets), _histograms(datasets)
    size = "tokens" if any(each.encoded for each in datasets) else "characters"
    figure, axes = pages.pyplot().subplots(
        (len(histograms) + 2) // 2, 2, figsize=(11, 1.7 * (len(histograms) + 3)), layout="constrained"
    )
    places = iter(axes.flat)
    for title, name in histograms:
        _stacked(next(places), drawn, name, title)
    _bars(next(places), f"{size} by data set", {each.name: getattr(each, size) for each in drawn})
    for left_over in places:
        left_over.axis("off")
    return pages.plot(figure, "distributions")


def _drawn(datasets: Sequence[DatasetStats]) -> list[DatasetStats]:
    """The data sets to draw, largest first; the smallest as one."""
    ordered = sorted((each for each in datasets if each.conversations), key=lambda each: -each.rows)
    if len(ordered) <= MAX_SOURCES:
        return ordered
    rest = total(ordered[MAX_SOURCES - 1 :])
    rest.name = f"{len(ordered) - MAX_SOURCES + 1} others"
    return [*ordered[: MAX_SOURCES - 1], rest]


def _stacked(axis: Any, drawn: Sequence[DatasetStats], name: str, title: str) -> None:
    """A histogram whose bars are made up of the data sets; lengths on a log scale."""
    from matplotlib.ticker import LogLocator, NullFormatter

    parts: list[Histogram] = [getattr(each, name) for each in drawn]
    least, most = min(min(part.counts, default=0) for part in parts), max(part.most for part in parts)
    few = most <= 64
    edges = np.arange(least, most + 2) - 0.5 if few else np.unique(np.geomspace(max(1, least), most + 1, 48).round())
    values = [np.maximum(np.fromiter(part.counts, float), 0 if few else 1) for part in parts]
    weights = [np.fromiter(part.counts.values(), float) for part in parts]
    axis.hist(values, edges, weights=weights, stacked=True, label=[each.name for each in drawn])
    axis.set(title=title, ylabel=title.rpartition(" per ")[2] + "s", xscale="linear" if few else "log")
    if few:
        axis.locator_params(axis="x", integer=True)
    else:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    if len(drawn) > 1:
        axis.legend(fontsize=7)


def _bars(axis: Any, title: str, values: dict[str, int]) -> None:
    whole = sum(values.values()) or 1
    names, shares = list(values)[::-1], [value / whole for value in values.values()][::-1]
    axis.bar_label(axis.barh(names, shares, color="#9ecae1"), [f" {share:.1%}" for share in shares], fontsize=8)
    axis.set(title=title, xlim=(0, 1.15 * max(shares, default=1)))
    axis.xaxis.set_major_formatter("{x:.0%}")
