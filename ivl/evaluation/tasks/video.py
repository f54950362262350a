"""Questions about videos: choices, and open ones that a judge rates.

Frames lie at the middle of equal parts of a video, as in training; VLMEvalKit's lie at the ends of one part more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ivl.evaluation.data import literal, options_of
from ivl.evaluation.figures import Figures, points, ratio
from ivl.evaluation.prompts import LETTER, QUESTIONS
from ivl.evaluation.scoring.options import first_capital, infer_option, shares_option
from ivl.evaluation.task import Example, Score, Scored
from ivl.evaluation.tasks.choice import Choice
from ivl.evaluation.tasks.rated import Rated

EVERY_DETAIL = "Carefully watch this video and pay attention to every detail. Based on your observations, "
BEST = "\nOnly give the best option."


@dataclass(frozen=True, kw_only=True)
class VideoChoice(Choice):
    """Options are letters and texts, or a list of `candidates` in which the answer is one."""

    frames: int = 16
    tiles: int = 1
    before: str = ""
    """Text before the question."""
    ending: str = f"\n{LETTER}"
    rule: str = "capital"
    """How a reply is read: `capital` takes the first of `letters`, `share` a first word that is part of the right option, and
    `bracket` what stands before the first closing parenthesis."""
    letters: str = "ABCD"
    """Capitals that decide, whether a row has such an option or not."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        texts = literal(row.get("candidates") or row.get("options") or [])
        row = row | {letter: re.sub(rf"^\(?{letter}[).]\s*", "", str(t)) for letter, t in zip("ABCDEFGH", texts, strict=False)}
        found = options_of(row)
        if not found:
            raise ValueError("it has no options")
        answer = str(row.get("answer", row.get("correct_choice", "")))
        if answer not in found:  # the text of the option, or its place
            answer = next((letter for letter, text in found.items() if text == answer), answer)
            answer = list(found)[int(answer)] if answer.isdigit() and int(answer) < len(found) else answer
        return row | {"answer": answer}

    def question(self, row: Mapping[str, Any]) -> str:
        options = options_of(row)
        if self.rule == "capital":
            lines = "".join(f"\n{letter}. {text}" for letter, text in options.items())
            return f"{self.before}Question: {row['question']}{lines} " if self.before else f"{row['question']}{lines}"
        return f"{self.before}Question: {row['question']}\nOptions:" + "".join(f"\n({k}) {v}" for k, v in options.items())

    def request(self, row: Mapping[str, Any]) -> str:
        return self.ending

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Read the reply by the benchmark's own rule; what it cannot read is matched with the options, by a judge at last."""
        options, truth = self.options(example)
        letter = None
        if judged:
            return super().read(text, example, judged=True)
        if self.rule == "capital":
            letter = first_capital(text, self.letters, lead_ins_stay=self.defects)
        elif self.rule == "share":
            reference, right = self.prompt == "reference", f"({truth}) {options.get(truth, '')}"
            shares = shares_option(text, right, empty_is_right=self.defects, reference=reference)
            if reference:
                return Score(value=float(shares), answer=text.strip())
            letter = truth if shares else None
        elif self.rule == "bracket" and ")" in text:
            letter = text.partition(")")[0][-1:]
            letter = letter if letter == truth else infer_option(text, options, self.profile)
        return Score(value=float(letter == truth), answer=letter) if letter else super().read(text, example)


@dataclass(frozen=True, kw_only=True)
class VideoRated(Rated):
    """Open questions, which a judge rates. Skills count for the coarse ones that they belong to."""

    frames: int = 16
    tiles: int = 1
    before: str = ""
    """Text before the question."""

    def question(self, row: Mapping[str, Any]) -> str:
        return f"{self.before.format(frames=self.frames)}Question: {row['question']} "


