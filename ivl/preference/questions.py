"""Questions to sample from: their files, how they are asked, and how answers are checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.errors import InputError, short
from ivl.evaluation.prompts import Domain, PromptLanguage, ask
from ivl.evaluation.scoring import AnswerMode, AnswerStyle, mode_for
from ivl.formats.base import check_items
from ivl.processing.chat import user
from ivl.types import Conversation, ImageRef, Message, Text
from ivl.utils.files import file_hash
from ivl.utils.jsonl import lines_of
from ivl.utils.strict_json import from_json, read_json


@dataclass(frozen=True, kw_only=True)
class QuestionSource:
    """One file of questions.

    Its rows have `question`, `image` (a path, a list of paths or none), `id` and, where known, `answer`; or they are training
    rows, whose first question and answer are taken.
    """

    name: str
    questions: str
    """A .jsonl file."""
    root: str = ""
    """Folder of relative image paths; empty is the file's own."""
    style: AnswerStyle = "final_answer"
    """How a reply is asked to show its answer; direct leaves the question as it is."""
    instruct: bool = True
    """False asks the bare question of a model that was trained to reason in this style."""
    language: PromptLanguage = "en"
    domain: Domain | None = None
    """Adds the instruction for questions without a checked answer (Dropout-NTP)."""
    mode: AnswerMode = "auto"
    """How answers are compared, by ivl.evaluation.scoring.compare; `load_sources` takes it from the name by default."""
    max_tiles: int | None = None
    """Tiles of an image; None takes the model's."""

    def __post_init__(self) -> None:
        if not self.questions:
            raise InputError(f"source {self.name!r} has no `questions` file")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise InputError(f"source {self.name!r}: max_tiles must be >= 1, got {self.max_tiles}")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question as the model is asked."""

    id: str
    """Unique among all sources: `name/id of the row`."""
    source: str
    images: tuple[str, ...]
    text: str
    answers: tuple[str, ...]
    """Accepted answers; empty when none is known."""
    max_tiles: int | None = None

    def row(self) -> dict[str, Any]:
        """Return the question's fields in a row of a journal."""
        fields = dataclasses.asdict(self)
        return {"question" if name == "text" else name: value for name, value in fields.items()}

    @classmethod
    def of(cls, row: dict[str, Any]) -> Question:
        """Return the question of a journal's row."""
        fields = {name: row[name] for name in ("id", "source", "max_tiles")}
        return cls(**fields, images=tuple(row["images"]), text=row["question"], answers=tuple(row["answers"]))

    def conversation(self, *, images: bool = True, begun: str = "") -> Conversation:
        """Return the prompt, with or without the images, and with the beginning of a reply to be continued."""
        marks = self.text.count("<image>")
        shown = images or not self.images  # without images `<image>` is letters
        text = self.text if shown else self.text.replace("<image>\n", "").replace("<image>", "")
        refs = [ImageRef(path, max_tiles=self.max_tiles) for path in self.images] if images else []
        if images and not marks:
            text = "<image>\n" * len(refs) + text
        turn = user(text, *refs)
        return (turn, Message("assistant", (Text(begun),))) if begun else (turn,)


def load_sources(path: str | Path, **defaults: Any) -> tuple[QuestionSource, ...]:
    """Read sources: a JSON object of name -> fields of QuestionSource, or one .jsonl file of questions.

    Args:
        defaults: Fields where the object gives none. Names of known data sets say how answers are compared, where `mode` does
            not.

    Raises:
        InputError: naming the file, the source and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .jsonl file of questions or a JSON object of sources")
    if path.suffix == ".jsonl":
        return (QuestionSource(**{"name": path.stem, "questions": str(path), "mode": mode_for(path.stem), **defaults}),)
    entries = read_json(path)
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: expected an object of sources by name")
    sources = []
    for name, entry in entries.items():
        fields = {"name": name, "mode": mode_for(name), **defaults, **entry} if isinstance(entry, dict) else entry
        source = from_json(QuestionSource, fields, f"{path}: source {name!r}")
        beside = path.parent / source.questions
        sources.append(dataclasses.replace(source, questions=str(beside)) if beside.exists() else source)
    return tuple(sources)


def fingerprint(sources: tuple[QuestionSource, ...]) -> str:
    """Return a hash of the sources and of their files."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(source) for source in sources]).encode())
    for source in sources:
        digest.update(bytes.fromhex(file_hash(source.questions, "sha256")))
    return digest.hexdigest()[:16]


def read_questions(sources: tuple[QuestionSource, ...]) -> Iterator[Question]:
    """Yield every question of every source, in order.

    Raises:
        InputError: naming file and line, for a row that is not a question, a missing image or a repeated id.
    """
    seen: set[str] = set()
    for source in sources:
        path = Path(source.questions)
        if not path.is_file():
            raise InputError(f"source {source.name!r}: no such file: {path}")
        with path.open("rb") as file:
            for number, line in enumerate(lines_of(file), 1):
                if line.strip():
                    question = _question(source, line, f"{path}:{number}", number)
                    if question.id in seen:
                        raise InputError(f"{path}:{number}: id {question.id!r} was used before; ids must differ")
                    seen.add(question.id)
                    yield question
    if not seen:
        raise InputError(f"{', '.join(source.questions for source in sources)}: no questions")


def _question(source: QuestionSource, line: bytes, where: str, number: int) -> Question:
    check_items(line, where)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}")
    text, answer = _question_and_answer(row, where)
    images = row.get("image", row.get("images")) or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise InputError(f"{where}: `image` must be a path or a list of paths, got {images!r}")
    marks = text.count("<image>")
    if marks and images and marks != len(images):
        raise InputError(f"{where}: {marks} <image> marks but {len(images)} images")
    root = (Path(source.root) if source.root else Path(source.questions).parent).absolute()
    paths = [str(root / image) for image in images]
    for image in paths:
        if not os.path.isfile(image):  # noqa: PTH113, never raises
            raise InputError(f"{where}: no such image: {short(image, 300)}")
    answers = [] if answer is None else answer if isinstance(answer, list) else [answer]
    if not all(isinstance(accepted, str | int | float) and str(accepted).strip() for accepted in answers):
        raise InputError(f"{where}: `answer` must be text or a list of texts, got {answer!r}")
    return Question(
        id=f"{source.name}/{row.get('id', number)}",
        source=source.name,
        images=tuple(paths),
        text=ask(text, source.style if source.instruct else "direct", source.language, source.domain),
        answers=tuple(map(str, answers)),
        max_tiles=source.max_tiles,
    )


def _question_and_answer(row: dict[str, Any], where: str) -> tuple[str, Any]:
    """Return question and answer of a row of either kind."""
    if isinstance(row.get("question"), str) and row["question"].strip():
        return row["question"], row.get("answer", row.get("answer_gt"))
    turns = row.get("conversations")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        first = {turn.get("from"): turn.get("value") for turn in reversed(turns)}
        if isinstance(first.get("human"), str) and first["human"].strip():
            return first["human"], first.get("gpt")
    raise InputError(f"{where}: neither `question` nor `conversations` that begin with one; keys are {sorted(row)}")
