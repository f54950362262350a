"""Answers and format problems of replies written by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl.errors import InputError
from ivl.evaluation.scoring import extract, fix_answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Two dogs.\nOne cat.\nFinal answer: 3", "3"),
        ("Two dogs.\n\nfinal answer: three animals.", "three animals."),
        ("a\nb\n**Final answer:** 3", "3"),
        ("a\nb\n**Final Answer: 3**", "3"),
        ("a\nb\nThe final answer is: x = 3\n", "x = 3"),
        ("a\nFinal answer: 2. Wait.\nb\nFinal answer: 3", "3"),
        ("a\nb\n\nFinal answer:\n3", "3"),
        ("看图。\n有两只狗。\n最终答案：2", "2"),
        ("看图。\n有两只狗。\n所以正确答案是：C", "C"),
        ("看图。\n有两只狗。\n最终答案是: 两只", "两只"),
        ("先看图。\n再想。\n答案: B", "B"),
        ("先看图。\n再想。\n**答案：** B", "B"),
        ("先看图，答案: 先不写。\n再想。\n最后答案：B", "B"),
        ("<think>先看图。\n再想。</think>\n最终答案：B", "B"),
    ],
)
def test_final_answer(reply: str, answer: str) -> None:
    found = extract(reply, "final_answer")
    assert (found.answer, found.problem) == (answer, None)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("Two dogs.\nOne cat.\n3", "no answer"),
        ("", "no answer"),
        ("a\nFinal answer: 1\nFinal answer: 2\nFinal answer: 3", "too many answers"),
        ("Two dogs and a cat. Final answer: 3", "too few lines"),
        ("Two dogs.\nFinal answer: 3", "too few lines"),
        ("\n\nFinal answer: 3", "no reasoning"),
        ("***\n\nFinal answer: 3", "no reasoning"),
        ("a\nb\nFinal answer: 3\nbecause there are", "answer of several lines"),
        ("a\nb\nFinal answer:", "empty answer"),
        ("a\nb\n**Final answer:**", "empty answer"),
    ],
)
def test_what_is_wrong_with_a_final_answer(reply: str, problem: str) -> None:
    found = extract(reply, "final_answer")
    assert (found.answer, found.problem) == (None, problem)


@pytest.mark.parametrize(
    ("reply", "answer", "problem"),
    [
        (r"So Answer: \boxed{3}", "3", None),
        (r"\boxed{1} no, \boxed{2}.", "2", None),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", None),
        (r"\boxed{1} and \boxed{2", "1", None),
        (r"\boxed{\boxed{4}}", "4", None),
        (r"{{ \boxed{4}", "4", None),
        (r"\boxed {4}", "4", None),
        (r"\boxed{ }", None, "empty answer"),
        (r"\boxed{2", None, "unclosed box"),
        (r"先看图。答案：\boxed{两只}", "两只", None),
        ("boxed 2", None, "no answer"),
    ],
)
def test_boxed(reply: str, answer: str | None, problem: str | None) -> None:
    found = extract(reply, "boxed")
    assert (found.answer, found.problem) == (answer, problem)


@pytest.mark.parametrize(
    ("reply", "answer", "problem"),
    [
        ("<think>Two and one.</think>\n<answer>3</answer>", "3", None),
        (r"<think>a</think><answer>\boxed{3}</answer>", "3", None),
        ("<think>a</think>3", None, "no answer"),
        ("<think>Look closely.</think>\n\\boxed{B}", "B", None),
        ("<think>So \\boxed{A}?</think>\nThe answer is \\boxed{B}.", "B", None),
        ("<think>Two and one.</think>\nFinal answer: 3", "3", None),
        ("<think>先看图。</think>\n最终答案：三只", "三只", None),
        ("<think>先看图。</think>\n答案：三只", "三只", None),
        ("<think>\\boxed{B}</think>", None, "no answer"),
        ("<think> </think>\\boxed{B}", None, "no reasoning"),
        ("<answer>3</answer>", None, "broken think tags"),
        ("<think>a<answer>3</answer>", None, "broken think tags"),
        ("<think>a</think><think>b</think><answer>3</answer>", None, "broken think tags"),
        ("</think>a<think><answer>3</answer>", None, "broken think tags"),
        ("<think>a</think><answer>3", None, "broken answer tags"),
        ("<think>a</think></answer>3<answer>", None, "broken answer tags"),
        ("<think>a<answer>3</answer></think>", None, "broken answer tags"),
        ("<think> </think><answer>3</answer>", None, "no reasoning"),
        ("<think>a</think><answer>3</answer> I hope.", None, "text outside the tags"),
        ("<think>a</think><answer></answer>", None, "empty answer"),
    ],
)
def test_think(reply: str, answer: str | None, problem: str | None) -> None:
    found = extract(reply, "think")
    assert (found.answer, found.problem) == (answer, problem)


def test_direct_and_unknown_styles() -> None:
    assert extract(" 3\n", "direct").answer == "3" and extract(" ", "direct").problem == "empty answer"
    with pytest.raises(InputError, match="'loud'"):
        extract("3", "loud")  # type: ignore[arg-type]


@given(
    st.text(st.sampled_from("a1{}\\\n: ") | st.characters(), max_size=60),
    st.sampled_from(("direct", "final_answer", "boxed", "think")),
)
def test_a_reply_has_either_an_answer_or_a_problem(reply: str, style: str) -> None:
    found = extract(reply, style)  # type: ignore[arg-type]
    assert (found.answer is None) != (found.problem is None) and found.answer != ""


def test_long_replies_are_read_in_one_pass() -> None:
    for piece in (r"\boxed{", "{", "Final answer", "**", "\n", "<think>", "\\", "最终答案 "):
        for style in ("final_answer", "boxed", "think"):
            assert extract(piece * 50_000, style).problem  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "truth", "fixed"),
    [
        ("5 cm", "5", "5"), ("B. cat", "B", "B"), ("The dog", "dog", "dog"), ("红色的球", "红色", "红色"), ("5", "5", "5"),
        ("12", "1", "12"), ("-5", "5", "-5"), ("1.5", "5", "1.5"), ("1,500", "500", "1,500"), ("cat", "dog", "cat"),
        ("CAT", "cat", "cat"), ("5", "", "5"),
    ],
)  # fmt: skip
def test_fix_answer(answer: str, truth: str, fixed: str) -> None:
    reply = f"I see {answer}.\nSo\nFinal answer: {{}}!"
    assert fix_answer(reply.format(answer), answer, truth) == reply.format(fixed)
