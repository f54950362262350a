"""Questions to sample from: which files, how they are put, and how answers are checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.errors import InputError, nearest
from ivl.evaluation.prompts import AnswerStyle, Domain, PromptLanguage, ask
from ivl.evaluation.scoring import AnswerMode, mode_for
from ivl.processing.chat import user
from ivl.types import Conversation, ImageRef, Message, Text


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of questions. Its rows have `question`, `image` (a path, a list of paths or none), `id` and, where known,
    `answer`; or they are training rows, whose first question and answer are taken."""

    name: str
    questions: str
    """A .jsonl file."""
    root: str = ""
    """Folder that relative image paths start from; empty is the file's own."""
    style: AnswerStyle = "final_answer"
    """How a reply is asked to show its answer; direct leaves the question as it is."""
    instruct: bool = True
    """False asks the bare question of a model that was trained to reason in this style."""
    language: PromptLanguage = "en"
    domain: Domain | None = None
    """Adds the instruction for questions without a checked answer (Dropout-NTP)."""
    mode: AnswerMode = "auto"
    """How answers are compared, by ivl.evaluation.scoring.verify; `load_sources` goes by the name where none is given."""
    max_tiles: int | None = None
    """Tiles of an image; None takes the model's."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Source)
        for name, kind in ((name, hints[name]) for name in ("style", "language", "mode")):
            if getattr(self, name) not in typing.get_args(kind):
                raise InputError(f"source {self.name!r}: {name} {getattr(self, name)!r} is not one of {typing.get_args(kind)}")
        if self.domain is not None and self.domain not in typing.get_args(Domain):
            raise InputError(f"source {self.name!r}: domain {self.domain!r} is not one of {typing.get_args(Domain)}")
        if self.max_tiles is not None and (not isinstance(self.max_tiles, int) or self.max_tiles < 1):
            raise InputError(f"source {self.name!r}: max_tiles must be an integer >= 1, got {self.max_tiles!r}")


@dataclass(frozen=True, kw_only=True)
class Question:
    id: str
    """Unique among all sources: `name/id of the row`."""
    source: str
    images: tuple[str, ...]
    text: str
    """As the model is asked."""
    answers: tuple[str, ...]
    """Accepted answers; empty when none is known."""
    max_tiles: int | None = None

    def conversation(self, *, images: bool = True, begun: str = "") -> Conversation:
        """The question as a prompt, with or without its images, and with the beginning of a reply to be continued."""
        marks = self.text.count("<image>")
        text = self.text if images else self.text.replace("<image>\n", "").replace("<image>", "")
        refs = [ImageRef(path, max_tiles=self.max_tiles) for path in self.images] if images else []
        if images and not marks:
            text = "<image>\n" * len(refs) + text
        turn = user(text, *refs)
        return (turn, Message("assistant", (Text(begun),))) if begun else (turn,)


def load_sources(path: str | Path, **defaults: Any) -> tuple[Source, ...]:
    """A JSON object of name -> Source fields, or one .jsonl file of questions with `defaults`. Names of known data sets say how
    answers are compared, where `mode` does not.

    Raises:
        InputError: naming the file, the source and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .jsonl file of questions or a JSON object of sources")
    if path.suffix == ".jsonl":
        return (Source(**{"name": path.stem, "questions": str(path), "mode": mode_for(path.stem), **defaults}),)
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}: expected an object of sources by name")
    return tuple(_source(path, name, {**defaults, **_object(path, name, entry)}) for name, entry in found.items())


def _object(path: Path, name: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{path}: source {name!r} must be an object, got {entry!r}")
    return entry


def _source(path: Path, name: str, entry: dict[str, Any]) -> Source:
    known = [field.name for field in dataclasses.fields(Source) if field.name != "name"]
    for key in entry:
        if key not in known:
            raise InputError(f"{path}: source {name!r} has an unknown key {key!r}; {nearest(key, known, 'keys')}")
    if not entry.get("questions"):
        raise InputError(f"{path}: source {name!r} has no `questions` file")
    beside = path.parent / entry["questions"]
    file = beside if beside.exists() else Path(entry["questions"])
    return Source(**{"name": name, "mode": mode_for(name), **entry, "questions": str(file)})


def fingerprint(sources: tuple[Source, ...]) -> str:
    """A hash of all that the questions follow from."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(source) for source in sources]).encode())
    for source in sources:
        digest.update(hashlib.sha256(Path(source.questions).read_bytes()).digest())
    return digest.hexdigest()[:16]


def read_questions(sources: tuple[Source, ...]) -> Iterator[Question]:
    """Every question of every source, in order.

    Raises:
        InputError: naming file and line, for a row that is not a question, a missing image or an id met before.
    """
    seen: set[str] = set()
    for source in sources:
        path = Path(source.questions)
        if not path.is_file():
            raise InputError(f"source {source.name!r}: no such file: {path}")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    question = _question(source, line, f"{path}:{number}", number)
                    if question.id in seen:
                        raise InputError(f"{path}:{number}: id {question.id!r} was used before; ids must differ")
                    seen.add(question.id)
                    yield question
    if not seen:
        raise InputError(f"{', '.join(source.questions for source in sources)}: no questions")


def _question(source: Source, line: bytes, where: str, number: int) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}")
    text, answer = _asked(row, where)
    images = row.get("image", row.get("images")) or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise InputError(f"{where}: `image` must be a path or a list of paths, got {images!r}")
    marks = text.count("<image>")
    if marks and marks != len(images):
        raise InputError(f"{where}: {marks} <image> marks but {len(images)} images")
    root = Path(source.root) if source.root else Path(source.questions).parent
    paths = [str(root / image) for image in images]
    for image in paths:
        if not Path(image).is_file():
            raise InputError(f"{where}: no such image: {image}")
    answers = [] if answer is None else answer if isinstance(answer, list) else [answer]
    if not all(isinstance(each, str | int | float) and str(each).strip() for each in answers):
        raise InputError(f"{where}: `answer` must be text or a list of texts, got {answer!r}")
    return Question(
        id=f"{source.name}/{row.get('id', number)}",
        source=source.name,
        images=tuple(paths),
        text=ask(text, source.style if source.instruct else "direct", source.language, source.domain),
        answers=tuple(map(str, answers)),
        max_tiles=source.max_tiles,
    )


def _asked(row: dict[str, Any], where: str) -> tuple[str, Any]:
    """Question and answer of a row of either kind."""
    if isinstance(row.get("question"), str) and row["question"].strip():
        return row["question"], row.get("answer", row.get("answer_gt"))
    turns = row.get("conversations")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        said = {turn.get("from"): turn.get("value") for turn in reversed(turns)}
        if isinstance(said.get("human"), str) and said["human"].strip():
            return said["human"], said.get("gpt")
    raise InputError(f"{where}: neither `question` nor `conversations` that begin with one; keys are {sorted(row)}")
