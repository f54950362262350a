"""Laws of the rules: what they drop, what they must keep, and that nothing makes them raise, waver or crawl."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl.filters.repetition import Repetition
from ivl.filters.rules import Leaks, Length, RepeatedLines, Rule, Runs, Truncated
from ivl.filters.text import reply_texts
from ivl.types import Message, Record, Text

RULES: dict[str, Rule] = {
    "length": Length(),
    "runs": Runs(),
    "repeated_lines": RepeatedLines(),
    "truncated": Truncated(),
    "leaks": Leaks(),
    "repetition": Repetition(),
}


def row(*answers: str, question: str = "What is this?") -> Record:
    talk = []
    for answer in answers:
        talk += [Message("user", (Text(question),)), Message("assistant", (Text(answer),))]
    return Record("r", (tuple(talk),), "rows.jsonl:1")


def dropped_by(record: Record) -> set[str]:
    return {name for name, rule in RULES.items() if not rule(record).keep}


CLEAN = [
    "yes",
    "B",
    "42",
    "是",
    "a red circle",
    "A man riding a horse on the beach",
    "The shape is a circle.",
    "(C)",
    "3.5 m",
    "The cat is on the left. It looks at the camera, and its tail is hidden.",
    "Both sides are equal, so the angle is 45 degrees. The answer is B",
    "We get $x = \\frac{1}{2}$.\n\\begin{align}\nx &= \\left(1\\right)\n\\end{align}",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28",
    "| a | b | c |\n| --- | --- | --- |\n| 1 | yes | 0 |\n| 2 | yes | 0 |\n| 3 | no | 0 |\n| 4 | yes | 0 |",
    "```python\nfor i in range(10):\n    print(i)\n```",
    "for i in range(10):\n    print(i)\nprint('done')",
    "[[0, 0, 1], [0, 1, 0], [1, 0, 0]]",
    "<ref>the cat</ref><box>[[0, 10, 999, 1000], [5, 5, 6, 6]]</box>",
    "- Open the door\n- Take the key\n- Close the door",
    "Section\n=======\n\nText under a ruler.\n\n----------------------------------------\n\nMore text under another.",
    "图片中央有一个红色的圆形，背景是白色的。",
    "Die Größe beträgt 3 m.",
    "C'est très bien fait – n'est-ce pas ?",
    "La la la, sings the bird,\nLa la la, sings the bee,\nand nobody has ever heard\nwhat they sing to me.",
    "The 1,000,000 and the 1e10 and 0.0001 and 2000 are numbers.",
    "Yes 👍🏽👨‍👩‍👧 ✓ → ½ µm ≤ 5 °C",
    "Use `<b>` for bold text, and <b>this</b> is bold.",
]


@pytest.mark.parametrize("answer", CLEAN)
def test_clean_answers_stay(answer: str) -> None:
    assert not dropped_by(row(answer))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("length", "x " * 30_000),
        ("length", "word" * 200 + " ends."),
        ("length", "one two " * 500),
        ("runs", "the code is 000000000000000000000000"),
        ("runs", "0, " * 40),
        ("runs", "0.0 " * 40),
        ("runs", "0x00 " * 40),
        ("runs", "0000000100000000000000000000000000000000000000003000000000000000000000000000"),
        ("runs", "yesssssssssssssssssssssss"),
        ("runs", "！" * 60),
        ("repeated_lines", "It is a red circle here.\n" * 5),
        ("truncated", "The picture shows a cat. It lies on a"),
        ("truncated", "The picture shows a cat. It lies on the left si"),
        ("truncated", "There are three things on the table: a cup, a spoon,"),
        ("truncated", "1. The cat is black.\n2. The dog is white.\n3. The bird has not bee"),
        ("truncated", "We see three people at the beach. They all wear ("),
        ("truncated", "A man rides a horse along the beach in the evening while the sun goes"),
        ("truncated", "The picture shows a cat.\nIt lies on\na"),
        ("leaks", "<image>\nA cat."),
        ("leaks", "A cat.<|im_end|>"),
        ("leaks", "A cat <IMG_CONTEXT> here."),
        ("leaks", "A cat.\n### Human: What else?"),
    ],
)
def test_faults_are_dropped_with_a_reason(name: str, answer: str) -> None:
    record = row(answer)
    assert name in dropped_by(record)
    assert RULES[name](record).reason


def test_any_answer_of_any_conversation_counts() -> None:
    good, bad = row("A cat.").conversations[0], row("A cat</img>.").conversations[0]
    assert not Leaks()(Record("r", (good, bad), "f:1")).keep
    assert not Leaks()(row("A cat.", "A cat</img>.", "A dog.")).keep


def test_special_tokens_in_a_question_are_leaks_too() -> None:
    assert not Leaks()(row("A cat.", question="What<|im_end|> is this?")).keep


@pytest.mark.parametrize(
    "answer",
    [
        "A man rides a horse along the beach in the evening",
        "The picture shows a cat. See https://example.com/cats",
        "The picture shows two cats. The number of dogs in it is 0",
        "The picture shows two cats. So the right option must be C",
        "The picture shows two cats.\n\nBest regards,\nAnna",
        "Do this.\n\n- Take the key on the table\n- Open the door with the key\n- Close the door behind you",
        "It gives the sum.\n\n>>> add(1, 2) == 3 and add(2, 3) == 5 and add(0, 0) == 0\nTrue",
    ],
)
def test_endings_that_are_no_truncation(answer: str) -> None:
    assert Truncated()(row(answer)).keep


def test_answers_text_is_what_the_assistant_says() -> None:
    assert reply_texts(row("a", "b")) == ["a", "b"]


def test_thresholds_are_checked() -> None:
    with pytest.raises(ValueError, match="min_answer"):
        Length(min_answer=5, max_answer=4)
    with pytest.raises(ValueError, match="ngram"):
        Repetition(ngram=1)


PIECES = st.sampled_from(
    [
        "a",
        "0",
        " ",
        "\n",
        "```",
        "`",
        "<ref>",
        "</ref>",
        "<box>",
        "[[",
        "]]",
        "$$",
        "\\(",
        "\\left",
        "\\begin{a}",
        "{",
        "}",
        "<div>",
        "</b>",
        "<|",
        "|>",
        "### Human:",
        ">>> ",
        "| ",
        "- ",
        "1. ",
        "。",
        "一",
        "é",
        "\ufffd",
        "\x00",
        "\ud800",
        "The cat is",
        ".",
        ",",
        "://",
        "0x00",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(PIECES, max_size=60).map("".join)), st.integers(1, 30))
def test_rules_never_raise_and_never_waver(piece: str, times: int) -> None:
    record = row(piece * times)
    for rule in RULES.values():
        assert rule(record) == rule(record)


HOSTILE = [
    "a",
    "0",
    "0 ",
    " ",
    "\n",
    "`",
    "```\n",
    "<div>",
    "<ref>",
    "<box>",
    "<box>[[1, 2, 3, 4]]",
    "$",
    "\\(",
    "\\left",
    "\\begin{a}",
    "{",
    "> ",
    "一",
    "Ã",
    "- ",
    ">>> ",
    "| ",
    "1. ",
    "\ud800",
    ". ",
    "(",
    '"',
    "a b c d ",
    "ab\n",
    "#",
    "://",
    "<a ",
    "=\n",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_grows_with_the_text_and_no_faster(piece: str) -> None:
    """Ten times the text may take at most 40 times as long, and 100,000 characters a second (they take about 0.1 s)."""
    for name, rule in RULES.items():
        seconds = []
        for size in (10_000, 100_000):
            record = row((piece * size)[:size])
            started = time.process_time()
            rule(record)
            seconds.append(time.process_time() - started)
        assert seconds[1] < max(40 * seconds[0], 1.0), (name, seconds)