class MmBenchVideo(VideoRated):
    """The mean rating of all replies and of those that have one, of each skill and of the coarse ones that it belongs to."""

    def categories_of(self, row: Mapping[str, Any]) -> list[list[str]]:
        return [list(dict.fromkeys(each for fine in literal(row["dimensions"]) for each in _skills(str(fine))))]

    def figures(self, scored: Sequence[Scored]) -> Figures:
        parts = {"Overall": scored, **self.grouped(scored)}
        rated = {
            f"{name}, rated": points(ratio(rows, lambda s: s.score.value, lambda s: float(s.score.undecided is None)))
            for name, rows in parts.items()
        }
        return super().figures(scored) | rated


COARSE = {
    "CP": ("Video Topic", "Video Emotion", "Video Scene", "Video Style"),
    "FP-S": ("OCR", "Object Recognition", "Attribute Recognition", "Event Recognition", "Human Motion", "Counting"),
    "FP-C": ("Spatial Relationship", "Human-object Interaction", "Human Interaction"),
    "HL": ("Hallucination",),
    "LR": ("Structuralized Image-Text Understanding", "Mathematical Calculation"),
    "AR": ("Physical Property", "Function Reasoning", "Identity Reasoning"),
    "RR": ("Natural Relation", "Physical Relation", "Social Relation"),
    "CSR": ("Common Sense Reasoning",),
    "TR": ("Counterfactual Reasoning", "Causal Reasoning", "Future Prediction"),
}
PERCEPTION = ("CP", "FP-S", "FP-C", "HL")


def _skills(fine: str) -> tuple[str, ...]:
    """Return a fine skill and all that it belongs to."""
    coarse = next((name for name, members in COARSE.items() if fine in members), "")
    return (*((coarse, "Perception" if coarse in PERCEPTION else "Reasoning") if coarse else ()), fine)


def _digit(said: str) -> float | None:
    match = re.search(r"\b[0-3]\b", said)
    return match and float(match[0])


def _two_ratings(said: str) -> float | None:
    ratings = re.findall(r"(?<![\d.])[1-5](?![\d.])", said)
    return sum(map(float, ratings)) if len(ratings) == 2 else None


TASKS = (
    VideoChoice(
        name="video-mme", file="Video-MME", about="900 videos from seconds to an hour", rows=2700, hub="lmms-lab/Video-MME",
        before=QUESTIONS["video-mme"], categories=("duration", "domain", "sub_category", "task_type"),
        columns={"videoID": "video", "question_id": "index"},
    ),
    VideoChoice(
        name="mvbench", file="MVBench", about="20 tasks about short videos", rows=4000, hub="OpenGVLab/MVBench",
        before=QUESTIONS["mvbench"], ending=BEST, rule="share", by_file="task_type", categories=("task_type",),
    ),
    VideoChoice(
        name="mlvu", file="MLVU_MCQ", about="long videos, the tasks with options", rows=2174, hub="MLVU/MVLU", ending=BEST,
        before=f"{EVERY_DETAIL}select the best option that accurately addresses the question.", rule="bracket",
        categories=("task_type",),
    ),
    VideoRated(
        name="mlvu-open", file="MLVU_OpenEnded", about="long videos, the tasks without options, rated twice 1 to 5",
        metric="mean rating, 2 to 10", hub="MLVU/MVLU", before=f"{EVERY_DETAIL}answer the given questions.",
        rule=_two_ratings, template="mlvu", most=10, categories=("task_type",),
    ),
    VideoChoice(
        name="longvideobench", file="LongVideoBench", about="videos up to an hour", rows=1337,
        hub="longvideobench/LongVideoBench", categories=("duration_group", "question_category"), letters="ABCDE",
    ),
    MmBenchVideo(
        name="mmbench-video", file="MMBench-Video", about="open questions about videos, rated 0 to 3", rows=1998,
        metric="mean rating, 0 to 3", hub="opencompass/MMBench-Video", md5="98f7df3eb1007fc375ea6fe88a98e2ff",
        before=QUESTIONS["mmbench-video"], rule=_digit, template="video", most=3,
    ),
)  # fmt: skip
