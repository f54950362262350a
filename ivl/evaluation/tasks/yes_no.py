"""Questions that are answered by yes or no: HallusionBench, MME and POPE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ivl.errors import InputError, short
from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import PICTURES, found
from ivl.evaluation.figures import Figure, Figures, all_right, average, by, combined, mean, points, ratio
from ivl.evaluation.prompts import SHORT
from ivl.evaluation.scoring.options import in_english, leading_yes_or_no, yes_or_no, yes_unless_denied
from ivl.evaluation.task import Example, Score, Scored
from ivl.formats.rows import open_rows
from ivl.utils.files import regular

PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene")
COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


@dataclass(frozen=True, kw_only=True)
class YesNo(Benchmark):
    """A benchmark of such questions. The word that stands alone in a reply counts; a judge sorts the other replies."""

    judge: Literal["", "some", "all"] = "some"
    template: str = "yes_no"
    reduced: bool = True
    table: Literal["acc", "score"] = "score"
    reference_ending: str | None = f" {SHORT}"
    reference_word: Callable[[str], str] | None = None
    """What the reference code reads in a reply; None for the same."""

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (str(row["answer"]).strip().capitalize(),)

    def cot(self, published: str) -> str:
        return published

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Compare the word of the text with the answer."""
        if judged and "unknown" in text.lower():
            return Score(answer="Unknown")
        reference = self.reference_word if self.prompt == "reference" and not judged else None
        word = reference(text).capitalize() if reference else yes_or_no(text)
        return Score(value=float(word == example.truth), answer=word) if word else None


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
    def share(part: int) -> Figure:
        """Return the share of the figures (4) or the questions (5) of a set that are right throughout."""
        numbers = {s.example.id: str(s["index"]).split("_") for s in scored}
        return all_right(scored, lambda s: (s["l2-category"], numbers[s.example.id][3], numbers[s.example.id][part]))

    return {"aAcc": mean(scored), "fAcc": share(4), "qAcc": share(5)}


class Mme(YesNo):
    """The sum over subtasks of the share of right questions and of pictures whose two questions are right, times 100.

    The release has a text file for each subtask, whose lines are picture, question and answer with tabs between.
    """

    def rows_of(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        files = sorted(path.glob("*.txt")) if path.is_dir() else []
        return (row for file in files for row in _lines_of(file)) if files else super().rows_of(path)

    def cluster(self, row: Mapping[str, Any]) -> str:
        return f"{row['category']} {row['image_path']}"

    def figures(self, scored: Sequence[Scored]) -> Figures:
        tasks = {
            name: points(combined([mean(rows), all_right(rows, lambda s: s.cluster)], n=len(rows)), 100)
            for name, rows in by(scored, lambda s: [str(s["category"])]).items()
        }
        sums = {
            name: combined([tasks[task] for task in members if task in tasks], points=True)
            for name, members in (("perception", PERCEPTION), ("reasoning", COGNITION))
        }
        return {"Overall": combined(sums.values(), points=True), **sums, **dict(sorted(tasks.items()))}


def _lines_of(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    task, release = file.stem, "MME_Benchmark_release_version"
    folders = [f"{root}{task}{images}" for root in ("", f"{release}/") for images in ("", "/images")]
    try:
        regular(file)
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            picture, question, answer = line.split("\t")
        except ValueError:
            raise InputError(f"{file}:{number}: needs picture, question, answer with tabs between, got {short(line)}") from None
        row = {"index": f"{task} {number}", "category": task, "image_path": picture, "question": question, "answer": answer}
        yield f"{file}:{number}", row | {PICTURES: (found(picture, file, *folders),)}


class Pope(YesNo):
    """F1 of yes. A question that belongs to several categories counts once in each.

    The questions of the reference code have their answers in other files, one for each category.
    """

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        if "answer" in row or "category" not in row:
            return row
        kind, number, place = str(row["category"]), str(row["question_id"]), self.place()
        labels = Path(found(f"coco_pope_{kind}.json", place, "coco"))
        if number not in _labels(labels):
            raise InputError(f"{place}: question {number} of {kind} has no answer in {labels}")
        pictures = (found(Path(each).name, place, "val2014") if isinstance(each, str) else each for each in row[PICTURES])
        return row | {"index": f"{kind} {number}", "answer": _labels(labels)[number], PICTURES: tuple(pictures)}

    def categories_of(self, row: Mapping[str, Any]) -> list[list[str]]:
        return [str(row["category"]).split(",")]

    def figures(self, scored: Sequence[Scored]) -> Figures:
        parts = self.grouped(scored)
        first = _yes_figures([each for rows in parts.values() for each in rows])
        kinds = {f"{part} {name}": each for part, rows in parts.items() for name, each in _yes_figures(rows).items()}
        return {"Overall": first.pop("F1"), **first, "mean F1": average([kinds[f"{part} F1"] for part in parts]), **kinds}


@lru_cache(8)
def _labels(path: Path) -> dict[str, str]:
    """Return the answers of a file of POPE's by question."""
    rows = open_rows(path)
    return {str(row["question_id"]): str(row["label"]) for row in (rows[index] for index in range(len(rows)))}


def _yes_figures(scored: Sequence[Scored]) -> Figures:
    def share(top: Callable[[bool, bool], float], bottom: Callable[[bool, bool], float]) -> Figure:
        def of(rule: Callable[[bool, bool], float]) -> Callable[[Scored], float]:
            return lambda s: float(rule(s.score.answer == "Yes", s.example.truth == "Yes"))

        return ratio(scored, of(top), of(bottom))

    return {
        "F1": share(lambda said, meant: 2 * (said and meant), lambda said, meant: said + meant),
        "acc": mean(scored),
        "precision": share(lambda said, meant: said and meant, lambda said, _: said),
        "recall": share(lambda said, meant: said and meant, lambda _, meant: meant),
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
        reference_word=lambda reply: leading_yes_or_no(in_english(reply)),
    ),
    Pope(
        name="pope", file="POPE", about="objects that are in a picture or not", rows=5127, metric="F1 of yes",
        hub="lmms-lab/POPE",  # whose question_id counts anew in every category
        columns={"text": "question"},
        reference_word=yes_unless_denied,
    ),
)  # fmt: skip
