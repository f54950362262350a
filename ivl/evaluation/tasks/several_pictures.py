"""Mantis-Eval, MIRB and MMIU: questions about several pictures, as InternVL's own code asks and scores them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import LETTERS, PICTURES, found, options_of
from ivl.evaluation.figures import Figures, average
from ivl.evaluation.prompts import LETTER, SHORT
from ivl.evaluation.scoring.options import leading_option
from ivl.evaluation.scoring.spelling import CARDINALS, ORDINALS
from ivl.evaluation.task import Example, Score, Scored
from ivl.types import SamplingParams


class Mantis(Benchmark):
    """The share of right replies; choices and short answers."""

    def question(self, row: Mapping[str, Any]) -> str:
        return "\n".join([with_numbers(str(row["question"]), row, "Image-{}").strip(), *_bracketed(row)])

    def request(self, row: Mapping[str, Any]) -> str:
        return "\n" + (LETTER if row["question_type"] == "multi-choice" else SHORT)

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Compare the letter or the whole option, or the words."""
        truth, options = example.truth, _bracketed(example.row)
        if example.row["question_type"] != "multi-choice":
            return Score(value=float(text.lower() == truth.lower()), answer=text)
        said = text[1:2] if re.fullmatch(r"\((?:.|\n)\)", text) else text
        right = said == truth or said in [option for option in options if option.startswith(f"({truth})")]
        return Score(value=float(right), answer=said)


def with_numbers(text: str, row: Mapping[str, Any], form: str) -> str:
    """Write the number of its picture for each mark in a text; marks of all pictures in a row say nothing."""
    count = len(row.get(PICTURES, ()))
    text = text.replace(" ".join(["<image>"] * count), "") if count else text
    for number in range(1, count + 1):
        text = text.replace("<image>", form.format(number), 1)
    return text


def _bracketed(row: Mapping[str, Any]) -> list[str]:
    return [f"({letter}) {text}" for letter, text in options_of(row).items()]


WORD, SYMBOL, NUMBER = "Answer with a single word.", "Answer with the option symbol.", "Answer with a single number."
GROUPS: dict[str, dict[str, str]] = {
    "Knowledge": {"food": SYMBOL, "sightseeing": WORD},
    "Reasoning": {
        "codeu": SYMBOL, "plot_code": WORD, "analogy": WORD,
        "3d_scene": f"The following images are different views of the same 3D scene. {NUMBER}",
    },
    "Perception": {"image_jigsaw": SYMBOL, "count": NUMBER, "attribute": WORD},
    "Multi-Hop": {"visual_chain": WORD, "arxiv": "Answer with the paper title."},
}  # fmt: skip
"""What is asked for in each task."""
REQUESTS = {task: request for tasks in GROUPS.values() for task, request in tasks.items()}
_NUMBERS = {word: str(n) for first, words in ((0, CARDINALS[:11]), (1, ORDINALS)) for n, word in enumerate(words, first)}


class Mirb(Benchmark):
    """The mean of four groups, each the mean of its tasks."""

    def keep(self, row: Mapping[str, Any]) -> bool:
        return row["task"] in REQUESTS

    def request(self, row: Mapping[str, Any]) -> str:
        return "\n" + REQUESTS[row["task"]]

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Compare the first line or sentence."""
        right, said = matches(text, example.truth, example.row["task"])
        return Score(value=float(right), answer=said)

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Return the mean of the groups, the groups and the tasks."""
        _, *tasks = super().figures(scored).items()
        groups = {name: [figure for task, figure in tasks if task in members] for name, members in GROUPS.items()}
        means = {name: average(figures) for name, figures in groups.items() if figures}
        return {"Overall": average(means.values(), n=len(scored)), **means, **dict(tasks)}


def matches(reply: str, answer: str, task: str) -> tuple[bool, str]:
    """Return whether the first line or sentence of a reply is right by the rule of a task, and what was read."""
    said = reply.strip()
    end = said.find("\n") if said.find("\n") > 0 else said.find(".")
    said, answer = (said[:end] if end > 0 else said).lower(), answer.lower()
    if task in ("analogy", "attribute") or (task == "sightseeing" and answer in ("yes", "no")):
        said = "yes" if "yes" in said else "no"
    elif task == "sightseeing":
        return answer in said, said
    elif task in ("count", "visual_chain", "3d_scene"):
        digits = re.search(r"\d+", said)
        said = digits[0] if digits else _NUMBERS.get(said, "")
    return said == answer, said


_SPATIAL = (
    "point_tracking ravens_progressive_matrices single_object_tracking threed_cad_recognition threed_indoor_recognition "
    "Egocentric_Video_QuestionAnswering Homography_estimation Icon_Question_Answering_with_Spatial_Context "
    "Image_Captioning_with_Spatial_Context Image_Spatial_Transformation_Estimation "
    "Image_text_retrieval_with_Spatial_Context Multiview_Action_Recognition Multiview_reasoning jigsaw_puzzle_solving "
    "threeD_Depth_Estimation threeD_Object_Detection threeD_Object_Tracking threeD_Pose_Estimation "
    "threeD_Scene_Reconstruction threeD_question_answering"
)
SPATIAL = frozenset(_SPATIAL.split())
"""The tasks that the official code averages over, of 52."""


class Mmiu(Benchmark):
    """The mean of the tasks. The official code, from which the published scores come, leaves out all but 20 of them."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(given := row.get("input"), Mapping):
            return row
        options = zip(LETTERS, str(row.pop("A")).split("\n"), strict=False)
        row |= {letter: text.strip().removeprefix(f"{letter}:").strip() for letter, text in options}
        row[PICTURES] = tuple(found(str(name), self.place()) for name in given["input_image_path"])
        return row | {"question": given["question"], "context": given["context"], "answer": row["output"]["output_text"]}

    def question(self, row: Mapping[str, Any]) -> str:
        return f"{row['question']}\n{row['context']}"

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Compare the letter that the reply begins with or whose text it contains."""
        said = leading_option(text, options_of(example.row))
        return Score(value=float(said == example.truth), answer=said)

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Return the mean of the tasks, that of the spatial ones and every task."""
        _, *tasks = super().figures(scored).items()
        means = {
            "Overall": average([figure for _, figure in tasks], n=len(scored)),
            "spatial": average([figure for task, figure in tasks if task in SPATIAL]),
        }
        return (dict(reversed(means.items())) if self.defects else means) | dict(tasks)


TASKS = (
    Mantis(
        name="mantis", file="Mantis-Eval", about="choices and short answers", rows=217, hub="TIGER-Lab/Mantis-Eval", tiles=12,
        all_tiles=12, columns={"id": "index"}, categories=("question_type",), params=SamplingParams(max_new_tokens=50),
    ),
    Mirb(
        name="mirb", file="MIRB", about="eleven tasks in four groups", rows=925, hub="VLLMs/MIRB", by_file="task", all_tiles=6,
        columns={"questions": "question", "answers": "answer", "subset": "task"}, categories=("task",),
        params=SamplingParams(max_new_tokens=512),
    ),
    Mmiu(
        name="mmiu", file="mmiu", about="52 tasks", rows=11698, tiles=12, all_tiles=12, ending=f"\n{LETTER}",
        categories=("task",), params=SamplingParams(max_new_tokens=100),
    ),
)  # fmt: skip
