"""MathVision, MathVerse and OlympiadBench: mathematics, where a judge or a comparison of formulas decides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import LETTERS, literal, options_of
from ivl.evaluation.figures import Figures, by, mean
from ivl.evaluation.grading import judge_prompt
from ivl.evaluation.prompts import MPO
from ivl.evaluation.scoring.algebra import same_answers, same_value
from ivl.evaluation.scoring.options import infer_option
from ivl.evaluation.task import Example, JudgeQuestion, Score, Scored


class _Reasoned(Benchmark):
    """Under the prompt for MPO, a question loses the instruction before it and the line that announces its choices."""

    def text(self, row: Mapping[str, Any]) -> str:
        if self.prompt != "mpo":
            return super().text(row)
        return MPO + re.sub(r"^Choices:\n", "", re.sub(r"^.*?Question: ?", "", self.question(row), flags=re.S), flags=re.M)


class MathVision(_Reasoned):
    """The share of replies that name the right option or have the value of the answer."""

    def grade(self, text: str, example: Example) -> Score:
        """Take a bare answer as it is; a judge extracts it from any other reply."""
        row, truth = example.row, example.answers[0]
        listed = map(str, literal(row.get("choices", [])))
        options = dict(zip(LETTERS, listed, strict=False)) or options_of(row)

        def read(reply: str, *, judged: bool = True) -> Score | None:
            said = infer_option(reply, options, self.profile) if options else reply.strip()
            right = said == truth if options else same_value(reply, truth)
            if right or (options and said) or (judged and reply.strip()):
                return Score(value=float(right), answer=said or reply.strip())
            return None

        prompt = judge_prompt("mathvista", question=row["question"], reply=text)
        question = JudgeQuestion(
            prompt=prompt, read=read, best=Score(value=1.0, answer=truth), official="stops without a judge"
        )
        return read(text, judged=False) or Score(undecided=question)


class MathVerse(_Reasoned):
    """The mean of the five versions of every problem, from text alone to vision alone."""

    def question(self, row: Mapping[str, Any]) -> str:
        text = str(row["query_cot"] if self.prompt == "cot" and row.get("query_cot") else row["question"])
        direct = "please directly answer the question and"
        return text.replace(direct, "please") if self.profile == "2026-08" and self.prompt == "published" else text

    def cot(self, published: str) -> str:
        return published

    def grade(self, text: str, example: Example) -> Score:
        """Let the judge extract the answer, and then compare it with the truth unless they are written alike."""
        truth = example.answers[0].strip()
        asked = str(example.row.get("question_for_eval") or example.row["question"])
        best = Score(value=1.0, answer=truth)

        def compare(answer: str) -> Score:
            def read(reply: str) -> Score | None:
                digits = re.findall(r"\b[01]\b", reply)
                return Score(value=float(digits[-1]), answer=answer) if digits else None

            prompt = judge_prompt("mathverse", question=asked, truth=truth, answer=answer)
            return Score(answer=answer, undecided=JudgeQuestion(prompt=prompt, read=read, best=best))

        def extract(reply: str) -> Score | None:
            return best if reply.strip() == truth else compare(reply.strip()) if reply.strip() else None

        question = JudgeQuestion(prompt=judge_prompt("mathvista", question=asked, reply=text), read=extract, best=best)
        return best if text.strip() == truth else Score(undecided=question)

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (str(row["answer"]),)

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Return the mean of all rows, of each version, and of each subject and subfield."""
        groups = by(scored, lambda s: [str(s["problem_version"]), *_subjects(s["metadata"])])
        return {"Overall": mean(scored), **{name: mean(rows) for name, rows in groups.items()}}


def _subjects(metadata: Any) -> list[str]:
    text = re.findall(r"'(?:subject|subfield)': '([^']*)'", metadata) if isinstance(metadata, str) else []
    return text or [str(metadata[key]) for key in ("subject", "subfield") if isinstance(metadata, Mapping) and key in metadata]


class Olympiad(Benchmark):
    """The share of replies whose answers are all right, in any order."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        _precisions(row)
        return row

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (str(literal(row["final_answer"])[0]),)

    def grade(self, text: str, example: Example) -> Score:
        """Compare what follows the closing sentence that the benchmark asks for, else the reply."""
        chinese = "zh" in str(example.row.get("source", ""))
        found = re.findall("所以最终答案是(.*)" if chinese else "So the final answer is (.*)", text)
        answer = found[-1].strip() if found else text
        right = same_answers(answer, example.answers[0], _precisions(example.row), expressions_differ=self.defects)
        return Score(value=float(right), answer=answer.strip())


def _precisions(row: Mapping[str, Any]) -> list[float]:
    return [float(each) for each in str(row.get("error") or "1e-8").split(",")]


def _mathvision(name: str, file: str, rows: int) -> MathVision:
    return MathVision(
        name=name, file=file, about="competitions, 16 subjects", rows=rows, judge="some", hub="MathLLMs/MathVision",
        columns={"id": "index", "subject": "category"}, categories=("category",),
    )  # fmt: skip


TASKS = (
    _mathvision("mathvision", "MathVision", 3040), _mathvision("mathvision-mini", "MathVision_MINI", 304),
    MathVerse(
        name="mathverse", file="MathVerse_MINI", about="788 problems in five versions", rows=3940, judge="all",
        md5="5017caca32b7fa110c350a1bea861b65", hub="AI4Math/MathVerse",
        columns={"sample_index": "index", "query_wo": "question", "question": "bare_question"},
    ),
    Olympiad(
        name="olympiadbench", file="OlympiadBench", about="mathematics and physics olympiads, English and Chinese",
        hub="Hothan/OlympiadBench", columns={"id": "index"}, categories=("source",),
    ),
)  # fmt: skip
