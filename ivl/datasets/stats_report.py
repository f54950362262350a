"""DatasetStats as tables for a terminal, as stats.json, and as stats.html: one self-contained page of plots."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivl.datasets.stats import PERCENTILES, DatasetStats, Histogram, total
from ivl.errors import InputError
from ivl.utils import html as pages
from ivl.utils.files import write_atomic, write_json
from ivl.utils.progress import print_table

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


def print_tables(datasets: Sequence[DatasetStats]) -> None:
    """Print counts of each data set and of all, then percentiles of lengths."""
    for title, head, rows in [_counts(datasets), *_lengths(datasets)]:
        print_table(head, rows, title=f"\n{title}" if title else None, words={"format"})


def write_report(out: str | Path, datasets: Sequence[DatasetStats], *, mixture: str | Sequence[str], model: str | None) -> Path:
    """Write stats.json and stats.html into a directory; returns the page.

    Args:
        out: the directory.
        datasets: what was counted.
        mixture: what was read, one or several.
        model: whose processor counted tokens and tiles.

    Raises:
        InputError: if matplotlib is not installed, or nothing could be read.
    """
    out, mixtures = Path(out), (mixture,) if isinstance(mixture, str) else tuple(mixture)
    whole = total(datasets)
    values = {
        "mixture": mixtures[0] if len(mixtures) == 1 else mixtures, "model": model,
        "datasets": {each.name: each.to_json() for each in datasets}, "total": whole.to_json(),
    }  # fmt: skip
    write_json(out / "stats.json", values)
    if not whole.conversations:
        raise InputError(f"{', '.join(mixtures)}: no row could be read, so there is nothing to plot")
    page = out / "stats.html"
    write_atomic(page, _page(datasets, whole, mixtures, model))
    return page


Cells = tuple[str, list[str], list[list[str]]]
"""A title, the head and the rows of a table."""


def _counts(datasets: Sequence[DatasetStats]) -> Cells:
    encoded = any(each.encoded for each in datasets)
    sizes = ["tokens", "tiles", "characters"] if encoded else ["characters"]
    columns = ["rows", "bad", "conversations", "turns", "images", "videos", *sizes]
    every = [*datasets, total(datasets)] if len(datasets) > 1 else datasets
    whole = sum(getattr(each, sizes[0]) for each in datasets) or 1
    shares = [f"{getattr(each, sizes[0]) / whole:.1%}" for each in every]
    rows = [
        [each.name, each.format, *(f"{getattr(each, column):,}" for column in columns), share]
        for each, share in zip(every, shares, strict=True)
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


def _page(datasets: Sequence[DatasetStats], whole: DatasetStats, mixtures: tuple[str, ...], model: str | None) -> str:
    unit = f"Tokens and tiles are those of {pages.text(model)}." if model else "No model was given: lengths are in characters."
    sizes = {"tokens": f"{whole.tokens:,}", "tiles": f"{whole.tiles:,}"} if whole.encoded else {}
    _, *counts = _counts(datasets)
    sections = [
        pages.facts(rows=f"{whole.rows:,}", bad_rows=f"{whole.bad:,}", images=f"{whole.images:,}", **sizes),
        f"<p>{unit}</p>", pages.table(*counts),
    ]  # fmt: skip
    if whole.bad:
        sections += [
            "<h2>Bad rows</h2><p>They are in no other figure.</p>",
            pages.table(["kind", "rows"], whole.kinds.most_common()),
        ]
    sections += ["<h2>Plots</h2>", _plots(datasets)]
    for title, *lengths in _lengths(datasets):
        sections += [f"<h2>{title.capitalize()}</h2>", pages.table(*lengths)]
    held = "hold" if len(mixtures) > 1 else "holds"
    return pages.page(
        f"What {' and '.join(mixtures)} {held}", *sections, pages.next_steps(*_next_steps(whole, mixtures, model))
    )  # fmt: skip


def _next_steps(whole: DatasetStats, mixtures: tuple[str, ...], model: str | None) -> list[tuple[str, str]]:
    rows = shlex.join(mixtures)
    steps = [("Name the place of every bad row:", f"ivl data validate {rows}")] if whole.bad else []
    if not model:
        steps.append(("Count tokens and tiles as a model sees them:", f"ivl data stats {rows} --model MODEL --out DIR"))
    filters = "; ".join(f"ivl data filter heuristic {shlex.quote(each)} OUT" for each in mixtures)
    return [
        *steps,
        ("Leave out rows that repeat, break off or run in circles:", filters),
        ("Train:", f"ivl train finetune --model {shlex.quote(model or 'MODEL')} --data {rows}"),
    ]


def _plots(datasets: Sequence[DatasetStats]) -> str:
    drawn, plots = _drawn(datasets), []
    size = "tokens" if any(each.encoded for each in datasets) else "characters"
    for title, name in _histograms(datasets):
        figure, axis = pages.pyplot().subplots(figsize=(4.2, 2.6), layout="constrained")
        _stacked(axis, drawn, name, title)
        plots.append(pages.plot(figure, title))
    if len(drawn) > 1:
        figure, axis = pages.pyplot().subplots(figsize=(4.2, 0.9 + 0.25 * len(drawn)), layout="constrained")
        _bars(axis, f"{size} by data set", {each.name: getattr(each, size) for each in drawn})
        plots.append(pages.plot(figure, f"{size} by data set"))
    return pages.grid(plots, "plots")


def _drawn(datasets: Sequence[DatasetStats]) -> list[DatasetStats]:
    """The data sets to draw, largest first; the smallest as one."""
    ordered = sorted((each for each in datasets if each.conversations), key=lambda each: -each.rows)
    if len(ordered) <= MAX_SOURCES:
        return ordered
    rest = total(ordered[MAX_SOURCES - 1 :])
    rest.name = f"{len(ordered) - MAX_SOURCES + 1} others"
    return [*ordered[: MAX_SOURCES - 1], rest]


def _stacked(axis: Any, drawn: Sequence[DatasetStats], name: str, title: str) -> None:
    """A histogram whose bars are made up of the data sets; lengths that spread widely on a log scale."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    parts: list[Histogram] = [getattr(each, name) for each in drawn]
    least, most = min(min(part.counts, default=0) for part in parts), max(part.most for part in parts)
    few, wide = most <= 64, most > 20 * max(1, least)  # on a shorter log axis too few marks have labels
    if few:
        edges = np.arange(least, most + 2) - 0.5
    elif wide:
        edges = np.unique(np.geomspace(max(1, least), most + 1, 48).round())
    else:
        edges = np.unique(np.linspace(least, most + 1, 48).round())
    values = [np.maximum(np.fromiter(part.counts, float), 1 if wide and not few else 0) for part in parts]
    weights = [np.fromiter(part.counts.values(), float) for part in parts]
    axis.hist(values, edges, weights=weights, stacked=True, label=[each.name for each in drawn])
    axis.set(title=title, ylabel=title.rpartition(" per ")[2] + "s")
    if wide and not few:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    if len(drawn) > 1:
        axis.figure.legend(loc="outside lower center", ncols=2, fontsize=7)


def _bars(axis: Any, title: str, values: dict[str, int]) -> None:
    whole = sum(values.values()) or 1
    names, shares = list(values)[::-1], [value / whole for value in values.values()][::-1]
    axis.bar_label(axis.barh(names, shares), [f" {share:.1%}" for share in shares], fontsize=8)
    axis.set(title=title, xlim=(0, 1.15 * max(shares, default=1)))
    axis.xaxis.set_major_formatter("{x:.0%}")
