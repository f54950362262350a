"""Example questions beside a model, which the page offers to a visitor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivl.errors import InputError

EXAMPLES = "examples.json"
"""File in the model's directory: a JSON list of {"text": ..., "images": [file names]} that the model can answer."""


def read_examples(directory: Path) -> list[dict[str, Any]]:
    """Return the example questions of a model as values of the input box.

    Raises:
        InputError: if the file is not a list of {"text", "images"}, or names an image outside the directory.
    """
    path = directory / EXAMPLES
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        examples = [(str(row["text"]), [_inside(directory, name) for name in row.get("images", [])]) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{path}: not a list of {{"text": ..., "images": [...]}} ({error})') from error
    return [{"text": text, "files": files} for text, files in examples]


def _inside(directory: Path, name: str) -> str:
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()) or not path.is_file():
        raise ValueError(f"{name!r} is not a file beside the model")
    return str(path)


def write_examples(directory: Path, examples: list[tuple[str, list[Path]]]) -> None:
    """Write example questions, with copies of their images, beside a model."""
    (directory / "examples").mkdir(exist_ok=True)
    rows = []
    for text, images in examples:
        names = [f"examples/{len(rows)}-{n}{image.suffix}" for n, image in enumerate(images)]
        for name, image in zip(names, images, strict=True):
            (directory / name).write_bytes(image.read_bytes())
        rows.append({"text": text, "images": names})
    (directory / EXAMPLES).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
