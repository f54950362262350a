"""easy-vqa: 48,248 questions about 5,000 pictures of one coloured shape, shipped inside the `easy-vqa` package.

Training recipes and the evaluation task both take rows and conversations from here, so a model is asked exactly what it
was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ivl.errors import InputError
from ivl.types import Conversation, ImageRef, Message, Text

Split = Literal["train", "test"]
Kind = Literal["colour", "shape", "yes/no"]
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
NUM_QUESTIONS = {"train": 38575, "test": 9673}


@dataclass(frozen=True, kw_only=True)
class Row:
    id: str
    """`test-17`: the split and the position in its file."""
    image: str
    """Path of a 64 x 64 PNG."""
    question: str
    answer: str
    kind: Kind
    """Follows from the answer: a colour, a shape, or yes/no."""


def rows(split: Split) -> list[Row]:
    """Every question of an official split, in the order of its file (questions of one image are neighbours).

    Raises:
        InputError: if the package is not installed, or is not the data set this project knows.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise InputError("easy-vqa is not installed: pip install easy-vqa") from error
    read = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    images = Path(easy_vqa.__file__).parent / "data" / split / "images"
    found = [
        Row(id=f"{split}-{n}", image=str(images / f"{image}.png"), question=question, answer=answer, kind=kind(answer))
        for n, (question, answer, image) in enumerate(zip(*read(), strict=True))
    ]
    if len(found) != NUM_QUESTIONS[split]:
        raise InputError(f"easy-vqa's {split} split has {len(found)} questions, expected {NUM_QUESTIONS[split]}")
    return found


def kind(answer: str) -> Kind:
    if answer in COLOURS:
        return "colour"
    return "shape" if answer in SHAPES else "yes/no"


def conversation(row: Row, *, answered: bool, suffix: str = "") -> Conversation:
    """The picture and the question as one user turn, and for training the answer as the assistant's."""
    question = Message("user", (ImageRef(row.image), Text(f"\n{row.question}{suffix}")))
    if not answered:
        return (question,)
    return question, Message("assistant", (Text(row.answer),))


def captions(found: Sequence[Row]) -> dict[str, str]:
    """What the questions and answers say about each image, such as `blue rectangle`; by image path.

    Only images whose questions give away both colour and shape have a caption. A yes/no question states its words when
    the answer is yes, or when it is no to a negated question.
    """
    said: dict[str, set[str]] = {}
    for row in found:
        words = row.question.rstrip("?").split()
        negated = "not" in words or "no" in words
        stated = words if row.kind != "yes/no" or (row.answer == "yes") != negated else []
        said.setdefault(row.image, set()).update({row.answer, *stated} & {*COLOURS, *SHAPES})
    pairs = {image: (words & {*COLOURS}, words & {*SHAPES}) for image, words in said.items()}
    return {image: f"{min(c)} {min(s)}" for image, (c, s) in pairs.items() if len(c) == len(s) == 1}
