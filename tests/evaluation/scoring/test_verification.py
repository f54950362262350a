"""Laws of verification, and the limits of comparing formulas."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ivl.errors
from ivl.errors import InputError
from ivl.evaluation.scoring import AnswerMode, compare, formulas, mode_for
from ivl.evaluation.scoring.metrics import edit_distance
from ivl.utils.killable import CallStopped

TEXT_MODES = ("exact", "anls", "vqa", "relaxed", "choice", "number", "auto")
SYMMETRIC = ("exact", "anls", "vqa")
PIECES = [
    "5", "-", ".", ",", "%", "cm", " ", "1/2", "\\frac{", "}", "{", "(", ")", "^", "$", "A", "B", "or", "yes", "not", "三", "½",
    "=",
]  # fmt: skip
ANSWERS = (
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=30) | st.text(st.characters(), max_size=30)
)
few = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


@few
@given(ANSWERS, ANSWERS, st.sampled_from(TEXT_MODES[:-1]), st.lists(ANSWERS, max_size=4))
def test_any_text_has_a_score(prediction: str, truth: str, mode: str, choices: list[str]) -> None:
    assert 0 <= compare(prediction, truth, mode=mode, choices=choices).score <= 1  # type: ignore[arg-type]


@needs_math_verify
@settings(few, max_examples=60)
@given(ANSWERS, ANSWERS, st.sampled_from(("math", "auto", "geometry", "mavis")))
def test_any_formula_has_a_score(prediction: str, truth: str, mode: str) -> None:
    assert compare(prediction, truth, mode=mode).score in (0, 1)  # type: ignore[arg-type]


@few
@given(ANSWERS, st.sampled_from(TEXT_MODES))
def test_an_answer_is_right_about_itself_unless_empty(text: str, mode: str) -> None:
    assert compare(text, text, mode=mode).correct == bool(text.strip())  # type: ignore[arg-type]


@few
@given(ANSWERS, ANSWERS, st.sampled_from(SYMMETRIC))
def test_the_same_score_both_ways(a: str, b: str, mode: str) -> None:
    assert compare(a, b, mode=mode).score == compare(b, a, mode=mode).score  # type: ignore[arg-type]


@few
@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_equal_or_not_in_every_spelling(a: int, b: int) -> None:
    for mode in ("number", "auto"):
        assert compare(f"{a:,}", str(b), mode=mode).correct == (a == b)
        assert compare(f" {a}.0", f"{b:,}", mode=mode).correct == (a == b) or abs(a - b) <= abs(b) / 1000


@few
@given(st.text("abcde ", max_size=12), st.text("abcde ", max_size=12))
def test_anls_falls_with_the_distance(a: str, b: str) -> None:
    said, meant = (" ".join(text.split()) for text in (a, b))
    if said and meant:
        share = edit_distance(said, meant) / max(len(a), len(b))
        assert compare(a, b, mode="anls").score == pytest.approx(1 - share if share <= 0.5 else 0)


def test_several_truths() -> None:
    assert compare("5", ["4", "5"]).correct and not compare("6", ["4", "5"]).correct
    assert compare("red", ["red"] * 3 + ["blue"] * 7, mode="vqa").score == pytest.approx(0.9)
    with pytest.raises(InputError, match="no truth"):
        compare("5", [])
    with pytest.raises(InputError, match="'maths'"):
        compare("5", "5", mode="maths")  # type: ignore[arg-type]


FOUR = ("a cat", "a dog", "a cow", "a pig")


@pytest.mark.parametrize("truth", ["AC", "A, C", "A,C", "C, A", "A and C", "Ａ，Ｃ", "A、C", "(A)(C)", "A C"])
def test_several_right_options_in_every_spelling(truth: str) -> None:
    right = (
        "AC", "CA", "A, C", "A,C", "C,A", "A and C", "A & C", "C; A", "Ａ、Ｃ", "ＡＣ", "A和C", "(A), (C)", "A, C.", "ac",
        "The answer is A and C", "Options A and C", "选项A、C", "**A, C**", "A C", "Both A and C", "A/C", "A + C",
    )  # fmt: skip
    wrong = ("A", "A, B", "A, B, C", "ABC", "B", "a cat", "A or C", "", "A, E", "all", "neither A nor C", "A/B")
    assert {text: compare(text, truth, mode="choice", choices=FOUR).score for text in right} == dict.fromkeys(right, 1.0)
    assert {text: compare(text, truth, mode="choice", choices=FOUR).score for text in wrong} == dict.fromkeys(wrong, 0.0)


def test_letters_without_known_options() -> None:
    pairs = [("A, C", "AC"), ("AC", "A,C"), ("C and A", "A, C"), ("AB", "AB"), ("A,B,C,D,E,F,G,H,I", "ABCDEFGHI")]
    for mode in ("choice", "auto"):
        assert [compare(*pair, mode=mode).score for pair in pairs] == [1.0] * len(pairs)
        # The names of a segment or an angle, and quotients, are no sets of options.
        for pair in (("ACB", "ABC"), ("b/a", "a/b"), ("A", "A, C"), ("A, B", "B"), ("B", "AB")):
            assert compare(*pair, mode=mode).score == 0, pair


def test_composed_and_decomposed_letters_are_the_same() -> None:
    for mode in ("exact", "vqa", "auto"):
        assert compare("cafe\u0301", "café", mode=mode).score == 1
    assert compare("cafe", "café", mode="exact").score == 0


def test_modes_of_data_sets() -> None:
    named = {
        "ChartQA_train": "relaxed", "docvqa": "anls", "InfographicsVQA": "anls", "SROIE": "geometry", "CLEVR-Math": "geometry",
        "GeoQA+": "geometry", "mavis_function": "mavis", "m3cot": "auto",
    }  # fmt: skip
    assert {name: mode_for(name) for name in named} == named


@needs_math_verify
def test_a_formula_beyond_its_limits_counts_as_different_and_the_next_is_compared() -> None:
    hostile, truth = "(x+1)^{100000}", "(x+2)^{100000}"
    verdict = compare(hostile, truth, mode="math")
    assert verdict.score == 0
    assert verdict.stopped == f"the comparison of '{truth}' and '{hostile}' took more than 1 s of processor time"
    assert compare(r"\frac{1}{2}x", r"\frac{x}{2}", mode="math").correct


def test_a_verdict_names_a_comparison_that_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(truth: str, prediction: str) -> bool:
        raise CallStopped("more than 1 s of processor time")

    monkeypatch.setattr(formulas, "verified", stopped)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name)
    verdict = compare("x^2+1", ["x^2+z", "x^2+w"], mode="math")
    assert verdict.score == 0 and not verdict.correct
    assert verdict.stopped == "the comparison of 'x^2+z' and 'x^2+1' took more than 1 s of processor time"
    assert compare("x^2+1", ["x^2+z", "x^2+1"], mode="math").stopped == ""


def test_importing_is_light() -> None:
    code = (
        "import sys, types; package = sys.modules['ivl'] = types.ModuleType('ivl'); package.__path__ = [sys.argv[1]]; "
        "import ivl.evaluation.scoring; "
        "print(sorted({'sympy', 'math_verify', 'rapidfuzz', 'numpy', 'torch'} & set(sys.modules)))"
    )
    room = str(Path(ivl.errors.__file__).parent)
    assert subprocess.run([sys.executable, "-c", code, room], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_without_the_libraries_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "math_verify" else find_spec(name, *rest)
    )
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(InputError, match=r"math-verify.*ivl\[eval\]"):
        compare("x", "y", mode="math")
    with pytest.raises(InputError, match=r"rapidfuzz.*ivl\[eval\]"):
        compare("hello", "hallo", mode="anls")


@pytest.mark.parametrize("mode", ["exact", "anls", "relaxed", "vqa", "auto"])
def test_composed_and_decomposed_accents_are_the_same(mode: AnswerMode) -> None:
    assert compare("cafe\u0301", "caf\u00e9", mode=mode).score == compare("caf\u00e9", "cafe\u0301", mode=mode).score == 1.0
