"""Boxes are parsed, scaled and drawn; what is malformed is reported."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl.boxes import Grounding, format_boxes, from_pixels, parse_boxes, to_pixels
from ivl.errors import InputError

corner = st.integers(0, 1000)
box = st.tuples(corner, corner, corner, corner).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@given(st.text(st.characters(exclude_characters="<>")), st.lists(box, min_size=1, max_size=4))
def test_written_boxes_are_read_back(phrase, boxes):
    parsed = parse_boxes(f"See {format_boxes(phrase, boxes)}.")
    assert parsed.groundings == (Grounding(phrase, tuple(boxes)),) and not parsed.problems


def test_several_in_one_text():
    text = "<ref>a cat</ref><box>[[1, 2, 3, 4],[5,6,7,8]]</box> near <box>[[0, 0, 1000, 1000]]</box> and <ref>a dog</ref>."
    parsed = parse_boxes(text)
    assert parsed.groundings == (
        Grounding("a cat", ((1, 2, 3, 4), (5, 6, 7, 8))),
        Grounding("", ((0, 0, 1000, 1000),)),
    )
    assert not parsed.problems


@pytest.mark.parametrize(
    "body",
    ["", "[]", "[[]]", "[1, 2, 3, 4]", "[[1, 2, 3]]", "[[1, 2, 3, 4, 5]]", "[[1, 2, 3, 1001]]", "[[3, 2, 1, 4]]",
     "[[1, 4, 3, 2]]", "[[-1, 2, 3, 4]]", "[[1.5, 2, 3, 4]]", "[[1, 2, 3, 4]", "[[1, 2, 3, 4] [1, 2, 3, 4]]", "[[1, 2, 3, x]]",
     "[[1, 2, 3, 4], [9, 9, 9]]", "[[1, 2, 3, 4]]]", "[[٣, 2, 4, 4]]"],
)  # fmt: skip
def test_malformed_boxes_are_reported(body):
    parsed = parse_boxes(f"<ref>cat</ref><box>{body}</box>")
    assert not parsed.groundings and len(parsed.problems) == 1 and "<ref>cat</ref>" in parsed.problems[0]


def test_unclosed():
    assert parse_boxes("<ref>a</ref><box>[[1, 2, 3, 4]]").problems == ("<box> without its partner",)
    assert parse_boxes("[[1, 2, 3, 4]]</box>").problems == ("</box> without its partner",)
    again = parse_boxes("<box>[[1, 2 <ref>b</ref><box>[[1, 2, 3, 4]]</box>")
    assert again.groundings == (Grounding("b", ((1, 2, 3, 4),)),) and again.problems == ("<box> without its partner",)


def test_scaling():
    assert from_pixels((0, 0, 640, 480), 640, 480) == (0, 0, 1000, 1000)
    assert from_pixels((1, 1, 2, 2), 16, 2000) == (62, 0, 125, 1)  # 62.5 and 0.5 go to even
    assert to_pixels((62, 0, 125, 1000), 16, 2000) == (0.992, 0, 2.0, 2000)
    with pytest.raises(InputError, match="within 640 x 480"):
        from_pixels((0, 0, 641, 480), 640, 480)


@given(box, st.integers(1000, 5000), st.integers(1000, 5000))
def test_there_and_back(thousandths, width, height):
    assert from_pixels(to_pixels(thousandths, width, height), width, height) == thousandths
