"""Laws of the repetition filter."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl.filters.repetition import Repetition
from tests.filters.test_rules import row

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrstl"]
LEAD = "The picture shows a garden in the morning. There are two chairs and a small table near the old wall."


def score(text: str) -> float:
    found = Repetition()(row(text)).score
    assert found is not None
    return found


@settings(max_examples=60, deadline=None)
@given(period=st.integers(1, 60), seed=st.integers(0, 1000), lead=st.booleans(), tail=st.booleans())
def test_a_loop_of_any_period_anywhere_is_dropped(period: int, seed: int, lead: bool, tail: bool) -> None:
    words = random.Random(seed).choices(WORDS, k=period)
    rounds = max(5, 24 // period + 2)
    text = " ".join([LEAD] * lead + words * rounds + ["and that is the end of it."] * tail)
    assert score(text) > 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 600))
def test_words_without_order_are_kept(seed: int, size: int) -> None:
    assert score(" ".join(random.Random(seed).choices(WORDS, k=size))) <= 1


@pytest.mark.parametrize("piece", ["ha", "abc", "图片中有一个红色的圆形", "blue", "the same again, "])
def test_loops_without_spaces_are_dropped(piece: str) -> None:
    assert score(LEAD + " " + piece * (200 // len(piece))) > 1


def test_a_loop_with_changed_words_is_dropped() -> None:
    rng = random.Random(1)
    words = ("the old bridge over the river is quite near the small town " * 10).split()
    assert score(" ".join(rng.choice(WORDS) if rng.random() < 0.08 else word for word in words)) > 1


def test_counting_does_not_hide_a_loop() -> None:
    assert score("\n".join(f"{n}. The shape in the picture is a blue circle." for n in range(1, 12))) > 1


@pytest.mark.parametrize(
    "text",
    [
        ", ".join(map(str, range(1, 300))),
        "\n".join(f"| item {n} | {n * 7} | yes | no |" for n in range(20)),
        "\n".join(f"assert add({n}, {n + 1}) == {2 * n + 1}" for n in range(20)),
        "yes",
        "No.",
        "no no no",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily.",
        "\n\n".join(
            f"{name} walks along the road,\n{name} carries home a load.\nSing, my friend, and do not cry."
            for name in ("Anna", "Peter", "Clara")
        ),
        "{" + ", ".join(f'"key{n}": {n}' for n in range(40)) + "}",
        "| --- | --- | --- | --- | --- | --- |\n" * 2,
    ],
)
def test_what_repeats_for_a_reason_is_kept(text: str) -> None:
    assert score(text) <= 1


@settings(max_examples=30, deadline=None)
@given(rounds=st.integers(3, 40))
def test_more_rounds_never_score_less(rounds: int) -> None:
    loop = "the cat sat on the mat and looked out of the window "
    assert score(loop * (rounds + 1)) >= score(loop * rounds) - 1e-9


def test_the_same_short_answer_to_many_questions_is_kept() -> None:
    assert Repetition()(row(*["The shape is a circle."] * 20)).keep


def test_the_worst_answer_counts() -> None:
    verdict = Repetition()(row("A cat.", "the cat sat there " * 30, "A dog."))
    assert not verdict.keep
    assert verdict.reason
    assert verdict.score is not None and verdict.score > 1
