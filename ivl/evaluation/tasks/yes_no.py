"""Questions that are answered by yes or no: HallusionBench, MME and POPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import PICTURES
from ivl.evaluation.figures import Figure, Figures, all_right, average, by, combined, mean, points, ratio
from ivl.evaluation.grading import judge_prompt
from ivl.evaluation.prompts import SHORT
from ivl.evaluation.scoring.yes_no import in_english, leading_yes_or_no, yes_or_no, yes_unless_denied
from ivl.evaluation.task import Example, JudgeQuestion, Score, Scored

PERCEPTION = (
    "OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene",
)  # fmt: skip
COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


@dataclass(frozen=True, kw_only=True)
class YesNo(Benchmark):
    """A benchmark of such questions. The word that stands alone in a reply counts; a judge sorts the other replies."""

    judge: str = "some"
    reduced: bool = True
    table: Literal["acc", "score"] = "score"
    ending: str = ""
    """What the published prompt adds."""

    def suffix(self, row: Mapping[str, Any]) -> str:
        return self.ending

    def reference_suffix(self, row: Mapping[str, Any]) -> str:
        return f" {SHORT}"

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (str(row["answer"]).strip().capitalize(),)

    def cot(self, published: str) -> str:
        return published

    def word(self, reply: str) -> str | None:
        """Return what a reply says; None where that cannot be read."""
        return yes_or_no(reply)

    def grade(self, text: str, example: Example) -> Score:
        """Compare the word of the reply with the answer."""
        (truth,) = example.answers

        def scored(word: str | None) -> Score | None:
            return Score(value=float(word == truth), answer=word) if word else None

        def read(reply: str) -> Score | None:
            return Score(answer="Unknown") if "unknown" in reply.lower() else scored(yes_or_no(reply))

        prompt = judge_prompt("yes_no", question=example.row["question"], reply=text)
        question = JudgeQuestion(prompt=prompt, read=read, best=Score(value=1.0, answer=truth))
        return scored(self.word(text)) or Score(undecided=question)


class HallusionBench(YesNo):
    """The mean of three shares: right questions, figures and questions that are right throughout."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        if "gt_answer" not in row:
            return row
        parts = (row[key] for key in ("category", "subcategory", "set_id", "figure_id", "question_id"))
        category, l2, *numbers = map(str, parts)
        index = "_".join((category, l2.replace("_", " "), "0", *numbers))
        return row | {"index": index, "l2-category": l2, "answer": ("No", "Yes")[int(row["gt_answer"])]}

    def keep(self, row: Mapping[str, Any]) -> bool:
        return self.given or bool(row[PICTURES])

    def cluster(self, row: Mapping[str, Any]) -> str:
        picture_set, _figure, _question = str(row["index"]).split("_")[3:6]
        return f"{row['l2-category']} {picture_set}"

    def figures(self, scored: Sequence[Scored]) -> Figures:
        parts = {"": scored, **self.grouped(scored)}
        shares = {f"{part} {name}".strip(): each for part, rows in parts.items() for name, each in _shares(rows).items()}
        return {"Overall": average([shares[name] for name in ("aAcc", "fAcc", "qAcc")], n=len(scored)), **shares}


def _shares(scored: Sequence[Scored]) -> Figures:
    def place(each: Scored, *parts: int) -> tuple[str, ...]:
        numbers = str(each["index"]).split("_")
        return (str(each["l2-category"]), *(numbers[part] for part in parts))

    return {
        "aAcc": mean(scored),
        "fAcc": all_right(scored, lambda s: place(s, 3, 4)),
        "qAcc": all_right(scored, lambda s: place(s, 3, 5)),
    }


class Mme(YesNo):
    """The sum over subtasks of the share of right questions and of pictures whose two questions are right, times 100."""

    def word(self, reply: str) -> str | None:
        return leading_yes_or_no(in_english(reply)).capitalize() if self.prompt == "reference" else super().word(reply)

    def cluster(self, row: Mapping[str, Any]) -> str:
        return f"{row['category']} {row['image_path']}"

    def figures(self, scored: Sequence[Scored]) -> Figures:
        tasks = {
            name: points(combined([mean(rows), all_right(rows, lambda s: s.cluster)], n=len(rows)), 100)
            for name, rows in by(scored, lambda s: [str(s["category"])]).items()
        }
        sums = {
            "perception": combined([tasks[name] for name in PERCEPTION if name in tasks], points=True),
            "reasoning": combined([tasks[name] for name in COGNITION if name in tasks], points=True),
        }
        return {"Overall": combined(sums.values(), points=True), **sums, **dict(sorted(tasks.items()))}


class Pope(YesNo):
    """F1 of yes. A question that belongs to several categories counts once in each."""

    def word(self, reply: str) -> str | None:
        return yes_unless_denied(reply).capitalize() if self.prompt == "reference" else super().word(reply)

    def figures(self, scored: Sequence[Scored]) -> Figures:
        parts = by(scored, lambda s: str(s["category"]).split(","))
        every = [each for rows in parts.values() for each in rows]
        kinds = {f"{part} {name}": each for part, rows in parts.items() for name, each in _yes_figures(rows).items()}
        first = _yes_figures(every)
        mean_f1 = average([kinds[f"{part} F1"] for part in parts])
        return {"Overall": first.pop("F1"), **first, "mean F1": mean_f1, **kinds}


def _yes_figures(scored: Sequence[Scored]) -> Figures:
    def said(each: Scored) -> bool:
        return each.score.answer == "Yes"

    def meant(each: Scored) -> bool:
        return each.example.answers == ("Yes",)

    def share(top: Any, bottom: Any) -> Figure:
        return ratio(scored, lambda s: float(top(s)), lambda s: float(bottom(s)))

    return {
        "F1": share(lambda s: 2 * (said(s) and meant(s)), lambda s: said(s) + meant(s)),
        "acc": mean(scored),
        "precision": share(lambda s: said(s) and meant(s), said),
        "recall": share(lambda s: said(s) and meant(s), meant),
    }


TASKS = (
    HallusionBench(
        name="hallusionbench", file="HallusionBench", about="pictures that mislead; sets of figures share questions", rows=951,
        md5="0c23ac0dc9ef46832d7a24504f2a0c7c", hub="lmms-lab/HallusionBench", metric="mean of aAcc, fAcc, qAcc",
        ending=f" Please answer yes or no. {SHORT}", categories=("category", "l2-category"),
    ),
    Mme(
        name="mme", file="MME", about="14 subtasks, two questions about each picture", rows=2374, metric="sum, of 2800",
        hub="lmms-lab/MME", ending=f" {SHORT}", columns={"question_id": "image_path"},
    ),
    Pope(
        name="pope", file="POPE", about="objects that are in a picture or not", rows=5127, metric="F1 of yes",
        hub="lmms-lab/POPE",  # whose question_id counts anew in every category
    ),
)  # fmt: skip
