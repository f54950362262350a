"""Samples many replies to every question, and Dropout-NTP's continuations; kill -9 loses the chunk at work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.generators import Generator, replies_of
from ivl.preference.questions import Question, QuestionSource, fingerprint, read_questions
from ivl.types import Conversation, SamplingParams
from ivl.utils.budgets import MAX_REPLIES
from ivl.utils.checks import check_ranges
from ivl.utils.files import file_hash
from ivl.utils.jsonl import Journal, read_journal, reading_line, whole_text

SAMPLED = SamplingParams(temperature=1.0, top_k=50, max_new_tokens=4096)
CONTINUED = replace(SAMPLED, max_new_tokens=2048)
MAX_CHUNK = 10_000
"""Questions of a chunk, which is in memory, and saved as one."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How replies are sampled."""

    num_replies: int = 32
    """Replies to each question."""
    chunk: int = 16
    """Questions that are asked together and saved as one."""
    params: SamplingParams = SAMPLED
    """Every reply has a seed of its own that follows from the seed here (0 if none) and the question."""

    def __post_init__(self) -> None:
        check_ranges(self, num_replies=f"[1, {MAX_REPLIES}]", chunk=f"[1, {MAX_CHUNK}]")


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """How replies are continued without their images."""

    ratio: float = 0.5
    """Share of a reply's words that is kept."""
    per_question: int = 1
    """Replies to each question that are taken."""
    chunk: int = 64
    """Replies that are continued together and saved as one."""
    params: SamplingParams = CONTINUED
    """Every continuation has a seed of its own that follows from the seed here (0 if none) and the question."""

    def __post_init__(self) -> None:
        check_ranges(self, ratio="(0, 1)", per_question=f"[1, {MAX_REPLIES}]", chunk=f"[1, {MAX_CHUNK}]")


def sample(
    generator: Generator,
    sources: tuple[QuestionSource, ...],
    out: Path,
    *,
    model: str,
    config: SamplingConfig | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Ask every question many times; a row per question goes to the journal `out`.

    Args:
        model: Name and, for a local one, a fingerprint of the weights; a journal of another model is not continued.
        on_progress: Gets the rows that are written, and how many of them earlier runs wrote.

    Raises:
        InputError: for a bad question, a generator that fails, or an `out` that belongs to another run.
    """
    config = config or SamplingConfig()
    about = {
        "kind": "replies", "questions": fingerprint(sources), "model": model, "num_replies": config.num_replies,
        **_settings(config.params), "chunk": config.chunk, "sources": [asdict(source) for source in sources],
    }  # fmt: skip

    def ask(questions: list[Question]) -> list[dict[str, Any]]:
        repeated = [(question, k) for question in questions for k in range(config.num_replies)]
        prompts = [question.conversation() for question, _ in repeated]
        params = [_seeded(config.params, question.id, k) for question, k in repeated]
        replies = iter(_replies(generator, prompts, params, [question.id for question in questions]))
        return [question.row() | {"replies": list(islice(replies, config.num_replies))} for question in questions]

    return _run(Journal(out, about), read_questions(sources), config.chunk, ask, on_progress)


def continue_without_images(
    generator: Generator,
    replies: Path,
    out: Path,
    *,
    model: str,
    config: DropoutConfig | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Dropout-NTP (arXiv:2411.10442): keep the first words of a reply, take the images away, and let the model go on.

    Args:
        replies: The journal of `sample`. Its first whole replies to each question are the chosen ones.

    Raises:
        InputError: as `sample`; also for questions without images.
    """
    config = config or DropoutConfig()
    about_replies, rows = read_journal(replies)
    about = {
        "kind": "dropout", "replies": file_hash(replies, "sha256")[:16], "model": model,
        "ratio": config.ratio, "per_question": config.per_question, **_settings(config.params), "chunk": config.chunk,
        "sources": about_replies["sources"],
    }  # fmt: skip

    def prefixes() -> Iterator[dict[str, Any]]:
        for number, row in rows:
            with reading_line(replies, number, "sample the question again into another file"):
                if not row["images"]:
                    raise InputError(f"{replies}:{number}: question {row['id']!r} has no image to take away")
                whole = [
                    reply["text"] for reply in row["replies"] if reply["finish_reason"] == "stop" and reply["text"].strip()
                ]
            for k, text in enumerate(whole[: config.per_question]):
                if prefix := first_words(text, config.ratio):
                    yield {**row, "replies": None, "chosen": text, "prefix": prefix, "index": k}

    def go_on(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        prompts = [Question.of(item).conversation(images=False, begun=item["prefix"]) for item in items]
        params = [_seeded(config.params, item["id"], item["index"]) for item in items]
        continuations = _replies(generator, prompts, params, [item["id"] for item in items])
        return [
            {**item, "continuation": reply["text"], "finish_reason": reply["finish_reason"]}
            for item, reply in zip(items, continuations, strict=True)
        ]

    return _run(Journal(out, about), prefixes(), config.chunk, go_on, on_progress)


def first_words(text: str, ratio: float) -> str:
    """Return the first share of the words, split at single spaces, without trailing white space; it may be empty."""
    words = text.split(" ")
    return " ".join(words[: int(len(words) * ratio)]).strip()


def _run(
    journal: Journal,
    items: Iterator[Any],
    chunk: int,
    work: Callable[[list[Any]], list[dict[str, Any]]],
    on_progress: Callable[[int, int], None],
) -> Path:
    """Work on whole chunks in order, beginning after those that the journal holds."""
    with journal:
        done = resumed = sum(1 for _ in islice(items, journal.num_chunks * chunk))
        on_progress(done, resumed)
        while batch := list(islice(items, chunk)):
            rows = work(batch)
            journal.add(rows)
            done += len(rows)
            on_progress(done, resumed)
    return journal.path


def _replies(
    generator: Generator, prompts: list[Conversation], params: list[SamplingParams], ids: list[str]
) -> list[dict[str, Any]]:
    try:
        replies = replies_of(generator, prompts, params)
    except InputError as error:
        raise InputError(f"questions {ids[0]} to {ids[-1]}: {error}") from error
    return [{"text": whole_text(reply.text), "finish_reason": reply.finish_reason} for reply in replies]


def _seeded(params: SamplingParams, question: str, index: int) -> SamplingParams:
    digest = hashlib.sha256(f"{params.seed or 0} {question} {index}".encode("utf-8", "surrogatepass")).digest()
    return replace(params, seed=int.from_bytes(digest[:4], "little") & 0x7FFFFFFF)


def _settings(params: SamplingParams) -> dict[str, Any]:
    return {"seed": params.seed or 0, "params": {**json.loads(json.dumps(asdict(params))), "seed": None}}
