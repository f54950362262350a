"""Short answers: ChartQA, DocVQA, InfographicVQA, TextVQA, OCR-VQA, GQA and OCRBench."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.figures import Figure, Figures, mean, points
from ivl.evaluation.prompts import SHORT
from ivl.evaluation.scoring.metrics import anls, contains_any, equals_any, relaxed, vqa_accuracy
from ivl.evaluation.task import Example, Score, Scored

FORMULAS = "Handwritten Mathematical Expression Recognition"
_ScoreAnswers = Callable[[str, Sequence[str]], float]


def _within_5_percent_of_reply(reply: str, answers: Sequence[str]) -> float:
    return float(any(relaxed(reply, answer, of_reply=True) for answer in answers))


@dataclass(frozen=True, kw_only=True)
class ShortAnswer(Benchmark):
    """A benchmark whose replies are compared with accepted answers by one rule."""

    rule: _ScoreAnswers
    older_rule: _ScoreAnswers | None = None
    """The rule of the profile 2024-12; None takes the same."""
    reference_rule: _ScoreAnswers | None = None
    """The rule under the reference prompt; None takes the same."""
    several_answers: bool = True
    ending: str = f"\n{SHORT}"
    reference_ending: str | None = f" {SHORT}"

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Score the reply by the rule."""
        older = self.older_rule if self.profile == "2024-12" else None
        rule = (self.reference_rule if self.prompt == "reference" else None) or older or self.rule
        return Score(value=float(rule(text, example.answers)) if example.answers else 0.0, answer=text.strip())


class OcrBench(ShortAnswer):
    """The number of right replies, of 1,000 in all. A reply is right if it contains an answer."""

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Look for an answer in the reply; in formulas spaces do not count, and case does."""
        formula, empty = example.row["category"] == FORMULAS, "nan" if self.defects else ""
        return Score(value=float(contains_any(text, example.answers, formula=formula, empty_as=empty)), answer=text.strip())

    def figure(self, scored: Sequence[Scored]) -> Figure:
        return points(mean(scored), len(scored))

    def figures(self, scored: Sequence[Scored]) -> Figures:
        overall, *kinds = super().figures(scored).items()
        text = [s for s in scored if s["category"].endswith("Recognition") and s["category"] != FORMULAS]
        return dict([overall, *([("Text Recognition", self.figure(text))] if text else []), *kinds])


TASKS = (
    ShortAnswer(
        name="chartqa", file="ChartQA_TEST", about="charts; half of the questions are written by people", rows=2500, tiles=12,
        metric="relaxed accuracy", rule=lambda reply, answers: any(relaxed(reply, answer) for answer in answers),
        older_rule=_within_5_percent_of_reply, reference_rule=_within_5_percent_of_reply,
        hub="lmms-lab/ChartQA", columns={"question_id": "index", "type": "split"}, by_file="split", categories=("split",),
    ),
    *(
        ShortAnswer(
            name=f"{file.lower()}-{split}", file=f"{file}_{split.upper()}", tiles=tiles, rows=rows, rule=anls, metric="ANLS",
            about=about + ": answers are hidden, makes a submission" * (split == "test"), hub="lmms-lab/DocVQA", categories=(),
            columns={"questionId": "index", "question_id": "index", "answers": "answer"},
            submission="list" if split == "test" else "",
        )
        for file, about, tiles, sizes in (
            ("DocVQA", "scanned documents", 18, (5349, 5188)), ("InfoVQA", "infographics", 24, (2801, 3288)),
        )
        for split, rows in zip(("val", "test"), sizes, strict=True)
    ),
    ShortAnswer(
        name="textvqa", file="TextVQA_VAL", about="text in photographs; ten people answered", rows=5000, metric="VQA accuracy",
        rule=vqa_accuracy, older_rule=partial(vqa_accuracy, older=True), reference_rule=partial(vqa_accuracy, reference=True),
        hub="lmms-lab/textvqa", categories=(), columns={"question_id": "index", "answers": "answer"},
    ),
    ShortAnswer(
        name="ocrvqa", file="OCRVQA_TESTCORE", about="covers of books", rows=3072, tiles=12, rule=equals_any, categories=(),
        columns={"question_id": "index"},
    ),
    ShortAnswer(
        name="gqa", file="GQA_TestDev_Balanced", about="scenes, their objects and relations", rows=12578, rule=equals_any,
        columns={"question_id": "index"}, categories=(),
    ),
    OcrBench(
        name="ocrbench", file="OCRBench", about="text, documents, key information and formulas in pictures", rows=1000,
        metric="hits, of 1000", md5="e953d98a987cc6e26ef717b61260b778", hub="echo840/OCRBench", tiles=24, rule=contains_any,
        reference_ending=None, columns={"question_type": "category"},
    ),
)  # fmt: skip
