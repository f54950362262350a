"""easy-vqa: 9,673 questions of the official test split about 1,000 pictures of one coloured shape."""

from __future__ import annotations

from collections.abc import Iterator

from ivl.evaluation.scoring import exact_match
from ivl.evaluation.task import Example
from ivl.evaluation.tasks import easy_vqa_rows as easy_vqa
from ivl.types import SamplingParams

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What models are told that were not trained on easy-vqa (spec section 7)."""


class EasyVQA:
    """Exact match of one-word answers, by question type: colour, shape, yes/no."""

    metric = "exact_match"
    params = SamplingParams(max_new_tokens=10)

    def __init__(self, name: str, suffix: str = "") -> None:
        self.name = name
        self.suffix = suffix

    def examples(self) -> Iterator[Example]:
        for row in easy_vqa.rows("test"):
            asked = easy_vqa.conversation(row, answered=False, suffix=self.suffix)
            yield Example(id=row.id, conversation=asked, answers=(row.answer,), group=row.kind)

    def score(self, prediction: str, answers: tuple[str, ...]) -> float:
        return exact_match(prediction, answers)
