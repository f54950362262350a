"""Questions that lie beside a model: what the page offers to a visitor first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivl.errors import InputError

EXAMPLES = "examples.json"
"""Beside a model's weights: a JSON list of {"text": ..., "images": [file names]} that the model can answer."""


def read_examples(directory: Path) -> list[dict[str, Any]]:
    """Questions that lie beside a model, as values of the input box.

    Raises:
        InputError: if the file is not a list of {"text", "images"}, or names a picture outside the directory.
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
        raise ValueError(f"{name!r} is no file beside the model")
    return str(path)


def write_examples(directory: Path, examples: list[tuple[str, list[Path]]]) -> None:
    """Questions with copies of their pictures, beside a model."""
    (directory / "examples").mkdir(exist_ok=True)
    rows = []
    for text, pictures in examples:
        names = [f"examples/{len(rows)}-{n}{picture.suffix}" for n, picture in enumerate(pictures)]
        for name, picture in zip(names, pictures, strict=True):
            (directory / name).write_bytes(picture.read_bytes())
        rows.append({"text": text, "images": names})
    (directory / EXAMPLES).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
