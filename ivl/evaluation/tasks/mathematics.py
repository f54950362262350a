"""MathVista, MathVision, MathVerse and OlympiadBench: mathematics, where a judge or a comparison of formulas decides."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import LETTERS, literal, options_of
from ivl.evaluation.figures import Figures, mean
from ivl.evaluation.grading import judge_prompt
from ivl.evaluation.prompts import MPO
from ivl.evaluation.scoring.algebra import same_answers, same_value
from ivl.evaluation.scoring.open_answers import AnswerKind, normalized_answer, typed_answer
from ivl.evaluation.scoring.options import infer_option
from ivl.evaluation.task import Example, JudgeQuestion, Score, Scored


@dataclass(frozen=True, kw_only=True)
class AnswerByJudge(Benchmark):
    """The share of right answers. A bare answer is taken as it is, and a judge extracts it from any other reply."""

    judge: Literal["", "some", "all"] = "some"
    template: str = "mathvista"
    official: str = "stops without a judge"

    def told(self, text: str, example: Example) -> dict[str, str]:
        return super().told(text, example) | {"question": str(example.row.get("question_for_eval") or example.row["question"])}


class MathVista(AnswerByJudge):
    """The share of right answers by skill and task, and the share of replies that need no judge."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **metadata} if isinstance(metadata := row.get("metadata"), Mapping) else row

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        answer = str(row["answer"])
        if row["question_type"] != "multi_choice":
            return (answer,)
        letter = next((letter for letter, text in _options(row).items() if text == answer), answer)
        return (str(row.get("answer_option") or letter),)

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Compare by the kind of the answer: a letter, a number, a list or a text."""
        row, options = example.row, _options(example.row)
        kind = cast(AnswerKind, "choice" if row["question_type"] == "multi_choice" else row["answer_type"])
        if self.prompt == "reference" and (judged or _is_bare(text, str(row["answer_type"]), options.values())):
            places = float(row["precision"]) if row.get("precision") else None
            said = normalized_answer(text, kind, list(options.values()), places)
            return Score(value=float(said == str(row["answer"])), answer=said or "")
        found, right = typed_answer(text, kind, example.truth, options, self.profile, texts_never_match=self.defects)
        if found is None and not (judged and text.strip()):
            return None
        answer = text.strip() if found is None else str(found)
        return Score(value=float(right), answer=answer, numbers={"prefetch": float(not judged)})

    def figures(self, scored: Sequence[Scored]) -> Figures:
        overall, *groups = super().figures(scored).items()
        return dict([overall, ("prefetch rate", mean(scored, lambda s: s.score.numbers.get("prefetch", 0.0))), *groups])


def _is_bare(text: str, kind: str, choices: Collection[str]) -> bool:
    """Return whether InternVL's own code takes a reply for the answer without asking a judge."""
    try:
        return text in choices or {"integer": int, "float": float}[kind](text) is not None
    except (KeyError, ValueError):
        return False


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    return dict(zip(LETTERS, map(str, literal(row.get("choices", []))), strict=False)) or options_of(row)


class _Reasoned(AnswerByJudge):
    """Under the prompt for MPO, a question loses the instruction before it and the line that announces its choices."""

    def text(self, row: Mapping[str, Any]) -> str:
        if self.prompt != "mpo":
            return super().text(row)
        return MPO + self.question(row).split("Question:", 1)[-1].strip().replace("Choices:\n", "").strip()


class MathVision(_Reasoned):
    """The share of replies that name the right option or have the value of the answer."""

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Compare the letter, or the value."""
        options = _options(example.row)
        said = infer_option(text, options, self.profile) if options else text.strip()
        right = said == example.truth if options else same_value(text, example.truth)
        decided = right or (options and said) or (judged and text.strip())
        return Score(value=float(right), answer=said or text.strip()) if decided else None


class MathVerse(_Reasoned):
    """The mean of the five versions of every problem, from text alone to vision alone."""

    def question(self, row: Mapping[str, Any]) -> str:
        text = str(row["query_cot"] if self.prompt == "cot" and row.get("query_cot") else row["question"])
        direct = "please directly answer the question and"
        return text.replace(direct, "please") if self.profile == "2026-08" and self.prompt == "published" else text

    def cot(self, published: str) -> str:
        return published

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Take what is written as the truth; a judge compares any other answer that it has extracted."""
        answer, truth = text.strip(), example.truth.strip()
        if answer == truth:
            return Score(value=1.0, answer=truth)
        if not (judged and answer):
            return None

        def same(said: str) -> Score | None:
            digits = re.findall(r"\b[01]\b", said)
            return Score(value=float(digits[-1]), answer=answer) if digits else None

        prompt = judge_prompt("mathverse", answer=answer, **self.told(answer, example))
        return Score(answer=answer, undecided=JudgeQuestion(prompt=prompt, read=same, best=Score(value=1.0, answer=truth)))

    def categories_of(self, row: Mapping[str, Any]) -> list[list[str]]:
        data = row.get("metadata", {})
        subjects = re.findall(r"'(?:subject|subfield)': '([^']*)'", data) if isinstance(data, str) else []
        named = [str(data[key]) for key in ("subject", "subfield") if isinstance(data, Mapping) and key in data]
        return [[str(row["problem_version"]), *subjects, *named]]


class Olympiad(Benchmark):
    """The share of replies whose answers are all right, in any order."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        _precisions(row)
        return row

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (str(literal(row["final_answer"])[0]),)

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Compare what follows the closing sentence that the benchmark asks for, else the reply."""
        chinese = "zh" in str(example.row.get("source", ""))
        found = re.findall("所以最终答案是(.*)" if chinese else "So the final answer is (.*)", text)
        answer = found[-1].strip() if found else text
        right = same_answers(answer, example.truth, _precisions(example.row), expressions_differ=self.defects)
        return Score(value=float(right), answer=answer.strip())


def _precisions(row: Mapping[str, Any]) -> list[float]:
    error = "" if "Tuple" in str(row.get("answer_type")) else str(row.get("error") or "")
    return [float(each or 1e-8) for each in error.split(",")]


def _mathvision(name: str, file: str, rows: int) -> MathVision:
    return MathVision(
        name=name, file=file, about="competitions, 16 subjects", rows=rows, hub="MathLLMs/MathVision",
        columns={"id": "index", "subject": "category"}, categories=("category",),
    )  # fmt: skip


TASKS = (
    MathVista(
        name="mathvista", file="MathVista_MINI", about="mathematics in pictures", rows=1000, table="score", judge_tokens=128,
        md5="f199b98e178e5a2a20e7048f5dcb0464", hub="AI4Math/MathVista", categories=("skills", "task"),
        columns={"pid": "index", "query": "question", "question": "bare_question"},
    ),
    _mathvision("mathvision", "MathVision", 3040), _mathvision("mathvision-mini", "MathVision_MINI", 304),
    MathVerse(
        name="mathverse", file="MathVerse_MINI", about="788 problems in five versions", rows=3940, judge="all", official="",
        md5="5017caca32b7fa110c350a1bea861b65", hub="AI4Math/MathVerse",
        columns={"sample_index": "index", "query_wo": "question", "question": "bare_question"},
    ),
    Olympiad(
        name="olympiadbench", file="OlympiadBench", about="mathematics and physics olympiads, English and Chinese",
        hub="Hothan/OlympiadBench", columns={"id": "index"}, categories=("source",),
    ),
)  # fmt: skip
