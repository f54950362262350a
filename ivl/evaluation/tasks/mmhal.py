"""MMHal-Bench: open questions that tempt a model to tell of what a picture does not show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.figures import Figures, by, mean, points
from ivl.evaluation.grading import judge_prompt
from ivl.evaluation.task import Example, JudgeQuestion, Score, Scored
from ivl.types import SamplingParams

BEST = 6
LEAST_WITHOUT_HALLUCINATION = 3


class MmHal(Benchmark):
    """The mean rating from 0 to 6, and the share of replies with hallucination."""

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (str(row["gt_answer"]),)

    def grade(self, text: str, example: Example) -> Score:
        """Leave the rating to the judge."""
        row = example.row
        contents = ", ".join(map(str, row["image_content"])) if isinstance(row["image_content"], list) else row["image_content"]
        prompt = judge_prompt("mmhal", contents=contents, question=row["question"], truth=example.answers[0], reply=text)
        best = Score(value=BEST, numbers={"hallucination": 0.0})
        question = JudgeQuestion(prompt=prompt, read=_read, best=best, official="counts replies without one rating as 0")
        return Score(numbers={"hallucination": 1.0}, undecided=question)

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Return the mean rating, the rate of hallucination and the mean rating of each kind of question."""
        kinds = by(scored, lambda s: [str(s["question_type"])])
        ratings = {"score": scored, **kinds}
        first, *rest = [(name, points(mean(rows))) for name, rows in ratings.items()]
        return dict([first, ("hallucination rate", mean(scored, "hallucination")), *rest])


def _read(reply: str) -> Score | None:
    found = {int(number) for number in re.findall(r"rating: ([0-6])", reply.lower())}
    if len(found) != 1:
        return None
    (rating,) = found
    hallucination = float(rating < LEAST_WITHOUT_HALLUCINATION)
    return Score(value=rating, answer=str(rating), numbers={"hallucination": hallucination})


TASKS = (
    MmHal(
        name="mmhal", file="mmhal-bench_with_image", about="96 questions of eight kinds", rows=96, metric="mean rating, 0 to 6",
        judge="all", params=SamplingParams(max_new_tokens=1024),
    ),
)  # fmt: skip
