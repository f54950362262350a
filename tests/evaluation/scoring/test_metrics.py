"""Scores on cases worked out by hand."""

from __future__ import annotations

import random

import pytest

from ivl.evaluation.scoring import anls, exact_match, normalize, wilson
from ivl.evaluation.scoring.metrics import agreement, edit_distance


def test_normalize() -> None:
    texts = (" Yes. ", "A  red\ncircle", "3.5", "U.S.", "...", "")
    assert [normalize(text) for text in texts] == ["yes", "a red circle", "3.5", "u.s", "..", ""]


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [("Red.", ["red"], 1), ("dark red", ["red"], 0), (" YES\n", ["no", "yes"], 1), ("", ["yes"], 0), ("red..", ["red"], 0)],
)
def test_exact_match(prediction: str, answers: list[str], score: float) -> None:
    assert exact_match(prediction, answers) == score


def test_anls() -> None:
    assert anls("Hello", ["hello"]) == 1
    assert anls("hallo", ["hello"]) == pytest.approx(0.8)
    assert anls("ab", ["ac"]) == 0.5 and anls("abc", ["abx", "axy"]) == pytest.approx(2 / 3) and anls("ab", ["acx"]) == 0
    assert anls(" ab ", ["cd  ef"]) == 0 and anls("a  b", ["a c"]) == pytest.approx(1 - 1 / 4)  # lengths count white space
    assert anls("abc", ["xyz", "abd"]) == pytest.approx(2 / 3)
    assert anls("", ["x"]) == 0 and anls("", [""]) == 1


def test_edit_distance_is_a_metric() -> None:
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3
    rng = random.Random(0)
    words = ["".join(rng.choices("ab", k=rng.randint(0, 6))) for _ in range(12)]
    for a in words:
        for b in words:
            assert edit_distance(a, b) == edit_distance(b, a) and (edit_distance(a, b) == 0) == (a == b)
            assert all(edit_distance(a, b) <= edit_distance(a, c) + edit_distance(c, b) for c in words)


def test_agreement() -> None:
    assert agreement("red", ["red"] * 10) == 1
    assert agreement("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert agreement("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert agreement("green", ["red"] * 10) == 0
    assert agreement("yes", ["yes"]) == 0 and agreement("yes", ["no"]) == 0


def test_wilson_against_published_values() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    low, high = wilson(9600, 9673)
    assert low < 9600 / 9673 < high and high - low < 0.004
    with pytest.raises(ValueError, match="n 0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="total 3"):
        wilson(3, 2)
