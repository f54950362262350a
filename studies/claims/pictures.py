"""Pictures whose details matter, drawn by a seed: bar charts whose values must be read, and small numbers on a busy ground."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.quickstart.data import turns
from ivl.formats.rows import write_jsonl

SIDE = 64
"""One tile of nano."""
COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 180), "yellow": (230, 190, 30), "black": (30, 30, 30)}
NUM_BARS, HIGHEST, UNIT = 3, 9, 6
"""Bars of a chart, the largest value, and the pixels of one."""
NUMBER_QUESTION = "what number is it?"


def chart(rng: random.Random) -> tuple[Image.Image, dict[str, int]]:
    """A bar chart and its values by color, from left to right."""
    values = {color: rng.randint(1, HIGHEST) for color in rng.sample(list(COLORS), NUM_BARS)}
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    for number, (color, value) in enumerate(values.items()):
        left = 5 + 20 * number
        draw.rectangle((left, SIDE - 4 - UNIT * value, left + 13, SIDE - 4), fill=COLORS[color])
    return image, values


def number(rng: random.Random) -> tuple[Image.Image, str]:
    """A number of two digits in small gray letters on noise."""
    noise = np.random.default_rng(rng.getrandbits(32)).normal(190, 18, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(noise)
    text, shade = str(rng.randint(10, 99)), rng.randint(60, 110)
    at = (rng.randint(2, SIDE - 24), rng.randint(2, SIDE - 18))
    ImageDraw.Draw(image).text(at, text, fill=(shade,) * 3, font=ImageFont.load_default(size=15))
    return image, text


def rows(folder: Path, name: str, charts: int, numbers: int, seed: int) -> Path:
    """Draw pictures into a folder and write their questions as rows to NAME.jsonl; returns the file."""
    rng, found = random.Random(f"{name} {seed}"), []
    (folder / name).mkdir(parents=True, exist_ok=True)
    for at in range(charts + numbers):
        image, asked = chart_questions(rng) if at < charts else number_questions(rng)
        image.save(path := folder / name / f"{at}.png")
        found.append({"id": f"{name}-{at}", "image": str(path.absolute()), **asked})
    return write_jsonl(found, folder / f"{name}.jsonl")


def chart_questions(rng: random.Random) -> tuple[Image.Image, dict[str, Any]]:
    image, values = chart(rng)
    asked = [turns(f"<image>\nhow high is the {color} bar?", str(value)) for color, value in values.items()]
    return image, {"values": values, "conversations": asked}


def number_questions(rng: random.Random) -> tuple[Image.Image, dict[str, Any]]:
    image, text = number(rng)
    return image, {"conversations": [turns(f"<image>\n{NUMBER_QUESTION}", text)]}


def spoken() -> list[str]:
    """Every text of the questions and answers, for a tokenizer."""
    digits = [str(value) for value in range(10)]
    return [NUMBER_QUESTION, *digits, *(f"how high is the {color} bar?" for color in COLORS), "user assistant"]
