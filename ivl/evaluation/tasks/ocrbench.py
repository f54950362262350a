"""OCRBench: text in pictures; a reply is right if it contains an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.figures import Figures, mean, points
from ivl.evaluation.prompts import SHORT
from ivl.evaluation.scoring.vqa import contains_any
from ivl.evaluation.task import Example, Score, Scored

FORMULAS = "Handwritten Mathematical Expression Recognition"
RECOGNITION = "Recognition"


class OcrBench(Benchmark):
    """The number of right replies; of 1,000 in all."""

    def suffix(self, row: Mapping[str, Any]) -> str:
        return f"\n{SHORT}"

    def grade(self, text: str, example: Example) -> Score:
        """Look for an answer in the reply; in formulas spaces do not count, and case does."""
        formula = example.row["category"] == FORMULAS
        empty = "nan" if self.defects else ""
        return Score(value=float(contains_any(text, example.answers, formula=formula, empty_as=empty)), answer=text.strip())

    def figures(self, scored: Sequence[Scored]) -> Figures:
        parts = {"Final Score": list(scored)}
        text = [s for s in scored if s["category"].endswith(RECOGNITION) and s["category"] != FORMULAS]
        parts |= {"Text Recognition": text} if text else {}
        parts |= self.grouped(scored)
        return {name: points(mean(rows), len(rows)) for name, rows in parts.items()}


TASKS = (
    OcrBench(
        name="ocrbench", file="OCRBench", about="text, documents, key information and formulas in pictures", rows=1000,
        metric="hits, of 1000", md5="e953d98a987cc6e26ef717b61260b778", hub="echo840/OCRBench", tiles=24,
        columns={"question_type": "category"},
    ),
)  # fmt: skip
