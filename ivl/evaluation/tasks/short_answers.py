"""Short answers: ChartQA, DocVQA, InfographicVQA, TextVQA, OCR-VQA and GQA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.prompts import SHORT
from ivl.evaluation.scoring import anls
from ivl.evaluation.scoring.vqa import equals_any, relaxed, vqa_accuracy
from ivl.evaluation.task import Example, Score

_ScoreAnswers = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True, kw_only=True)
class ShortAnswer(Benchmark):
    """A benchmark whose replies are compared with accepted answers by one rule."""

    rule: _ScoreAnswers
    reference_rule: _ScoreAnswers | None = None
    """The rule under the reference prompt; None takes the same."""

    def suffix(self, row: Mapping[str, Any]) -> str:
        return f"\n{SHORT}"

    def reference_suffix(self, row: Mapping[str, Any]) -> str:
        return f" {SHORT}"

    def grade(self, text: str, example: Example) -> Score:
        """Score the reply by the rule."""
        rule = (self.reference_rule if self.prompt == "reference" else None) or self.rule
        return Score(value=float(rule(text, example.answers)) if example.answers else 0.0, answer=text.strip())


def _relaxed(reply: str, answers: Sequence[str]) -> float:
    return float(any(relaxed(reply, answer) for answer in answers))


def _relaxed_of_reply(reply: str, answers: Sequence[str]) -> float:
    return float(any(relaxed(answer, reply.strip()) for answer in answers))


def _vqa_reference(reply: str, answers: Sequence[str]) -> float:
    return vqa_accuracy(reply, answers, reference=True)


def _documents(name: str, file: str, about: str, tiles: int, rows: int, split: str) -> ShortAnswer:
    about += ": answers are hidden, makes a submission" * (split == "test")
    return ShortAnswer(
        name=f"{name}-{split}", file=f"{file}_{split.upper()}", about=about, metric="ANLS",
        submission="list" if split == "test" else "", rule=anls, tiles=tiles, rows=rows,
        hub="lmms-lab/DocVQA", columns={"questionId": "index", "question_id": "index", "answers": "answer"}, categories=(),
    )  # fmt: skip


TASKS = (
    ShortAnswer(
        name="chartqa", file="ChartQA_TEST", about="charts; half of the questions are written by people", rows=2500, tiles=12,
        metric="relaxed accuracy", rule=_relaxed, reference_rule=_relaxed_of_reply, hub="lmms-lab/ChartQA",
        columns={"question_id": "index", "type": "split"}, by_file="split", categories=("split",),
    ),
    _documents("docvqa", "DocVQA", "scanned documents", 18, 5349, "val"),
    _documents("docvqa", "DocVQA", "scanned documents", 18, 5188, "test"),
    _documents("infovqa", "InfoVQA", "infographics", 24, 2801, "val"),
    _documents("infovqa", "InfoVQA", "infographics", 24, 3288, "test"),
    ShortAnswer(
        name="textvqa", file="TextVQA_VAL", about="text in photographs; ten people answered", rows=5000, metric="VQA accuracy",
        rule=vqa_accuracy, reference_rule=_vqa_reference, hub="lmms-lab/textvqa", categories=(),
        columns={"question_id": "index", "answers": "answer"},
    ),
    ShortAnswer(
        name="ocrvqa", file="OCRVQA_TESTCORE", about="covers of books", rows=3072, tiles=12, rule=equals_any, categories=(),
        columns={"question_id": "index"},
    ),
    ShortAnswer(
        name="gqa", file="GQA_TestDev_Balanced", about="scenes, their objects and relations", rows=12578, rule=equals_any,
        columns={"question_id": "index"}, categories=(),
    ),
)  # fmt: skip
