"""Questions about videos: choices, ratings by a judge, and moments to find.

Frames lie at the middle of equal parts of a video, as in training; VLMEvalKit's lie at the ends of one part more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.evaluation.data import literal, options_of
from ivl.evaluation.figures import Figures, by, mean, points, ratio
from ivl.evaluation.grading import judge_prompt
from ivl.evaluation.prompts import LETTER
from ivl.evaluation.scoring.options import first_capital, infer_option, shares_option
from ivl.evaluation.task import Example, JudgeQuestion, Score, Scored
from ivl.evaluation.tasks.choice import Choice
from ivl.types import Conversation, Message, Text, VideoRef

FRAMES = (
    "\nThese are the frames of a video. Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
)
CAREFULLY = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of objects, and "
    "the action and pose of persons. Based on your observations, select the best option that accurately addresses the "
    "question.\n"
)
EVERY_DETAIL = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the best option that "
    "accurately addresses the question."
)
SEPARATE_FRAMES = (
    "\nYou will be provided with {frames} separate frames uniformly sampled from a video, the frames are provided in "
    "chronological order of the video.\nPlease analyze these images and provide the answer to the question about the video "
    "content.\nPlease directly reply with your response to the only question.\n"
)
BEST = "\nOnly give the best option."


@dataclass(frozen=True, kw_only=True)
class VideoChoice(Choice):
    """Options are letters and texts, or a list of `candidates` in which the answer is one."""

    frames: int = 16
    tiles: int = 1
    before: str = ""
    """Text before the question."""
    after: str = f"\n{LETTER}"
    rule: str = "capital"
    """How a reply is read: `capital` takes the first capital letter, `share` a first word that is part of the right option, and
    `bracket` what stands before the first closing parenthesis."""

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {key: value for key in ("candidates", "options") if (value := row.get(key))}
        texts = next((literal(value) for value in options.values()), [])
        row = row | {letter: re.sub(rf"^\(?{letter}[).]\s*", "", str(t)) for letter, t in zip("ABCDEFGH", texts, strict=False)}
        found = options_of(row)
        if not found:
            raise ValueError("it has no options")
        answer = str(row.get("answer", row.get("correct_choice", "")))
        if answer not in found:  # the text of the option, or its place
            answer = next((letter for letter, text in found.items() if text == answer), answer)
            answer = list(found)[int(answer)] if answer.isdigit() and int(answer) < len(found) else answer
        return row | {"answer": answer}

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        return (Message("user", (self.video(row), Text(f"\n{self.text(row)}"))),)

    def video(self, row: Mapping[str, Any]) -> VideoRef:
        """Return the video, which lies beside the rows, or in a folder `video` or of the benchmark's name there."""
        name = str(row.get("video_path") or row["video"]).removeprefix("./")
        root = self.place().parent
        places = [root / folder / f"{name}{suffix}" for folder in ("", "video", "videos", self.file) for suffix in ("", ".mp4")]
        clip = (float(row["start"]), float(row["end"])) if row.get("start") and row.get("end") else None
        return VideoRef(str(next(filter(Path.exists, places), root / name)), self.frames, clip)

    def question(self, row: Mapping[str, Any]) -> str:
        options = options_of(row)
        if self.rule == "capital":
            lines = "".join(f"\n{letter}. {text}" for letter, text in options.items())
            return f"{self.before}Question: {row['question']}{lines} " if self.before else f"{row['question']}{lines}"
        return f"{self.before}Question: {row['question']}\nOptions:" + "".join(f"\n({k}) {v}" for k, v in options.items())

    def suffix(self, row: Mapping[str, Any]) -> str:
        return self.after

    def grade(self, text: str, example: Example) -> Score:
        """Read the reply by the benchmark's own rule; what it cannot read is matched with the options, by a judge at last."""
        options, truth = options_of(example.row), self.truth(example.row)
        letter = None
        if self.rule == "capital" and (len(text.split()) <= 10 or re.search("[ABCDE]", text)):
            letter = first_capital(text, "".join(options), lead_ins_stay=self.defects)
        elif self.rule == "share":
            right = f"({truth}) {options.get(truth, '')}"
            if shares_option(text, right, empty_is_right=self.defects):
                return Score(value=1.0, answer=truth)
        elif self.rule == "bracket" and ")" in text:
            letter = text.partition(")")[0][-1:]
            letter = letter if letter == truth else infer_option(text, options, self.profile)
        return super().grade(text, example) if letter is None else Score(value=float(letter == truth), answer=letter)


class VideoRating(VideoChoice):
    """Open questions, which a judge rates from 0 to 3. Skills count for the coarse ones that they belong to."""

    def question(self, row: Mapping[str, Any]) -> str:
        return f"{self.before.format(frames=self.frames)}Question: {row['question']} "

    def grade(self, text: str, example: Example) -> Score:
        """Leave the rating to the judge."""

        def read(reply: str) -> Score | None:
            match = re.search(r"\b[0-3]\b", reply)
            return Score(value=float(match[0]), answer=text, numbers={"rated": 1.0}) if match else None

        prompt = judge_prompt("video", question=str(example.row["question"]), truth=example.answers[0], reply=text)
        best = Score(value=3.0, numbers={"rated": 1.0})
        return Score(answer=text, numbers={"rated": 0.0}, undecided=JudgeQuestion(prompt=prompt, read=read, best=best))

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        return row

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Return the mean rating of all and of each skill, and those of the replies that have a rating."""
        parts = by(
            scored, lambda s: list(dict.fromkeys(each for fine in literal(s["dimensions"]) for each in _skills(str(fine))))
        )
        order = sorted(parts, key=lambda name: name != "Overall")
        rated = {f"{k}, rated": ratio(parts[k], lambda s: s.score.value, lambda s: s.number("rated")) for k in order}
        return {name: points(figure) for name, figure in ({k: mean(parts[k]) for k in order} | rated).items()}


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
    above = (coarse, "Perception" if coarse in PERCEPTION else "Reasoning") if coarse else ()
    return ("Overall", *above, fine)


TASKS = (
    VideoChoice(
        name="video-mme", file="Video-MME", about="900 videos from seconds to an hour", rows=2700, hub="lmms-lab/Video-MME",
        before=FRAMES, categories=("duration", "domain", "sub_category", "task_type"),
        columns={"videoID": "video", "question_id": "index"},
    ),
    VideoChoice(
        name="mvbench", file="MVBench", about="20 tasks about short videos", rows=4000, hub="OpenGVLab/MVBench",
        before=CAREFULLY, after=BEST, rule="share", by_file="task_type", categories=("task_type",),
    ),
    VideoChoice(
        name="mlvu", file="MLVU_MCQ", about="long videos, the tasks with options", rows=2174, before=EVERY_DETAIL, after=BEST,
        rule="bracket", categories=("task_type",), hub="MLVU/MVLU",
    ),
    VideoChoice(
        name="longvideobench", file="LongVideoBench", about="videos up to an hour", rows=1337,
        hub="longvideobench/LongVideoBench", categories=("duration_group", "question_category"),
    ),
    VideoRating(
        name="mmbench-video", file="MMBench-Video", about="open questions about videos, rated 0 to 3", rows=1998, judge="all",
        metric="mean rating, 0 to 3", hub="opencompass/MMBench-Video", before=SEPARATE_FRAMES, after="",
        md5="98f7df3eb1007fc375ea6fe88a98e2ff",
    ),
)  # fmt: skip
