"""What benchmarks have in common: where their rows are, how a row becomes a conversation, and which part of a reply counts."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ivl.errors import InputError, short
from ivl.evaluation import data
from ivl.evaluation.figures import Figures, by, mean
from ivl.evaluation.prompts import COT_OPEN, MPO, SHORT, PromptName
from ivl.evaluation.scoring.extraction import last_box_or_text
from ivl.evaluation.scoring.open_answers import marked_answer
from ivl.evaluation.scoring.options import Profile
from ivl.evaluation.task import Example, Score, Scored, Task
from ivl.types import Conversation, ImageRef, Message, Part, SamplingParams, Text

PUBLISHED = SamplingParams(max_new_tokens=4096)
ALL_TILES = 64
"""Tiles of all pictures of a question together, in VLMEvalKit."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(Task):
    """A benchmark whose rows lie in a file. A family derives from it, and each benchmark is one object.

    A family gives `question` (the row's text), `suffix` (what is asked for) and `grade`. Figures are the mean of all rows and
    of each category.
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
    frames: int = 0
    """Frames of a video that are shown; 0 where there is none."""
    judge: str = ""
    """Empty, `some` where a judge decides about replies that the rule cannot read, or `all`."""
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """Columns of hub tables and jsonl, and their names in the TSV."""
    by_file: str = ""
    """The column that JSON files give by their names, such as a split; a folder of such files is then read whole."""
    categories: tuple[str, ...] = ("l2-category", "category")
    """Columns that figures are split by."""
    params: SamplingParams = PUBLISHED
    prompt: PromptName = "published"
    profile: Profile = "2024-12"
    submission: Literal["", "table", "map", "list"] = ""
    """Form of the file for the server that has the answers, where a split hides them."""
    table: Literal["acc", "score"] = "acc"
    """VLMEvalKit's table of figures: shares in NAME_acc.csv, or percent in NAME_score.csv."""
    reduced: bool = False
    """Whether what follows `Final answer:` counts alone, where the prompt asks for it."""
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

    def suffix(self, row: Mapping[str, Any]) -> str:
        """Return what the published prompt adds to the question."""
        return ""

    def reference_suffix(self, row: Mapping[str, Any]) -> str:
        """Return what the reference code adds to the question; by default the same."""
        return self.suffix(row)

    def grade(self, text: str, example: Example) -> Score:
        """Score the part of a reply that counts."""
        raise NotImplementedError

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the accepted answers; none where they are hidden."""
        return tuple(map(str, data.literal(row["answer"]))) if row.get("answer") is not None else ()

    def cluster(self, row: Mapping[str, Any]) -> str:
        """Return what rows that depend on one another have in common."""
        return ""

    def keep(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is asked."""
        return True

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row of a hub table or of jsonl with the columns of the TSV, where renaming them is not enough."""
        return row

    def budgets(self, pictures: int) -> list[int]:
        """Return the most tiles of each picture."""
        return [max(1, min(self.tiles, ALL_TILES // max(1, pictures)))] * pictures

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
        named = self.by_file if path.suffix in (".json", ".jsonl") else ""
        for number, (place, raw) in enumerate(data.read_rows(path, self.columns, samples=self.given)):
            pictured = not raw.pop(data.NO_PICTURE, False)
            try:
                row = {"index": number, **raw}
                if named and named not in raw:
                    row |= {named: path.stem, "index": f"{path.stem} {row['index']}"}
                row = self.prepared(row)
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
            if not pictured and example and not self.given:
                raise InputError(f"{place}: its picture cell is empty; the question would be asked without its picture")
            if example is not None:
                answered.add(bool(example.answers))
                if False in answered and (True in answered or not self.submission):
                    raise InputError(
                        f"{place}: has no answer" if not example.answers else f"{place}: rows before have no answer"
                    )
                yield example
        if self.given and not replied:
            raise InputError(f"{path}: has no replies under `prediction`")

    def example(self, row: Mapping[str, Any]) -> Example:
        """Turn a row into a question. Raises KeyError for a column that the row lacks."""
        asked, answers, cluster = self.conversation(row), self.answers(row), self.cluster(row)
        if self.given:
            asked = (*asked, Message("user", (Text(str(row.get("prediction", ""))),)))
        group = str(next((row[column] for column in self.categories if column in row), ""))
        rest = {key: value for key, value in row.items() if key != data.PICTURES}
        return Example(id=str(row["index"]), conversation=asked, answers=answers, group=group, row=rest, cluster=cluster)

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Write the question: pictures first, several as `Image-1: `, `Image-2: `, and then the text."""
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

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the text of a question under the prompt."""
        question, published = self.question(row), self.question(row) + self.suffix(row)
        if self.prompt == "reference":
            return question + self.reference_suffix(row)
        if self.prompt == "plain":
            return question
        if self.prompt == "mpo":
            return (MPO + question).strip()
        if self.prompt == "cot":
            return self.cot(published)
        return published

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

    def figures(self, scored: Sequence[Scored]) -> Figures:
        """Return the mean of all rows and of each category."""
        return {"Overall": mean(scored), **{name: mean(rows) for name, rows in self.grouped(scored).items()}}

    def grouped(self, scored: Sequence[Scored]) -> dict[str, list[Scored]]:
        """Sort scores by the categories of their rows."""
        groups: dict[str, list[Scored]] = {}
        for column in self.categories:
            for name, members in by([s for s in scored if s[column] != ""], lambda s, at=column: [str(s[at])]).items():
                groups.setdefault(name, members)
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


def twice_as_large(picture: str | bytes | Image.Image) -> Image.Image:
    """Enlarge a picture twice in both directions."""
    try:
        image = picture if isinstance(picture, Image.Image) else Image.open(
            io.BytesIO(picture) if isinstance(picture, bytes) else picture
        )  # fmt: skip
        image = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"a picture cannot be decoded ({short(str(error))})") from None
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.BILINEAR)
