"""The judge: scores are read from what models really say, asked once, counted when there is none."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ivl.errors import InputError
from ivl.filters.judge import DOMAINS, STRICTER, DataJudge, DataJudgeConfig, LlmRepetition, Quality, parse_score, sample_text
from ivl.generators import Refused
from ivl.types import Conversation, ImageRef, Message, Record, SamplingParams, Text, TextDelta


def record(answer: str, question: str = "What is it?") -> Record:
    talk = (Message("user", (Text(question),)), Message("assistant", (Text(answer),)))
    return Record(id=answer, conversations=(talk,), source=f"rows.jsonl:{answer}")


@dataclass
class Fake:
    """Says what the answer under judgement tells it to: `says X`; refuses `refuse`."""

    asked: list[str] = field(default_factory=list)
    strict: str | None = None
    """What it says to the stricter prompt."""

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
        text = prompt[-1].text
        self.asked.append(text)
        if "refuse" in text:
            raise Refused("endpoint: too long")
        if text.endswith(STRICTER) and self.strict is not None:
            yield TextDelta(self.strict)
            return
        yield TextDelta("Well. ")
        yield TextDelta(re.findall("says (.*)", text)[-1], finish_reason="stop")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 8", 8), ("It is good.\n**Score:** 7/10", 7), ("It is good. \nScore: 9.5", 9.5), ('{"score": 3}', 3), ("8", 8),
        ("**8**", 8), ("8/10", 8), ("I give it 6 out of 10.", 6), ("Score (0-10): 4", 4), ("评分：6", 6), ("Rating: 2", 2),
        ("the score is 5.", 5), ("Score: 3, no, Score: 4", 4), ("Score: 10", 10), ("Score: 0", 0), ("score = 7, really", 7),
        ("Score: -3", None), ("Score: 85/100", None), ("Score: 11", None), ("Score: 7-8", None), ("Score: 1000", None),
        ("Score: N", None), ("it has 3 faults", None), ("no idea", None), ("", None), (None, None), ("Score: 7 to 8", None),
    ],
)  # fmt: skip
def test_scores_are_read(reply: str | None, score: float | None) -> None:
    assert parse_score(reply) == score


def test_limits_and_domains() -> None:
    judge = DataJudge(Fake(), name="fake")
    rows = [(record(f"says Score: {n}"), "general") for n in (6, 7, 8)]
    verdicts = judge.verdicts(Quality(), rows)
    assert [(v.keep, v.score) for v in verdicts] == [(False, 6), (True, 7), (True, 8)]
    assert verdicts[0].reason == "score below 7"
    assert [v.keep for v in judge.verdicts(LlmRepetition(), [(record(f"says {n}/10"), "general") for n in (2, 3)])] == [
        False,
        True,
    ]
    assert len({Quality().prompt("x", domain) for domain in DOMAINS}) == 4
    with pytest.raises(ValueError, match=r"min_score.*11"):
        Quality(min_score=11)


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_no_score_is_asked_for_once_more_then_counted(policy) -> None:
    fake = Fake(strict="still nothing")
    judge = DataJudge(fake, name="fake", config=DataJudgeConfig(unjudged=policy))
    (verdict,) = judge.verdicts(Quality(), [(record("says nothing"), "general")])
    assert (verdict.keep, verdict.reason, verdict.score) == (policy == "keep", "unjudged", None)
    assert len(fake.asked) == 2 and fake.asked[1] == fake.asked[0] + STRICTER
    fake.strict = "Score: 9"
    assert judge.verdicts(Quality(), [(record("says nothing at all"), "general")])[0].score == 9


def test_refused_rows_are_unjudged_and_the_others_judged() -> None:
    judge = DataJudge(Fake(), name="fake")
    verdicts = judge.verdicts(Quality(), [(record(t), "general") for t in ("says 9/10", "refuse, says 9/10", "says 8/10")])
    assert [(v.score, v.reason) for v in verdicts] == [(9, ""), (None, "unjudged"), (8, "")]


def test_a_judge_that_gives_no_scores_stops_the_run() -> None:
    judge = DataJudge(Fake(), name="fake")
    with pytest.raises(InputError, match=r"judge fake: 60 of 60 times there was no score.*'Well. nothing"):
        judge.verdicts(Quality(), [(record(f"says nothing {n}"), "general") for n in range(60)])


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"
    rows = [(record(f"says Score: {n % 10}"), "general") for n in range(25)]
    fake = Fake()
    before = DataJudge(fake, name="fake", cache=cache).verdicts(Quality(), rows)
    assert len(fake.asked) == 10  # ten different samples
    again = Fake()
    assert DataJudge(again, name="fake", cache=cache).verdicts(Quality(), rows) == before
    DataJudge(again, name="fake", cache=cache).verdicts(Quality(min_score=3), rows)  # another threshold, the same replies
    assert again.asked == []
    for other in (
        lambda: DataJudge(again, name="another", cache=cache).verdicts(Quality(), rows),
        lambda: DataJudge(again, name="fake", cache=cache).verdicts(LlmRepetition(), rows),
        lambda: DataJudge(again, name="fake", cache=cache, config=DataJudgeConfig(temperature=1)).verdicts(Quality(), rows),
        lambda: DataJudge(again, name="fake", cache=cache).verdicts(Quality(), [(r, "mathematics") for r, _ in rows]),
    ):
        again.asked.clear()
        other()
        assert len(again.asked) == 10
    (tmp_path / "text").write_text("not a database" * 100)
    with pytest.raises(InputError, match="cannot be used as the judge's cache"):
        DataJudge(fake, name="fake", cache=tmp_path / "text").verdicts(Quality(), rows)


def test_replies_are_kept_as_they_arrive(tmp_path: Path) -> None:
    """One slow or failing request does not lose the replies before it."""
    cache, gate = tmp_path / "judge.sqlite", threading.Event()

    class Failing(Fake):
        def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
            if "says 7" in prompt[-1].text:
                gate.wait(5)
                raise InputError("endpoint: gone")
            if "says 9" in prompt[-1].text:
                gate.set()
            yield from super().stream(prompt, params)

    rows = [(record(f"says {n}/10"), "general") for n in range(10)]
    with pytest.raises(InputError, match="gone"):
        DataJudge(Failing(), name="fake", cache=cache, threads=2).verdicts(Quality(), rows)
    fake = Fake()
    assert [v.score for v in DataJudge(fake, name="fake", cache=cache, threads=2).verdicts(Quality(), rows)] == list(range(10))
    assert 1 <= len(fake.asked) <= 3


def test_local_models_get_batches() -> None:
    sizes = []

    class Batches(Fake):
        def generate(self, conversations: Sequence[Conversation], params: SamplingParams) -> list[TextDelta]:
            sizes.append(len(conversations))
            return [TextDelta("5/10")] * len(conversations)

    rows = [(record(f"number {n}"), "general") for n in range(70)]
    DataJudge(Batches(), name="fake", config=DataJudgeConfig(batch_size=32)).verdicts(Quality(), rows)
    assert sizes == [32, 32, 6]


def test_what_the_judge_reads() -> None:
    talk = (Message("user", (ImageRef("1.png"), Text(" who?"))), Message("assistant", (Text("{me}"),)))
    text = sample_text(Record(id="1", conversations=(talk, talk), source="a:1"), 1000)
    assert text == "\n\n---\n\n".join(["[user]\n[image] who?\n\n[assistant]\n{me}"] * 2)
    long = sample_text(record("x" * 1000 + "END", "START"), 100)
    assert "START" in long and "END" in long and "characters are not shown" in long and len(long) < 160
    assert Quality().prompt(text, "general").count("{me}") == 2
