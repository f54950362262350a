"""Boxes in replies, and the overlap of boxes and of intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2."""
_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_BRACKETED = re.compile(rf"\[\s*({_NUMBER})" + rf"(?:\s*,\s*|\s+)({_NUMBER})" * 3 + r"\s*\]")


def box_in(reply: str) -> Corners | None:
    """Return the first four numbers in brackets, else the first four numbers, as VLMEvalKit does."""
    match = _BRACKETED.search(reply)
    numbers = match.groups() if match else re.findall(_NUMBER, reply)[:4]
    if len(numbers) < 4:
        return None
    x1, y1, x2, y2 = map(float, numbers)
    return x1, y1, x2, y2


def in_pixels(box: Corners, width: float, height: float) -> Corners:
    """Scale fractions (up to 1.5) or thousandths (up to 1000) to pixels, clip to the picture and order the corners."""
    largest = max(map(abs, box))
    scale = 1.0 if largest <= 1.5 else 0.001 if largest <= 1000 else None
    x1, y1, x2, y2 = (
        min(max(value if scale is None else value * scale * side, 0.0), side)
        for value, side in zip(box, (width, height) * 2, strict=True)
    )
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def reference_box(reply: str, width: float, height: float) -> Corners:
    """Return the first bracketed quadruple in pixels, as InternVL's own code: thousandths if the four sum to 4 or more.

    Corners are neither ordered nor clipped; a reply without four numbers is the box of zeros.
    """
    for line in reply.split("\n"):
        parts = line[line.find("[") :].lstrip("[").split(",", 3) if "[" in line else []
        if len(parts) < 4 or "]" not in parts[3]:
            continue
        try:
            values = [float(part) for part in (*parts[:3], parts[3].partition("]")[0])]
        except ValueError:
            break
        scale = 0.001 if sum(values) >= 4 else 1.0
        x1, y1, x2, y2 = (value * scale * side for value, side in zip(values, (width, height) * 2, strict=True))
        return x1, y1, x2, y2
    return 0.0, 0.0, 0.0, 0.0


def overlap(a: Corners, b: Corners) -> float:
    """Return the intersection over union of two boxes; 0 for boxes without an area in common."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if not (width > 0 and height > 0):
        return 0.0
    inner = width * height
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - inner
    return inner / union if union > 0 and math.isfinite(union) else 0.0


def interval_overlap(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Return the intersection over union of two unions of intervals."""
    a, b = _merged(a), _merged(b)
    inner = sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in a for start, stop in b)
    union = sum(end - begin for begin, end in (*a, *b)) - inner
    return inner / union if union > 0 and math.isfinite(union) else 0.0


def _merged(intervals: Sequence[Sequence[float]]) -> list[list[float]]:
    merged: list[list[float]] = []
    for begin, end in sorted(intervals, key=lambda interval: interval[0]):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged
