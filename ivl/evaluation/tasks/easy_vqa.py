"""easy-vqa: 48,248 questions about 5,000 pictures of one colored shape, shipped inside the `easy-vqa` package.

Training recipes take their rows and conversations from here too, so a model is evaluated with the questions that it was
trained on. The evaluation task asks the 9,673 questions of the official test split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ivl.errors import InputError
from ivl.evaluation.scoring import exact_match
from ivl.evaluation.task import Example, Task
from ivl.types import Conversation, ImageRef, Message, SamplingParams, Text

Split = Literal["train", "test"]
QuestionKind = Literal["color", "shape", "yes/no"]
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
NUM_QUESTIONS = {"train": 38575, "test": 9673}
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""The request that InternVL's evaluation adds to questions with short answers; for models not trained on easy-vqa."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question of the data set."""

    id: str
    """`test-17`: the split and the position in its file."""
    image: str
    """Path of a 64 x 64 PNG."""
    question: str
    answer: str
    kind: QuestionKind
    """Follows from the answer."""


def rows(split: Split) -> list[Row]:
    """Read every question of an official split, in the order of its file (questions of one image are neighbors).

    Raises:
        InputError: if the package is not installed, or has another number of questions.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise InputError("easy-vqa is not installed: pip install easy-vqa") from error
    read = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    images = Path(easy_vqa.__file__).parent / "data" / split / "images"
    questions = [
        Row(id=f"{split}-{n}", image=str(images / f"{image}.png"), question=question, answer=answer, kind=kind(answer))
        for n, (question, answer, image) in enumerate(zip(*read(), strict=True))
    ]
    if len(questions) != NUM_QUESTIONS[split]:
        raise InputError(f"easy-vqa's {split} split has {len(questions)} questions, expected {NUM_QUESTIONS[split]}")
    return questions


def kind(answer: str) -> QuestionKind:
    """Return the kind of question that has this answer."""
    if answer in COLORS:
        return "color"
    return "shape" if answer in SHAPES else "yes/no"


def conversation(row: Row, *, answered: bool, suffix: str = "") -> Conversation:
    """Put the picture and the question into one user turn; for training, the answer follows as the assistant's turn."""
    question = Message("user", (ImageRef(row.image), Text(f"\n{row.question}{suffix}")))
    if not answered:
        return (question,)
    return question, Message("assistant", (Text(row.answer),))


class EasyVQA(Task):
    """Exact match of one-word answers, reported by kind of question."""

    metric, rows = "exact_match", NUM_QUESTIONS["test"]
    params = SamplingParams(max_new_tokens=10)

    def __init__(self, name: str, about: str, suffix: str = "") -> None:
        self.name, self.about, self.suffix = name, about, suffix

    def examples(self) -> Iterator[Example]:
        """Yield the test split."""
        for row in rows("test"):
            asked = conversation(row, answered=False, suffix=self.suffix)
            yield Example(id=row.id, conversation=asked, answers=(row.answer,), group=row.kind)

    def score(self, reply: str, example: Example) -> float:
        """Score a reply by exact match."""
        return exact_match(reply, example.answers)


TASKS = (
    EasyVQA("easy-vqa", "one-word questions about a colored shape, as `make quickstart` trains them"),
    EasyVQA("easy-vqa-short", "the same, asking for a short answer: for models not trained on it", SHORT_ANSWER),
)
