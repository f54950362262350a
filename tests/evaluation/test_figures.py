"""Figures: their values, and intervals that draw what depends on one another together."""

from __future__ import annotations

import random

import pytest

from ivl.evaluation.figures import Figure, all_right, average, by, combined, mean, points, ratio, rows_of, shown
from ivl.evaluation.scoring import wilson
from ivl.evaluation.task import Example, Score, Scored
from ivl.types import Message, Text

ASKED = (Message("user", (Text("?"),)),)


def scored(values: list[float], clusters: list[str] | None = None, **columns: list[str]) -> list[Scored]:
    rows = [{key: column[at] for key, column in columns.items()} for at in range(len(values))]
    return [
        Scored(
            Example(id=str(at), conversation=ASKED, answers=("x",), row=rows[at], cluster=clusters[at] if clusters else ""),
            Score(value=value),
        )
        for at, value in enumerate(values)
    ]


def test_a_share_of_questions_that_stand_alone_has_wilsons_interval() -> None:
    figure = mean(scored([1.0] * 8 + [0.0] * 2))
    assert figure.value == 0.8 and figure.interval() == pytest.approx(wilson(8, 10))
    assert mean(scored([1.0, 0.0]), lambda s: s.score.value / 2).value == 0.25


def test_clusters_widen_an_interval() -> None:
    rng = random.Random(0)
    values = [float(rng.random() < 0.5) for _ in range(50) for _ in (0, 1, 2, 3)]
    for start in range(0, 200, 4):
        values[start : start + 4] = [values[start]] * 4
    alone, together = mean(scored(values)), mean(scored(values, [str(n // 4) for n in range(200)]))
    assert alone.value == together.value
    widths = [high - low for low, high in (alone.interval(), together.interval())]
    assert 1.7 < widths[1] / widths[0] < 2.2, "four equal replies are worth one: the interval is twice as wide"


def test_groups_f1_means_of_means_and_sums() -> None:
    rows = scored([1, 1, 1, 0, 1, 1], ["a", "a", "b", "b", "c", "c"], kind=["x", "x", "y", "y", "y", "y"])
    assert all_right(rows, lambda s: s.cluster).value == pytest.approx(2 / 3)
    assert all_right(rows, lambda s: s.cluster).interval() == pytest.approx(wilson(2, 3))
    kinds = by(rows, lambda s: [s["kind"]])
    assert average(mean(each) for each in kinds.values()).value == pytest.approx((1 + 0.75) / 2)
    assert points(mean(rows), len(rows)).value == pytest.approx(5)
    assert combined([mean(rows), mean(rows)], 100, points=True).value == pytest.approx(1000 / 6)
    assert ratio(rows, lambda s: 2 * s.score.value, lambda s: 1 + s.score.value).value == pytest.approx(10 / 11)


def test_the_bootstrap_agrees_with_wilson_where_both_hold() -> None:
    rows = scored([1.0] * 140 + [0.0] * 60)
    plain = mean(rows)
    drawn = Figure(((0.5, plain.terms[0][1]), (0.5, plain.terms[0][1])), plain.n)
    assert drawn.value == pytest.approx(plain.value)
    assert drawn.interval() == pytest.approx(plain.interval(), abs=0.015)
    assert drawn.interval() == drawn.interval(), "the same draws on every run"


def test_a_figure_of_nothing_is_zero() -> None:
    for figure in (ratio([], lambda _: 1, lambda _: 1), average([]), points(mean([]))):
        assert figure.value == 0 and figure.interval() == (0, 0)


def test_a_row_of_a_report_says_what_it_is() -> None:
    rows = rows_of({"share": mean(scored([1.0, 0.0])), "sum": points(mean(scored([1.0, 1.0])), 1400)})
    assert shown(rows["share"])[0] == "50.00%" and shown(rows["sum"])[0] == "1,400.00"
    assert shown({**rows["share"], "range": [0.5, 0.75]})[0] == "50.00% to 75.00%"
