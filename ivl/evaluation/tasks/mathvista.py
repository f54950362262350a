"""MathVista: choices, numbers and lists; a judge extracts the answer of a reply that is no bare one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import LETTERS, literal, options_of
from ivl.evaluation.figures import Figures, by, mean
from ivl.evaluation.grading import judge_prompt
from ivl.evaluation.scoring.open_answers import AnswerKind, normalized_answer, typed_answer
from ivl.evaluation.task import Example, JudgeQuestion, Score, Scored


class MathVista(Benchmark):
    """The share of replies whose answer is right, by skill and task."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **metadata} if isinstance(metadata := row.get("metadata"), Mapping) else row

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        options, answer = _options(row), str(row["answer"])
        if row["question_type"] != "multi_choice":
            return (answer,)
        letter = next((letter for letter, text in options.items() if text == answer), answer)
        return (str(row.get("answer_option") or letter),)

    def grade(self, text: str, example: Example) -> Score:
        """Take a bare answer as it is; a judge extracts it from any other reply."""
        row, (truth,) = example.row, example.answers
        kind = cast(AnswerKind, "choice" if row["question_type"] == "multi_choice" else row["answer_type"])

        def read(reply: str, *, judged: bool = True) -> Score | None:
            if self.prompt == "reference" and judged:
                places = float(row["precision"]) if row.get("precision") else None
                text = normalized_answer(reply, kind, list(_options(row).values()), places)
                return Score(value=float(text == str(row["answer"])), answer=text or "", numbers={"prefetch": 0.0})
            said, right = typed_answer(reply, kind, truth, _options(row), self.profile, texts_never_match=self.defects)
            if said is None and not (judged and reply.strip()):
                return None
            answer = reply.strip() if said is None else str(said)
            return Score(value=float(right), answer=answer, numbers={"prefetch": float(not judged)})

        best = Score(value=1.0, answer=truth, numbers={"prefetch": 0.0})
        question = JudgeQuestion(
            prompt=judge_prompt("mathvista", question=row["question"], reply=text), read=read, best=best, max_new_tokens=128,
            official="stops without a judge",
        )  # fmt: skip
        return read(text, judged=False) or Score(numbers={"prefetch": 0.0}, undecided=question)

    def figures(self, scored: Sequence[Scored]) -> Figures:
        skills = by(scored, lambda s: list(map(str, literal(s["skills"]))))
        tasks = by(scored, lambda s: [str(s["task"])])
        accuracy = {name: mean(rows) for name, rows in (skills | tasks).items()}
        return {"Overall": mean(scored), "prefetch rate": mean(scored, "prefetch"), **accuracy}


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    if "choices" in row:
        return dict(zip(LETTERS, map(str, literal(row["choices"])), strict=False))
    return options_of(row)


TASKS = (
    MathVista(
        name="mathvista", file="MathVista_MINI", about="mathematics in pictures", rows=1000, judge="some", table="score",
        md5="f199b98e178e5a2a20e7048f5dcb0464", hub="AI4Math/MathVista",
        columns={"pid": "index", "query": "question", "question": "bare_question"},
    ),
)  # fmt: skip
