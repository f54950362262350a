"""Questions that take several easy-vqa pictures at once, answered with short written reasoning: what nano-mpo learns from.

    <image> <image> <image> how many pictures show a circle?
    red circle
    blue triangle
    red circle
    Final answer: 2
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from ivl.data import easy_vqa
from ivl.data.easy_vqa import COLOURS, SHAPES, Split

MIN_PICTURES, MAX_PICTURES = 2, 4
Pictures = list[tuple[str, str]]
"""Colour and shape of each."""


def compositions(split: Split, count: int, *, seed: int, prefix: str) -> list[dict[str, Any]]:
    """Rows {id, image: [paths], question, answer, reasoning}. The pictures are those of the official split whose colour and
    shape its own questions tell."""
    described = {image: tuple(text.split()) for image, text in easy_vqa.captions(easy_vqa.rows(split)).items()}
    images, rng = sorted(described), random.Random(f"{seed} {split}")
    rows = []
    for number in range(count):
        chosen = rng.sample(images, rng.randint(MIN_PICTURES, MAX_PICTURES))
        pictures: Pictures = [described[image] for image in chosen]  # type: ignore[misc]
        question, answer = rng.choice(KINDS)(pictures, rng)
        rows.append({
            "id": f"{prefix}-{number}", "image": chosen, "question": question, "answer": answer,
            "reasoning": "\n".join(" ".join(picture) for picture in pictures),
        })  # fmt: skip
    return rows


def reply(row: dict[str, Any]) -> str:
    return f"{row['reasoning']}\nFinal answer: {row['answer']}"


def training_row(row: dict[str, Any]) -> dict[str, Any]:
    """Reference format, for supervised training."""
    turns = [
        {"from": "human", "value": "<image>\n" * len(row["image"]) + row["question"]},
        {"from": "gpt", "value": reply(row)},
    ]
    return {"id": row["id"], "image": row["image"], "conversations": turns}


def _count_shape(pictures: Pictures, rng: random.Random) -> tuple[str, str]:
    wanted = rng.choice(SHAPES)
    return f"how many pictures show a {wanted}?", str(sum(shape == wanted for _, shape in pictures))


def _count_colour(pictures: Pictures, rng: random.Random) -> tuple[str, str]:
    # Half of the time a colour that is there: of eight, most are not.
    wanted = rng.choice(pictures)[0] if rng.random() < 0.8 else rng.choice(COLOURS)
    return f"how many pictures show a {wanted} shape?", str(sum(colour == wanted for colour, _ in pictures))


def _count_different(pictures: Pictures, rng: random.Random) -> tuple[str, str]:
    part = rng.choice(("colors", "shapes"))
    return f"how many {part} are there?", str(len({picture[part == "shapes"] for picture in pictures}))


def _same(pictures: Pictures, rng: random.Random) -> tuple[str, str]:
    part = rng.choice(("color", "shape"))
    found = [picture[part == "shape"] for picture in pictures]
    return f"is the first {part} the last {part}?", "yes" if found[0] == found[-1] else "no"


KINDS: tuple[Callable[[Pictures, random.Random], tuple[str, str]], ...] = (
    _count_shape, _count_colour, _count_different, _same,
)  # fmt: skip
