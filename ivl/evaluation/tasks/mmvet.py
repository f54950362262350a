"""MM-Vet: open questions; a judge gives from 0 to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.figures import Figures, by, mean
from ivl.evaluation.grading import judge_prompt
from ivl.evaluation.task import Example, JudgeQuestion, Score, Scored


class MmVet(Benchmark):
    """The mean of the judge's numbers."""

    def text(self, row: Mapping[str, Any]) -> str:
        return self.question(row) if self.prompt == "mpo" else super().text(row)

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (str(row["answer"]),)

    def grade(self, text: str, example: Example) -> Score:
        """Leave the score to the judge."""
        truth = example.answers[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        prompt = judge_prompt("mmvet", question=example.row["question"], truth=truth, reply=text)
        official = "counts replies that its judge gave no number as 0"
        return Score(answer=text, undecided=JudgeQuestion(prompt=prompt, read=_read, best=Score(value=1.0), official=official))

    def figures(self, scored: Sequence[Scored]) -> Figures:
        # VLMEvalKit keeps capabilities and combinations in one table, and counts a question of one capability twice in it.
        only = "" if self.defects else "only "
        named = [s for s in scored if s["category"]]
        groups = by(named, lambda s: [*str(s["category"]).split(","), only + str(s["category"]).replace(",", "_")])
        return {"Overall": mean(scored), **{name: mean(rows) for name, rows in groups.items()}}


def _read(reply: str) -> Score | None:
    try:
        value = float(reply)
    except ValueError:
        return None
    return Score(value=value, answer=reply.strip()) if 0 <= value <= 1 else None


TASKS = (
    MmVet(
        name="mmvet", file="MMVet", about="open questions that combine capabilities", rows=218, metric="mean rating",
        judge="all", md5="748aa6d4aa9d4de798306a63718455e3", hub="lmms-lab/MMVet",
        columns={"capability": "category", "question_id": "index"},
    ),
)  # fmt: skip
