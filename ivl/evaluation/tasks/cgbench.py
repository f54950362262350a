"""CG-Bench: choices about long videos, with the whole video and with the clip that holds the clue, and where that clue is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ivl.evaluation.benchmark import Benchmark
from ivl.evaluation.data import LETTERS, literal
from ivl.evaluation.figures import Figures, mean, ratio
from ivl.evaluation.prompts import QUESTIONS
from ivl.evaluation.scoring.boxes import interval_overlap
from ivl.evaluation.task import Example, Score, Scored
from ivl.types import VideoRef

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
INSTRUCTIONS = {mode: QUESTIONS[f"cgbench-{mode}"] for mode in ("long_acc", "clue_acc", "miou")}


class CgBench(Benchmark):
    """Shares of right choices and mean overlap of intervals. A question is asked in three ways, which count together."""

    def video(self, row: Mapping[str, Any]) -> VideoRef:
        return super().video({"video": row["clue_video_path" if row["task_mode"] == "clue_acc" else "video"]})

    def question(self, row: Mapping[str, Any]) -> str:
        options = "\n".join(f"{letter}:{text}" for letter, text in zip(LETTERS, literal(row["choices"]), strict=False))
        return f"{INSTRUCTIONS[row['task_mode']]}Question: {row['question']}\n\n{options}\n\n"

    def cluster(self, row: Mapping[str, Any]) -> str:
        return f"question {row['qid']}"

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Read the JSON of the reply, or letters or numbers in it."""
        row, truth = example.row, example.truth
        if row["task_mode"] != "miou":
            right = choice_right(text, truth)
            return Score(value=float(right is True), answer="" if right is None else text.strip())
        overlap = clue_overlap(text, literal(truth), float(row["duration"]))
        recall = sum((overlap or 0.0) > threshold for threshold in THRESHOLDS) / len(THRESHOLDS)
        return Score(value=overlap or 0.0, answer="" if overlap is None else text.strip(), numbers={"recall": recall})

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Return the shares, the mean overlap, and how both go together; the official tool leaves unread replies out."""
        scored = [s for s in scored if s.score.answer or not self.defects] or scored
        modes = self.grouped(scored)
        figures = {mode: mean(modes[mode]) for mode in INSTRUCTIONS if mode in modes}
        if len(figures) < len(INSTRUCTIONS):
            return figures
        right, asked = ({s.cluster for s in modes["long_acc"] if s.score.value >= least} for least in (1, 0))
        lower = min(("clue_acc", "long_acc"), key=lambda mode: figures[mode].value)

        def in_mode(mode: str) -> Callable[[Scored], float]:
            return lambda s: s.score.value / len(modes[mode]) if s["task_mode"] == mode else 0.0

        return figures | {
            "CRR": ratio(scored, in_mode(lower), in_mode("clue_acc")),
            "acc@iou": ratio(
                modes["miou"], lambda s: s.score.numbers["recall"] * (s.cluster in right), lambda s: s.cluster in asked
            ),
            "rec@iou": mean(modes["miou"], lambda s: s.score.numbers["recall"]),
        }


def _result(reply: str) -> Any:
    start, end = reply.find("```json"), reply.find("```", reply.find("```json") + 7)
    if start < 0 or end < 0:
        raise ValueError
    return reply[start + 7 : end].strip()


def choice_right(reply: str, truth: str) -> bool | None:
    """Return whether the JSON of a reply names the letter, or one of the letters A to H in it is it; None without any."""
    try:
        return json.loads(re.sub(r"(?<=:\s)([A-Za-z_]\w*)", r'"\1"', _result(reply)))["result"] == truth
    except (ValueError, KeyError, TypeError, RecursionError):
        letters = re.findall(r"\b[A-H]\b", reply)
        return truth in letters if letters else None


def clue_overlap(reply: str, truth: Sequence[Sequence[float]], duration: float) -> float | None:
    """Return the overlap of the intervals of a reply with the true ones; None if it has no interval, or JSON without a list.

    Intervals of the JSON that end by 1 are shares of the duration. Without JSON, numbers are taken in pairs.
    """
    try:
        given = json.loads(_result(reply))["result"]
        if not isinstance(given, list):
            return None
        given = given if isinstance(given[0], list) else [given]
        if all(each[0] <= 1 and each[1] <= 1 for each in given):
            given = [(each[0] * duration, each[1] * duration) for each in given]
        return interval_overlap(truth, given)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", reply)]
        pairs = list(zip(numbers[::2], numbers[1::2], strict=False))
        return interval_overlap(truth, pairs) if pairs else None


TASKS = (
    CgBench(
        name="cgbench", file="CG-Bench_MCQ_Grounding", about="long videos and the clues in them", rows=36387, frames=32,
        tiles=1, categories=("task_mode",), md5="eaead3d978a689269fefce4ae29c86df",
    ),
)  # fmt: skip
