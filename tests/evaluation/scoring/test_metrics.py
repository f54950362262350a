"""Scores on cases worked out by hand."""

from __future__ import annotations

import random

import pytest

from ivl.evaluation.scoring import (
    anls,
    choice_letter,
    edit_distance,
    exact_match,
    iou,
    normalise,
    relaxed_accuracy,
    vqa_accuracy,
    wilson,
)


def test_normalise() -> None:
    texts = (" Yes. ", "A  red\ncircle", "3.5", "U.S.", "...", "")
    assert [normalise(text) for text in texts] == ["yes", "a red circle", "3.5", "u.s", "..", ""]


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [("Red.", ["red"], 1), ("dark red", ["red"], 0), (" YES\n", ["no", "yes"], 1), ("", ["yes"], 0), ("red..", ["red"], 0)],
)
def test_exact_match(prediction: str, answers: list[str], score: float) -> None:
    assert exact_match(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1), ("105.1", "100", 0), ("95", "100", 1), ("-95", "-100", 1), ("95", "-100", 0), ("0", "0", 1),
        ("0.01", "0", 0), ("12%", "0.12", 1), ("12", "12%", 0), ("2019.", "2019", 1), ("Blue", "blue", 1), ("nan", "nan", 1),
        ("1e999", "5", 0), ("five", "5", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction: str, answer: str, score: float) -> None:
    assert relaxed_accuracy(prediction, [answer]) == score


def test_anls() -> None:
    assert anls("Hello", ["hello"]) == 1
    assert anls("hallo", ["hello"]) == pytest.approx(0.8)
    assert anls("ab", ["ac"]) == 0  # relative distance 0.5 is not below the threshold
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


def test_vqa_accuracy() -> None:
    assert vqa_accuracy("Red", ["red"] * 10) == 1
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert vqa_accuracy("green", ["red"] * 10) == 0
    assert vqa_accuracy("The two dogs!", ["2 dogs"] * 10) == 1
    assert vqa_accuracy("dont", ["don't"] * 10) == 1
    assert vqa_accuracy("1,000.5", ["1000.5"] * 10) == 1
    assert vqa_accuracy("yes", ["yes"]) == 1


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(C) a dog", "C"), ("A: cat", "A"), ("The answer is (D).", "D"), ("Final answer: b", "B"),
        ("First I thought the answer is A. No: the answer is **C**", "C"), (r"so \boxed{B}", "B"), ("A dog", "C"),
        ("a bird.", None), ("I would say (B)", "B"), ("(A) or (B)", None), ("", None), ("E", None), ("D\nbecause", "D"),
    ],
)  # fmt: skip
def test_choice_letter(prediction: str, letter: str | None) -> None:
    assert choice_letter(prediction, ["a cat", "a cow", "a dog", "a fish"]) == letter


def test_iou() -> None:
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0 and iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert iou((2, 2, 0, 0), (0, 0, 2, 2)) == 0


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
