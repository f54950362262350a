"""Sampling and Dropout-NTP: every reply seeded, nothing doubled or lost by a kill, journals that refuse strangers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from ivl.errors import InputError
from ivl.evaluation.prompts import ask
from ivl.preference.pairs import join
from ivl.preference.questions import load_sources, read_questions
from ivl.preference.sampling import DropoutConfig, SamplingConfig, continue_without_images, first_words, sample
from ivl.types import Conversation, ImageRef, SamplingParams
from ivl.utils.jsonl import Journal, read_journal


@dataclass(frozen=True)
class PlainReply:
    text: str
    finish_reason: str = "stop"


class Echo:
    """Answers with the seed, the last words of the prompt and the number of images; may die at a given call."""

    def __init__(self, dies_at: int = 0) -> None:
        self.calls, self.dies_at, self.asked = 0, dies_at, 0

    def stream(self, prompt, params):  # pragma: no cover
        raise NotImplementedError

    def generate(self, conversations: Sequence[Conversation], params: Sequence[SamplingParams]) -> list[PlainReply]:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.asked += len(conversations)
        replies = []
        for conversation, each in zip(conversations, params, strict=True):
            images = sum(isinstance(part, ImageRef) for part in conversation[0].content)
            replies.append(PlainReply(f"seed {each.seed} images {images} after {conversation[-1].text[-20:]}"))
        return replies


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows = [{"id": n, "image": "a.png", "question": f"question {n}?", "answer": str(n)} for n in range(7)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_reply_has_a_seed_of_its_own_whatever_the_chunk(questions: Path, tmp_path: Path) -> None:
    sources = load_sources(questions)
    texts = []
    for chunk in (1, 3, 10):
        config = SamplingConfig(num_replies=3, chunk=chunk)
        with pytest.raises(InputError, match=r"num_replies must be in \[1, 10000\]"):
            replace(config, num_replies=1_000_000_000)
        out = sample(Echo(), sources, tmp_path / f"out{chunk}.jsonl", model="m", config=config)
        texts.append([reply["text"] for _, row in read_journal(out)[1] for reply in row["replies"]])
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) == 21
    assert "images 1" in texts[0][0]


@pytest.mark.parametrize("dies_at", [1, 2, 3])
@pytest.mark.parametrize("torn", [0, 5, 60])
def test_a_killed_run_ends_as_if_it_never_was(questions: Path, tmp_path: Path, dies_at: int, torn: int) -> None:
    sources, out, whole = load_sources(questions), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    sample(Echo(), sources, whole, model="m", config=SamplingConfig(num_replies=2, chunk=3))
    with pytest.raises(KeyboardInterrupt):
        sample(Echo(dies_at), sources, out, model="m", config=SamplingConfig(num_replies=2, chunk=3))
    with out.open("ab") as file:  # what a kill leaves of a chunk
        file.write(whole.read_bytes()[len(out.read_bytes()) :][:torn])
    again = Echo()
    sample(again, sources, out, model="m", config=SamplingConfig(num_replies=2, chunk=3))
    assert out.read_bytes() == whole.read_bytes()
    assert again.asked == 14 - 6 * (dies_at - 1), "nothing is asked twice"


def test_a_journal_of_another_run_is_refused(questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    sample(Echo(), load_sources(questions), out, model="m", config=SamplingConfig(num_replies=2))
    with pytest.raises(InputError, match="num_replies was 2, is 3"):
        sample(Echo(), load_sources(questions), out, model="m", config=SamplingConfig(num_replies=3))
    (tmp_path / "notes.txt").write_text("mine\n")
    with pytest.raises(InputError, match=r"notes\.txt:1: not valid JSON .*choose another output"):
        Journal(tmp_path / "notes.txt", {})
    assert (tmp_path / "notes.txt").read_text() == "mine\n"


def test_dropout_keeps_half_the_words_and_no_image(questions: Path, tmp_path: Path) -> None:
    replies = sample(Echo(), load_sources(questions), tmp_path / "r.jsonl", model="m", config=SamplingConfig(num_replies=2))
    out = continue_without_images(Echo(), replies, tmp_path / "d.jsonl", model="m", config=DropoutConfig(chunk=2))
    rows = [row for _, row in read_journal(out)[1]]
    assert len(rows) == 7
    for row in rows:
        assert row["chosen"].startswith(row["prefix"] + " ") and "images 0" in row["continuation"]
        assert row["continuation"].endswith(row["prefix"][-20:])


def test_first_words() -> None:
    assert first_words("one two three four", 0.5) == "one two"
    assert first_words("one two three", 0.5) == "one" and first_words("one", 0.5) == ""


@pytest.mark.parametrize(
    ("prefix", "continuation", "joined"),
    [("a b", " c", "a b c"), ("a b", "c", "a b c"), ("a b", ", c", "a b, c"), ("图中", "有", "图中有"), ("a\n", "b", "a\nb")],
)
def test_join(prefix: str, continuation: str, joined: str) -> None:
    assert join(prefix, continuation) == joined


def test_a_request_to_reason_replaces_one_for_a_bare_answer() -> None:
    short = "How many?\nAnswer the question using a single word or phrase."
    assert ask(short, "direct") == short
    assert ask(short, "final_answer").startswith("How many?\nWork") and "single word" not in ask(short, "boxed")
    assert "最终答案" in ask("多少？", "final_answer", "zh")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"id": 1}', "neither `question`"),
        ("{", "not valid JSON"),
        ('{"question": "q", "image": "none.png"}', "no such image"),
        (f'{{"question": "q", "image": "{"a" * 300}"}}', "no such image"),
        (f'{{"question": "q", "more": [{"1, " * 1_000_001}1]}}', "the limit of a row is 1,000,000"),
        ('{"question": "<image> <image> q", "image": "a.png"}', "2 <image> marks but 1 images"),
        ('{"question": "q", "answer": {"a": 1}}', "`answer` must be"),
        ('{"id": 0, "question": "again"}', "used before"),
    ],
)
def test_bad_questions_name_file_and_line(questions: Path, row: str, problem: str) -> None:
    with questions.open("a") as file:
        file.write(row + "\n")
    with pytest.raises(InputError, match=rf"q\.jsonl:8: .*{problem}"):
        list(read_questions(load_sources(questions)))


def test_sources_are_checked(tmp_path: Path, questions: Path) -> None:
    meta = tmp_path / "sources.json"
    meta.write_text(json.dumps({"x": {"questions": "q.jsonl", "styl": "boxed"}}))
    with pytest.raises(InputError, match="did you mean 'style'"):
        load_sources(meta)
    meta.write_text(json.dumps({"x": {"questions": "q.jsonl", "style": "boxd"}}))
    with pytest.raises(InputError, match=r"style must be .*got 'boxd'"):
        load_sources(meta)
    meta.write_text(json.dumps({"x": {"questions": "q.jsonl", "style": "boxed", "max_tiles": 3}}))
    [source] = load_sources(meta)
    assert "boxed" in next(read_questions((source,))).text


def test_a_known_name_says_how_answers_are_compared(tmp_path: Path) -> None:
    for name in ("chartqa_train", "mine"):
        (tmp_path / f"{name}.jsonl").write_text("")
    file = tmp_path / "sources.json"
    file.write_text(json.dumps({
        "docvqa": {"questions": "mine.jsonl"}, "GeoQA+": {"questions": "mine.jsonl", "mode": "exact"},
        "mine": {"questions": "mine.jsonl"},
    }))  # fmt: skip
    assert [source.mode for source in load_sources(file)] == ["anls", "exact", "auto"]
    assert [load_sources(tmp_path / f"{name}.jsonl")[0].mode for name in ("chartqa_train", "mine")] == ["relaxed", "auto"]
    assert load_sources(tmp_path / "chartqa_train.jsonl", mode="exact")[0].mode == "exact"
