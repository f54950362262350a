"""Grounding: `<ref>phrase</ref><box>[[x1, y1, x2, y2], ...]</box>`, the form of InternVL's training data.

Coordinates run from 0 to 1000 over the whole image, whatever its tiles.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ivl.errors import InputError

SCALE = 1000
Box = tuple[int, int, int, int]
"""Left, top, right, bottom, each from 0 to 1000."""
_MARKED = re.compile(r"(?:<ref>(?P<phrase>(?:(?!<ref>|</?box>).)*?)</ref>\s*)?<box>(?P<body>(?:(?!<box>).)*?)</box>", re.DOTALL)
_BODY = re.compile(r"\s*\[\s*(?:\[[^\[\]]*\]\s*,\s*)*\[[^\[\]]*\]\s*\]\s*")


@dataclass(frozen=True)
class Grounding:
    """A phrase and its boxes; the phrase is empty for boxes without `<ref>`."""

    phrase: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class ParsedBoxes:
    """The boxes of a text."""

    groundings: tuple[Grounding, ...]
    problems: tuple[str, ...]
    """Malformed boxes, each with its text. None of them is in groundings."""


def parse_boxes(text: str) -> ParsedBoxes:
    """Read all groundings of a text, in order. A `<box>` with a malformed entry is a problem as a whole, never repaired."""
    groundings: list[Grounding] = []
    problems: list[str] = []
    for match in _MARKED.finditer(text):
        try:
            groundings.append(Grounding(match["phrase"] or "", _boxes(match["body"])))
        except ValueError as error:
            problems.append(f"{error} in {match[0]!r}")
    rest = _MARKED.sub("", text)
    problems += [f"{mark} without its partner" for mark in re.findall("</?box>", rest)]
    return ParsedBoxes(tuple(groundings), tuple(problems))


def _boxes(body: str) -> tuple[Box, ...]:
    if not _BODY.fullmatch(body):
        raise ValueError("not a list of boxes [[x1, y1, x2, y2], ...]")
    boxes: list[Box] = []
    for entry in re.findall(r"\[([^\[\]]*)\]", body):
        numbers = [number.strip() for number in entry.split(",")]
        if len(numbers) != 4 or not all(re.fullmatch(r"\d{1,9}", number, re.ASCII) for number in numbers):
            raise ValueError(f"[{entry}] is not four whole numbers")
        x1, y1, x2, y2 = map(int, numbers)
        _check((x1, y1, x2, y2), SCALE, SCALE)
        boxes.append((x1, y1, x2, y2))
    return tuple(boxes)


def _check(box: Sequence[float], width: float, height: float) -> None:
    x1, y1, x2, y2 = box
    if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height):
        raise ValueError(f"box {list(box)} is not left, top, right, bottom within {width} x {height}")


def format_boxes(phrase: str, boxes: Sequence[Box]) -> str:
    """Write a grounding as training data do."""
    for box in boxes:
        _check(box, SCALE, SCALE)
    return f"<ref>{phrase}</ref><box>[{', '.join(str(list(box)) for box in boxes)}]</box>"


def from_pixels(box: Sequence[float], width: int, height: int) -> Box:
    """Convert pixel coordinates to thousandths, each rounded to the nearest (halves to even, as the reference does).

    Raises:
        InputError: if the box is not left, top, right, bottom inside the image.
    """
    try:
        _check(box, width, height)
    except ValueError as error:
        raise InputError(str(error)) from error
    x1, y1, x2, y2 = box
    return round(x1 / width * SCALE), round(y1 / height * SCALE), round(x2 / width * SCALE), round(y2 / height * SCALE)


def to_pixels(box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    """Convert thousandths to pixel coordinates, not rounded."""
    x1, y1, x2, y2 = box
    return x1 * width / SCALE, y1 * height / SCALE, x2 * width / SCALE, y2 * height / SCALE
