"""Many replies to every question, from any generator, and Dropout-NTP's continuations; kill -9 loses the chunk at work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ivl.errors import InputError
from ivl.generators import Generator, replies_of
from ivl.preference.questions import Question, Source, fingerprint, read_questions
from ivl.types import Conversation, SamplingParams
from ivl.utils.jsonl import Journal, read_journal

PARAMS = SamplingParams(temperature=1.0, top_k=50, max_new_tokens=4096)
"""The published settings (spec 6.1)."""
CONTINUE = replace(PARAMS, max_new_tokens=2048)


@dataclass(frozen=True, kw_only=True)
class Progress:
    done: int
    """Rows written, those of earlier runs included."""
    resumed: int
    replies: int
    """Replies of this run."""


def sample(
    generator: Generator,
    sources: tuple[Source, ...],
    out: Path,
    *,
    model: str,
    num_replies: int = 32,
    params: SamplingParams = PARAMS,
    seed: int = 0,
    chunk: int = 16,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """Ask every question `num_replies` times; a row per question goes to the journal `out`.

    model: name and, for a local one, a fingerprint of the weights; a journal of another model is not continued.
    chunk: questions asked together and written as one. Every reply has a seed of its own, from `seed` and the question.

    Raises:
        InputError: for a bad question, a generator that fails, or an `out` that belongs to another run.
    """
    about = {
        "kind": "replies", "questions": fingerprint(sources), "model": model, "num_replies": num_replies, "seed": seed,
        "params": _plain(params), "chunk": chunk, "sources": [asdict(source) for source in sources],
    }  # fmt: skip

    def ask(questions: list[Question]) -> list[dict[str, Any]]:
        prompts = [question.conversation() for question in questions for _ in range(num_replies)]
        every = [replace(params, seed=_seed(seed, q.id, k)) for q in questions for k in range(num_replies)]
        replies = iter(_replies(generator, prompts, every, questions))
        return [{**_row(question), "replies": list(islice(replies, num_replies))} for question in questions]

    return _run(Journal(out, about), read_questions(sources), chunk, ask, on_progress)


def continue_without_images(
    generator: Generator,
    replies: Path,
    out: Path,
    *,
    model: str,
    ratio: float = 0.5,
    per_question: int = 1,
    params: SamplingParams = CONTINUE,
    seed: int = 0,
    chunk: int = 64,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Path:
    """Dropout-NTP: keep the first part of a reply's words, take the images away, and let the model go on (spec 6.2).

    replies: the journal of `sample`. Its first `per_question` whole replies to each question are the chosen ones.
    ratio: share of the words that is kept.

    Raises:
        InputError: as `sample`; also for a ratio outside (0, 1) or questions without images.
    """
    if not 0 < ratio < 1:
        raise InputError(f"ratio must be in (0, 1), got {ratio}")
    asked_about, rows = read_journal(replies)
    about = {
        "kind": "dropout", "replies": hashlib.sha256(replies.read_bytes()).hexdigest()[:16], "model": model, "ratio": ratio,
        "per_question": per_question, "seed": seed, "params": _plain(params), "chunk": chunk, "sources": asked_about["sources"],
    }  # fmt: skip

    def begun() -> Iterator[dict[str, Any]]:
        for number, row in rows:
            if not row["images"]:
                raise InputError(f"{replies}:{number}: question {row['id']!r} has no image to take away")
            whole = [reply["text"] for reply in row["replies"] if reply["finish_reason"] == "stop" and reply["text"].strip()]
            for k, text in enumerate(whole[:per_question]):
                if prefix := first_words(text, ratio):
                    yield {**row, "replies": None, "chosen": text, "prefix": prefix, "index": k}

    def go_on(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        prompts = [question_of(item).conversation(images=False, begun=item["prefix"]) for item in items]
        every = [replace(params, seed=_seed(seed, item["id"], item["index"])) for item in items]
        answers = _replies(generator, prompts, every, items)
        return [
            {**item, "continuation": a["text"], "finish_reason": a["finish_reason"]}
            for item, a in zip(items, answers, strict=True)
        ]

    return _run(Journal(out, about), begun(), chunk, go_on, on_progress)


def first_words(text: str, ratio: float) -> str:
    """The first share of the words, split at single spaces, without trailing white space; may be empty."""
    words = text.split(" ")
    return " ".join(words[: int(len(words) * ratio)]).strip()


def question_of(row: dict[str, Any]) -> Question:
    return Question(
        id=row["id"], source=row["source"], images=tuple(row["images"]), text=row["question"], answers=tuple(row["answers"]),
        max_tiles=row["max_tiles"],
    )  # fmt: skip


def _row(question: Question) -> dict[str, Any]:
    return {
        "id": question.id, "source": question.source, "images": list(question.images), "question": question.text,
        "answers": list(question.answers), "max_tiles": question.max_tiles,
    }  # fmt: skip


def _run(journal: Journal, items: Iterator[Any], chunk: int, work: Callable[[list[Any]], list[dict]], on_progress) -> Path:
    """Whole chunks in order, beginning after those that the journal holds."""
    with journal:
        resumed = sum(1 for _ in islice(items, journal.num_chunks * chunk))
        done = replies = 0
        on_progress(Progress(done=resumed, resumed=resumed, replies=0))
        while batch := list(islice(items, chunk)):
            rows = work(batch)
            journal.add(rows)
            done += len(rows)
            replies += sum(len(row.get("replies") or (1,)) for row in rows)
            on_progress(Progress(done=resumed + done, resumed=resumed, replies=replies))
    return journal.path


def _replies(generator: Generator, prompts: list[Conversation], params: list[SamplingParams], items: list[Any]) -> list[dict]:
    names = [item["id"] if isinstance(item, dict) else item.id for item in items]
    try:
        replies = replies_of(generator, prompts, params)
    except InputError as error:
        raise InputError(f"questions {names[0]} to {names[-1]}: {error}") from error
    return [{"text": reply.text, "finish_reason": reply.finish_reason} for reply in replies]


def _seed(seed: int, question: str, index: int) -> int:
    digest = hashlib.sha256(f"{seed} {question} {index}".encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def _plain(params: SamplingParams) -> dict[str, Any]:
    return {**asdict(params), "stop": list(params.stop), "seed": None}
