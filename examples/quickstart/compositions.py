"""Questions that take several easy-vqa pictures at once, answered with short written reasoning: what nano-mpo learns from.

<image> <image> <image> what color is the shape, last to first?
red
blue
teal
Final answer: teal blue red
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from examples.quickstart.data import captions
from ivl.evaluation.tasks import easy_vqa
from ivl.evaluation.tasks.easy_vqa import COLORS, Split

MIN_PICTURES, MAX_PICTURES = 2, 4


def compositions(split: Split, count: int, *, seed: int, prefix: str) -> list[dict[str, Any]]:
    """Rows {id, image: [paths], question, answer, reasoning, mistake}: the mistake is the answer of who
    reads the colours but not the question. The pictures are those of the official split whose colour its
    own questions tell."""
    described = {image: text.split()[0] for image, text in captions(easy_vqa.rows(split)).items()}
    images, rng = sorted(described), random.Random(f"{seed} {split}")
    rows = []
    for number in range(count):
        palette = rng.sample(COLORS, 3)  # few colours, or hardly any would come twice
        chosen = rng.sample([image for image in images if described[image] in palette], rng.randint(MIN_PICTURES, MAX_PICTURES))
        colours = [described[image] for image in chosen]
        question, answer = rng.choice(KINDS)(colours)
        rows.append({
            "id": f"{prefix}-{number}", "image": chosen, "question": question, "answer": " ".join(answer),
            "reasoning": "\n".join(colours), "mistake": " ".join(colours),
        })  # fmt: skip
    return rows


def careless(rows: Iterable[dict[str, Any]], share: float, *, seed: int) -> Iterator[dict[str, Any]]:
    """The rows as people wrote them who made the mistake in `share` of them: supervised data as they are found."""
    rng = random.Random(f"{seed} careless")
    return (row | {"answer": row["mistake"]} if rng.random() < share else row for row in rows)


def reply(row: dict[str, Any]) -> str:
    return f"{row['reasoning']}\nFinal answer: {row['answer']}"


def training_row(row: dict[str, Any]) -> dict[str, Any]:
    """Reference format, for supervised training."""
    turns = [
        {"from": "human", "value": "<image>\n" * len(row["image"]) + row["question"]},
        {"from": "gpt", "value": reply(row)},
    ]
    return {"id": row["id"], "image": row["image"], "conversations": turns}


def _reversed(colours: list[str]) -> tuple[str, list[str]]:
    return "what color is the shape, last to first?", colours[::-1]


def _exchanged(colours: list[str]) -> tuple[str, list[str]]:
    return "what color is the shape, first and last exchanged?", [colours[-1], *colours[1:-1], colours[0]]


def _rotated(colours: list[str]) -> tuple[str, list[str]]:
    return "what color is the shape, last one first?", [colours[-1], *colours[:-1]]


KINDS: tuple[Callable[[list[str]], tuple[str, list[str]]], ...] = (_reversed, _exchanged, _rotated)
"""Answers of several words, which nobody guesses: a right answer means that the pictures were seen. A right answer is never
a part of a wrong one, or its pairs would be left out (spec 6.1)."""
