"""What benchmarks have in common: where their rows are, how a row becomes a conversation, and which part of a reply counts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ivl.errors import InputError
from ivl.evaluation import data
from ivl.evaluation.figures import Figure, Figures, by, mean
from ivl.evaluation.grading import judge_prompt
from ivl.evaluation.prompts import COT_OPEN, MPO, SHORT, PromptName
from ivl.evaluation.scoring.extraction import last_box_or_text, marked_answer
from ivl.evaluation.scoring.options import Profile
from ivl.evaluation.task import Example, JudgeQuestion, Score, Scored, Task
from ivl.types import Conversation, ImageRef, Message, Part, SamplingParams, Text, VideoRef

LONG = SamplingParams(max_new_tokens=4096)


@dataclass(frozen=True, kw_only=True)
class Benchmark(Task):
    """A benchmark whose rows lie in a file. A family derives from it, and each benchmark is one object.

    A family gives `question` (the row's text), `request` (what the prompt adds) and `read` (the score of a reply). Figures are
    those of all rows and of each category.
    """

    name: str
    file: str
    """VLMEvalKit's name, with `.tsv` the name of the file."""
    about: str = ""
    metric: str = "accuracy"
    hub: str = ""
    """The data set on the Hugging Face hub."""
    md5: str = ""
    rows: int | None = None
    tiles: int = 6
    """Most tiles of a picture."""
    all_tiles: int = 64
    """Most tiles of all pictures of a question together, in VLMEvalKit."""
    frames: int = 0
    """Frames of a video that are shown; 0 where there is none."""
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """Columns of hub tables and jsonl, and their names in the TSV."""
    by_file: str = ""
    """The column that JSON files give by their names, such as a split; a folder of such files is then read whole."""
    categories: tuple[str, ...] = ("l2-category", "category")
    """Columns that figures are split by, the coarse ones first. A cell may be a list."""
    params: SamplingParams = LONG
    ending: str = ""
    """What the published prompt adds to a question."""
    reference_ending: str | None = None
    """What the reference code adds; None for the same."""
    several_answers: bool = False
    """Whether the cell of the answer lists accepted answers."""
    judge: Literal["", "some", "all"] = ""
    """Whether a judge decides about replies that the rule cannot read, or about all."""
    template: str = ""
    """The file in judges/ with the judge's prompt."""
    tries: int = 5
    judge_tokens: int = 2048
    official: str = ""
    """What the official tool does after the judge's last try, where that is not to count the reply as wrong."""
    most: float = 1.0
    """The score of a reply that is right."""
    submission: Literal["", "table", "map", "list"] = ""
    """Form of the file for the server that has the answers, where a split hides them."""
    table: Literal["acc", "score"] = "acc"
    """VLMEvalKit's table of figures: shares in NAME_acc.csv, or percent in NAME_score.csv."""
    reduced: bool = False
    """Whether what follows `Final answer:` counts alone, where the prompt asks for it."""
    prompt: PromptName = "published"
    profile: Profile = "2024-12"
    defects: bool = False
    """Repeat known defects of the official tool, which the benchmark's own file names."""
    given: bool = False
    """The rows hold replies of another tool under `prediction`, which come as a last message; `Given` repeats it."""
    path: Path | None = None
    """The file or folder of the rows; None looks for the TSV in LMUData."""

    # -- what a family gives

    def question(self, row: Mapping[str, Any]) -> str:
        """Return the text of a row, with its options if it has any."""
        return str(row["question"])

    def request(self, row: Mapping[str, Any]) -> str:
        """Return what the prompt adds to the question."""
        return self.ending if self.prompt != "reference" or self.reference_ending is None else self.reference_ending

    def read(self, text: str, example: Example, *, judged: bool = False) -> Score | None:
        """Score the part of a reply that counts, or what a judge says of it; None if that decides nothing."""
        return None

    def told(self, text: str, example: Example) -> dict[str, str]:
        """Return what the judge's prompt is filled with."""
        return {"question": str(example.row["question"]), "truth": example.truth, "reply": text}

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the accepted answers; none where they are hidden."""
        if row.get("answer") is None:
            return ()
        return tuple(map(str, data.literal(row["answer"]))) if self.several_answers else (str(row["answer"]),)

    def cluster(self, row: Mapping[str, Any]) -> str:
        """Return what rows that depend on one another have in common."""
        return ""

    def rows_of(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of a file or folder, each with its place."""
        return data.read_rows(path, self.columns, samples=self.given)

    def keep(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is asked."""
        return True

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with the columns of the TSV, where renaming them is not enough."""
        return row

    def budgets(self, pictures: int) -> list[int]:
        """Return the most tiles of each picture."""
        return [max(1, min(self.tiles, self.all_tiles // max(1, pictures)))] * pictures

    def figure(self, scored: Sequence[Scored]) -> Figure:
        """Return the figure of all rows or of those of a category."""
        return mean(scored)

    def categories_of(self, row: Mapping[str, Any]) -> list[list[str]]:
        """Return the categories of a row by level."""
        cells = [row.get(column, "") for column in self.categories]
        return [[] if cell == "" else list(map(str, data.literal(cell))) for cell in cells]

    # -- what all share

    def examples(self) -> Iterator[Example]:
        """Yield the rows as questions.

        Raises:
            InputError: naming the place of a row that is none of this benchmark, or the file if it holds no replies to score.
        """
        replied, answered, path = False, set[bool](), self.place()
        if self.by_file and path.is_dir() and (files := sorted({*path.glob("*.json"), *path.glob("*.jsonl")})):
            for file in files:
                yield from replace(self, path=file).examples()
            return
        for number, (place, row) in enumerate(self.rows_of(path)):
            pictured = not row.pop(data.NO_PICTURE, False)
            if self.by_file and self.by_file not in row and path.suffix in (".json", ".jsonl"):
                row |= {self.by_file: path.stem, "index": f"{path.stem} {row.get('index', number)}"}
            try:
                row = self.prepared({"index": number, **row})
                example = self.example(row) if self.keep(row) else None
                if example and example.answers and not answered:  # a missing column is told before anything is asked
                    self.grade("", example)
            except KeyError as error:
                raise InputError(f"{place}: has no column {error}, so it is no row of {self.file}; {self.origin}") from None
            except (ValueError, IndexError, TypeError, AttributeError) as error:
                raise InputError(f"{place}: is no row of {self.file} ({error}); {self.origin}") from None
            replied = replied or "prediction" in row
            if replied and not self.given and path.suffix in (".tsv", ".xlsx") and not row[data.PICTURES]:
                raise InputError(f"{place}: holds a reply and no picture; score the replies of this file with --score")
            if example is None:
                continue
            if not pictured and not self.given:
                raise InputError(f"{place}: its picture cell is empty; the question would be asked without its picture")
            answered.add(bool(example.answers))
            if False in answered and (True in answered or not self.submission):
                raise InputError(f"{place}: {'rows before have' if example.answers else 'has'} no answer")
            yield example
        if self.given and not replied:
            raise InputError(f"{path}: has no replies under `prediction`")

    def example(self, row: Mapping[str, Any]) -> Example:
        """Turn a row into a question. Raises KeyError for a column that the row lacks."""
        asked, answers, cluster = self.conversation(row), self.answers(row), self.cluster(row)
        if self.given:
            asked = (*asked, Message("user", (Text(str(row.get("prediction", ""))),)))
        group = next((name for level in self.categories_of(row) for name in level), "")
        rest = {key: value for key, value in row.items() if key != data.PICTURES}
        return Example(id=str(row["index"]), conversation=asked, answers=answers, group=group, row=rest, cluster=cluster)

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Write the question: the video or the pictures first, several as `Image-1: `, `Image-2: `, and then the text."""
        if self.frames:
            return (Message("user", (self.video(row), Text(f"\n{self.text(row)}"))),)
        pictures = self.pictures(row)
        budgets = self.budgets(len(pictures))
        parts: list[Part] = []
        for number, (picture, tiles) in enumerate(zip(pictures, budgets, strict=True), 1):
            parts += [Text(f"Image-{number}: ")] if len(pictures) > 1 else []
            parts += [ImageRef(picture, tiles), Text("\n")]
        return (Message("user", (*parts, Text(self.text(row)))),)

    def pictures(self, row: Mapping[str, Any]) -> Sequence[str | bytes | Image.Image]:
        """Return the pictures of a row."""
        return row.get(data.PICTURES, ())

    def video(self, row: Mapping[str, Any]) -> VideoRef:
        """Return the video, which lies beside the rows, or in a folder `video` or of the benchmark's name there."""
        name = str(row.get("video_path") or row["video"])
        files = [data.found(name + suffix, self.place(), "video", "videos", self.file) for suffix in ("", ".mp4")]
        clip = (float(row["start"]), float(row["end"])) if row.get("start") and row.get("end") else None
        return VideoRef(next(filter(os.path.exists, files), files[0]), self.frames, clip)

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the text of a question under the prompt."""
        question = self.question(row)
        if self.prompt == "plain":
            return question
        if self.prompt == "mpo":
            return (MPO + question).strip()
        asked = question + self.request(row)
        return self.cot(asked) if self.prompt == "cot" else asked

    def cot(self, published: str) -> str:
        """Ask for reasoning, where the published prompt does not ask for a word or phrase."""
        return published if published.endswith(SHORT) else f"{published}\n{COT_OPEN}"

    def score(self, reply: str, example: Example) -> Score:
        """Score a reply, or what its form says is the answer: a box, or what follows `Final answer:`."""
        try:
            score = self.grade(self.answer_of(reply), example)
        except KeyError as error:
            raise InputError(f"row {example.id} has no {error}, by which {self.name} is scored") from None
        return score if example.answers else replace(score, value=0.0, undecided=None)

    def answer_of(self, reply: str) -> str:
        """Return the part of a reply that counts under the prompt; all of it where it does not keep the form."""
        if self.prompt == "cot":
            return last_box_or_text(reply)
        return marked_answer(reply) if self.prompt == "mpo" and self.reduced else reply

    def grade(self, text: str, example: Example) -> Score:
        """Score the part of a reply that counts. What `read` does not decide is a question to a judge."""
        return self.read(text, example) or Score(undecided=self.to_judge(text, example))

    def to_judge(self, text: str, example: Example) -> JudgeQuestion:
        """Return what a judge is asked about a reply."""
        return JudgeQuestion(
            prompt=judge_prompt(self.template, **self.told(text, example)),
            read=lambda said: self.read(said, example, judged=True),
            best=Score(value=self.most, answer=example.truth),
            tries=self.tries,
            max_new_tokens=self.judge_tokens,
            official=self.official,
        )

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Return the figure of all rows and of each category."""
        return {"Overall": self.figure(scored), **{name: self.figure(rows) for name, rows in self.grouped(scored).items()}}

    def grouped(self, scored: Sequence[Scored]) -> dict[str, list[Scored]]:
        """Sort scores by the categories of their rows. Of two levels with a category of one name the coarser counts."""
        groups: dict[str, list[Scored]] = {}
        for level in range(len(self.categories_of(scored[0].example.row)) if scored else 0):
            for name, rows in by(scored, lambda s, at=level: self.categories_of(s.example.row)[at]).items():
                groups.setdefault(name, rows)
        return groups

    # -- where the rows are

    @property
    def origin(self) -> str:
        """Where the file comes from."""
        sources = f"{self.file}.tsv of VLMEvalKit" + (f" (MD5 {self.md5})" if self.md5 else "")
        return f"take {sources}" + (f", or the data set {self.hub} of the Hugging Face hub" if self.hub else "")

    def place(self) -> Path:
        """Return the file of the rows.

        Raises:
            InputError: if it is missing, or the one in LMUData is another one than the scores were published with.
        """
        path = self.path or data.data_root() / f"{self.file}.tsv"
        if not path.exists() and (local := path.with_name(f"{self.file}_local.tsv")).exists():
            return local  # VLMEvalKit's copy of a large file, with the pictures in files of their own
        if not path.exists():
            remedy = f"put it into {data.data_root()} or name it with --data"
            raise InputError(f"{path}: no such file; {self.origin}, and {remedy}")
        if self.path is None and self.md5 and (found := data.md5(path)) != self.md5:
            raise InputError(f"{path}: has MD5 {found}; {self.origin}, or take it as it is with --data {path}")
        return path

    def settings(self) -> dict[str, Any]:
        """Return what the score depends on beside the model."""
        path = self.place()
        known = {"md5": data.md5(path), "official": data.md5(path) == self.md5} if path.is_file() else {}
        rules = {"prompt": self.prompt, "extraction": self.profile, "defects": self.defects}
        return {**rules, "data": {"file": str(path), **known}}
