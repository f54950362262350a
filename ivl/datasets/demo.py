"""Small files that the documentation's examples use: pictures, rows, frames of a video, questions and preference pairs.

The rows teach what the quickstart's model does not know: how many shapes a picture shows.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ivl.datasets.convert import ConvertConfig, convert
from ivl.errors import InputError

COLORS = {"red": (200, 40, 40), "green": (40, 150, 60), "blue": (40, 70, 200), "yellow": (225, 195, 40), "teal": (30, 140, 140)}
SHAPES = ("circle", "rectangle", "triangle")
QUESTION, MOST = "how many shapes are in the image?", 4
ROWS = {"train": 400, "val": 100, "asked": 24}
"""Rows to train on, rows held out, and questions for preference training."""
NUM_FRAMES = 12
PARQUET = Path("data/val.parquet")


def write_demo(folder: Path) -> list[Path]:
    """Write the files below a folder and return their paths; the parquet file needs the `data` extra and is else left out.

    Files that are there already with the same content stay as they are.

    Raises:
        InputError: naming a file of another content, before anything is written, or a folder that cannot be written.
    """
    files = {folder / name: content for name, content in _files()}
    try:
        there = [path for path in files if os.path.lexists(path)]
        if changed := [path for path in there if not _holds(path, files[path])]:
            raise InputError(f"{changed[0]}: exists and is another file; choose another folder")
        for path in files.keys() - there:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path])
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    parquet = folder / PARQUET
    try:
        if not parquet.exists():
            convert(ConvertConfig(source=folder / "data/val.jsonl", target=parquet))
    except InputError as error:
        if "pip install" not in str(error):
            raise
        return [*files]
    return [*files, parquet]


def _holds(path: Path, content: bytes) -> bool:
    """Whether a path is a file of this content, which is read only where its kind and size are right."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _files() -> Iterator[tuple[str, bytes]]:
    """Yield the names of the files and their contents, the same at every call."""
    rng = random.Random("ivl")
    yield "picture.png", _encoded(_scene(rng, 64, [("circle", "red")]))
    yield "photo.jpg", _encoded(_landscape(800, 600), "JPEG")
    for n in range(NUM_FRAMES):
        frame = Image.new("RGB", (96, 64), "white")
        ImageDraw.Draw(frame).ellipse((4 + 6 * n, 20, 26 + 6 * n, 42), fill=COLORS["blue"])
        yield f"frames/{n}.png", _encoded(frame)
    counted: dict[str, list[tuple[str, int]]] = {}
    for split, count in ROWS.items():
        for n in range(count):
            shapes = [(rng.choice(SHAPES), rng.choice([*COLORS])) for _ in range(1 + n % MOST)]
            name = f"pictures/{split}-{n}.png"
            counted.setdefault(split, []).append((name, len(shapes)))
            yield f"data/{name}", _encoded(_scene(rng, 64, shapes))
    for split in ("train", "val"):
        yield f"data/{split}.jsonl", _lines(map(_row, counted[split]))
    asked = [{"id": f"asked-{n}", "image": image, "question": QUESTION} for n, (image, _) in enumerate(counted["asked"])]
    answers = [count for _, count in counted["asked"]]
    yield "data/questions.jsonl", _lines(row | {"answer": str(n)} for row, n in zip(asked, answers, strict=True))
    chosen = ({"chosen": str(n), "rejected": str(n % MOST + 1)} for n in answers)
    yield "data/pairs.jsonl", _lines(row | pair for row, pair in zip(asked, chosen, strict=True))


def _row(counted: tuple[str, int]) -> dict[str, Any]:
    """Return a row in the reference format."""
    image, count = counted
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": str(count)}]
    return {"id": Path(image).stem, "image": image, "conversations": turns}


def _scene(rng: random.Random, size: int, shapes: Iterable[tuple[str, str]]) -> Image.Image:
    """Draw shapes of random sizes into different quarters of a picture, drawn large and scaled down for smooth edges."""
    scale, light = 4, [rng.randint(225, 255) for _ in range(3)]
    image = Image.new("RGB", (scale * size, scale * size), tuple(light))
    pen, quarter = ImageDraw.Draw(image), scale * size / 2
    for place, (shape, color) in zip(rng.sample(range(4), 4), shapes, strict=False):
        radius = rng.uniform(0.28, 0.45) * quarter
        x, y = (quarter * (at + 0.5) + rng.uniform(-1, 1) * (quarter / 2 - radius) for at in (place % 2, place // 2))
        if shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[color])
        else:
            corners, turn = (4 if shape == "rectangle" else 3), rng.uniform(0, math.tau)
            angles = [turn + math.tau * n / corners for n in range(corners)]
            pen.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=COLORS[color])
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _landscape(width: int, height: int) -> Image.Image:
    """Draw a sky, a sun, two hills and a house."""
    sky = Image.linear_gradient("L").resize((width, height))
    image = Image.composite(Image.new("RGB", sky.size, "#fbe3b5"), Image.new("RGB", sky.size, "#5aa0e0"), sky)
    pen = ImageDraw.Draw(image)
    pen.ellipse((600, 60, 700, 160), fill="#ffd34d")
    pen.ellipse((-200, 330, 620, 1100), fill="#4d9153")
    pen.ellipse((330, 380, 1100, 1100), fill="#3c7a45")
    pen.rectangle((250, 290, 370, 390), fill="#b5482f")
    pen.polygon([(235, 290), (385, 290), (310, 220)], fill="#6b2f22")
    pen.rectangle((295, 335, 325, 390), fill="#f2d7a6")
    return image


def _encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
