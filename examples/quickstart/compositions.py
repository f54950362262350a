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
    """Make rows {id, image: [paths], question, answer, reasoning, mistake}.

    The mistake is the answer of somebody who reads the colors but not the question.

    Args:
        split: official split of the pictures; those whose questions tell the color are used.
        count: number of rows.
        seed: seed of the draws.
        prefix: start of every id.
    """
    described = {image: text.split()[0] for image, text in captions(easy_vqa.rows(split)).items()}
    images, rng = sorted(described), random.Random(f"{seed} {split}")
    rows = []
    for number in range(count):
        palette = rng.sample(COLORS, 3)  # of few colors, so that some come twice
        chosen = rng.sample([image for image in images if described[image] in palette], rng.randint(MIN_PICTURES, MAX_PICTURES))
        colors = [described[image] for image in chosen]
        question, answer = rng.choice(KINDS)(colors)
        rows.append({
            "id": f"{prefix}-{number}", "image": chosen, "question": question, "answer": " ".join(answer),
            "reasoning": "\n".join(colors), "mistake": " ".join(colors),
        })  # fmt: skip
    return rows


def careless(rows: Iterable[dict[str, Any]], share: float, *, seed: int) -> Iterator[dict[str, Any]]:
    """Replace the answer by the mistake in `share` of the rows: supervised data as hurried people write them."""
    rng = random.Random(f"{seed} careless")
    return (row | {"answer": row["mistake"]} if rng.random() < share else row for row in rows)


def reply(row: dict[str, Any]) -> str:
    """Write the reasoning and the answer as one reply."""
    return f"{row['reasoning']}\nFinal answer: {row['answer']}"


def training_row(row: dict[str, Any]) -> dict[str, Any]:
    """Put a row into the reference format of training rows."""
    turns = [
        {"from": "human", "value": "<image>\n" * len(row["image"]) + row["question"]},
        {"from": "gpt", "value": reply(row)},
    ]
    return {"id": row["id"], "image": row["image"], "conversations": turns}


def _reversed(colors: list[str]) -> tuple[str, list[str]]:
    return "what color is the shape, last to first?", colors[::-1]


def _exchanged(colors: list[str]) -> tuple[str, list[str]]:
    return "what color is the shape, first and last exchanged?", [colors[-1], *colors[1:-1], colors[0]]


def _rotated(colors: list[str]) -> tuple[str, list[str]]:
    return "what color is the shape, last one first?", [colors[-1], *colors[:-1]]


KINDS: tuple[Callable[[list[str]], tuple[str, list[str]]], ...] = (_reversed, _exchanged, _rotated)
"""Kinds of questions. Answers have several words, which nobody guesses. A right answer is never part of a wrong one, for
ivl.preference.pairs leaves out such pairs."""
