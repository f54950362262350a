"""Questions that take several easy-vqa pictures at once, answered with short written reasoning: what nano-mpo learns from.

<image> <image> <image> how many pictures show a red shape?
red
blue
red
Final answer: 2
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from ivl.data import easy_vqa
from ivl.data.easy_vqa import COLOURS, Split

MIN_PICTURES, MAX_PICTURES = 3, 6


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


def _count(colours: list[str], rng: random.Random) -> tuple[str, str]:
    # Mostly a colour that is there: of eight, few are.
    wanted = rng.choice(colours) if rng.random() < 0.8 else rng.choice(COLOURS)
    return f"how many pictures show a {wanted} shape?", str(colours.count(wanted))


def _count_different(colours: list[str], rng: random.Random) -> tuple[str, str]:
    return "how many colors are there?", str(len(set(colours)))


def _same(colours: list[str], rng: random.Random) -> tuple[str, str]:
    return "is the first color the last color?", "yes" if colours[0] == colours[-1] else "no"


def _any(colours: list[str], rng: random.Random) -> tuple[str, str]:
    wanted = rng.choice(colours) if rng.random() < 0.5 else rng.choice(COLOURS)
    return f"is there a {wanted} shape?", "yes" if wanted in colours else "no"


KINDS: tuple[Callable[[list[str], random.Random], tuple[str, str]], ...] = (_count, _count_different, _same, _any)
