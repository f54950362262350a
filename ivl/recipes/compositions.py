"""Questions that take several easy-vqa pictures at once, answered with short written reasoning: what nano-mpo learns from.

<image> <image> <image> what color is not red?
red
blue
teal
Final answer: blue teal
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ivl.data import easy_vqa
from ivl.data.easy_vqa import COLOURS, Split

MIN_PICTURES, MAX_PICTURES = 2, 4


def compositions(split: Split, count: int, *, seed: int, prefix: str) -> list[dict[str, Any]]:
    """Rows {id, image: [paths], question, answer, reasoning, mistake}: a mistake is a wrong answer that careless people give,
    or the right one where the pictures leave no room for it. The pictures are those of the official split whose colour its
    own questions tell."""
    described = {image: text.split()[0] for image, text in easy_vqa.captions(easy_vqa.rows(split)).items()}
    images, rng = sorted(described), random.Random(f"{seed} {split}")
    rows = []
    for number in range(count):
        palette = rng.sample(COLOURS, 3)  # few colours, or hardly any would come twice
        chosen = rng.sample([image for image in images if described[image] in palette], rng.randint(MIN_PICTURES, MAX_PICTURES))
        colours = [described[image] for image in chosen]
        question, answer, mistake = rng.choice(KINDS)(colours, rng)
        rows.append({
            "id": f"{prefix}-{number}", "image": chosen, "question": question, "answer": answer,
            "reasoning": "\n".join(colours), "mistake": mistake,
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


Posed = tuple[str, str, str]
"""Question, answer, mistake."""


def _reversed(colours: list[str], rng: random.Random) -> Posed:
    return "what color is the shape, last to first?", " ".join(reversed(colours)), " ".join(colours)


def _different(colours: list[str], rng: random.Random) -> Posed:
    return "what color is there?", " ".join(dict.fromkeys(colours)), " ".join(colours)


def _without(colours: list[str], rng: random.Random) -> Posed:
    unwanted = rng.choice(colours)
    others = [colour for colour in colours if colour != unwanted]
    return f"what color is not {unwanted}?", " ".join(others) or "no", " ".join(dict.fromkeys(colours))


KINDS: tuple[Callable[[list[str], random.Random], Posed], ...] = (_reversed, _different, _without)
"""Answers of several words, which nobody guesses: a right answer means that the pictures were seen."""
