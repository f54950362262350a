"""Questions that take several easy-vqa pictures at once, answered with short written reasoning: what nano-mpo learns from.

<image> <image> <image> what color is not red?
red
blue
teal
Final answer: blue teal
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from ivl.data import easy_vqa
from ivl.data.easy_vqa import COLOURS, Split

MIN_PICTURES, MAX_PICTURES = 2, 4


def compositions(split: Split, count: int, *, seed: int, prefix: str) -> list[dict[str, Any]]:
    """Rows {id, image: [paths], question, answer, reasoning}. The pictures are those of the official split whose colour its
    own questions tell."""
    described = {image: text.split()[0] for image, text in easy_vqa.captions(easy_vqa.rows(split)).items()}
    images, rng = sorted(described), random.Random(f"{seed} {split}")
    rows = []
    for number in range(count):
        palette = rng.sample(COLOURS, 3)  # few colours, or hardly any would come twice
        chosen = rng.sample([image for image in images if described[image] in palette], rng.randint(MIN_PICTURES, MAX_PICTURES))
        colours = [described[image] for image in chosen]
        question, answer = rng.choice(KINDS)(colours, rng)
        rows.append({
            "id": f"{prefix}-{number}", "image": chosen, "question": question, "answer": answer,
            "reasoning": "\n".join(colours),
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


def _reversed(colours: list[str], rng: random.Random) -> tuple[str, str]:
    return "what color is the shape, last to first?", " ".join(reversed(colours))


def _different(colours: list[str], rng: random.Random) -> tuple[str, str]:
    return "what color is there?", " ".join(dict.fromkeys(colours))


def _without(colours: list[str], rng: random.Random) -> tuple[str, str]:
    unwanted = rng.choice(colours)
    return f"what color is not {unwanted}?", " ".join(colour for colour in colours if colour != unwanted) or "no"


KINDS: tuple[Callable[[list[str], random.Random], tuple[str, str]], ...] = (_reversed, _different, _without)
"""Answers of several words, which nobody guesses: a right answer means that the pictures were seen."""
