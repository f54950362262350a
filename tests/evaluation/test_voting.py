"""Voting and best-of-N: which reply is taken, from whatever answers, and what asking a judge means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ivl
from ivl.errors import InputError
from ivl.evaluation.prompts import reasoned
from ivl.evaluation.scoring import normalize
from ivl.evaluation.voting import (
    GUIDED_RATING,
    Candidate,
    RatingJudge,
    RewardModel,
    best_of,
    judged,
    rate,
    rating_of,
    sample,
    vote,
)
from ivl.generators import PlainReply
from ivl.types import Conversation, ImageRef, Message, SamplingParams, Text, TextDelta
from tests.helpers.engines import picture, tiny_directory

SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=10, seed=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("model"))


def said(*answers: str | None) -> list[Candidate]:
    return [Candidate(text=f"reply {answer}", answer=answer) for answer in answers]


def question(text: str, *images: ImageRef) -> Conversation:
    return (Message("user", (*images, Text(text))),)


@given(st.lists(st.sampled_from(["red", " Red.", "BLUE", "blue", "7", None]), min_size=1, max_size=12))
def test_the_most_frequent_answer_wins_and_the_first_of_several(answers: list[str | None]) -> None:
    found = vote(said(*answers))
    keys = [None if answer is None else normalize(answer) for answer in answers]
    counts = Counter(key for key in keys if key is not None)
    if not counts:
        assert found == 0
        return
    most = max(counts.values())
    assert counts[keys[found]] == most
    assert found == min(keys.index(key) for key in counts if counts[key] == most)


def test_answers_of_one_wording_count_as_one() -> None:
    assert vote(said("3", "Two dogs.", "**2** dogs", "three dogs")) == 1
    assert vote(said("B", "A", "a.")) == 1
    answers = said("2", "0.5", "1/2", "50%", "3")
    assert vote(answers) == 0


@given(st.lists(st.tuples(st.sampled_from(["a", None]), st.none() | st.floats(-9, 0)), min_size=1, max_size=8))
def test_the_best_reply_has_an_answer_and_a_score_where_any_has(drawn: list[tuple[str | None, float | None]]) -> None:
    some = [Candidate(text="", answer=answer, likelihood=score, rating=score) for answer, score in drawn]
    for by in ("likelihood", "judge"):
        index = best_of(some, by)
        rivals = [c for c in some if c.answer is not None] or some
        scores = [c.likelihood for c in rivals if c.likelihood is not None]
        assert some[index] in rivals and some[index].likelihood == (max(scores) if scores else None)
        assert index == some.index(some[index])


def test_replies_are_seeded_and_more_begin_with_the_same(directory: Path) -> None:
    engine = ivl.load(directory).engine
    asked = [question("what is it?", ImageRef(picture(1))), question("what colour?")]
    four = sample(engine, asked, SAMPLED, 4, likelihood=True)
    texts = [[c.text for c in some] for some in four]
    assert [[c.text for c in some] for some in sample(engine, asked, SAMPLED, 2)] == [some[:2] for some in texts]
    assert sample(engine, asked[:1], replace(SAMPLED, seed=7), 1)[0][0].text == texts[0][2]
    assert len({c.text for c in four[0]}) > 1 and all(c.likelihood is not None and c.likelihood < 0 for c in four[0])
    reply = engine.generate(asked[:1], replace(SAMPLED, logprobs=0))[0]
    assert four[0][0].likelihood == pytest.approx(sum(t.logprob for t in reply.logprobs) / len(reply.tokens))
    before = engine.stats()
    sample(engine, [question("something else, long enough to fill a whole block of the cache of keys and values")], SAMPLED, 8)
    after = engine.stats()
    prompt = (after.prompt_tokens - before.prompt_tokens) // 8
    assert after.prefix_hit_tokens - before.prefix_hit_tokens == 7 * (prompt - 1)


@dataclass
class Speaker:
    """Says what it is told to, whatever is asked."""

    says: Sequence[PlainReply]

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
        raise NotImplementedError

    def generate(self, conversations: Sequence[Conversation], params: object) -> list[PlainReply]:
        self.asked = list(conversations)
        return list(self.says[: len(conversations)])


def test_answers_are_read_in_the_style_and_cut_replies_have_none() -> None:
    texts = ["red\nblue\nFinal answer: red", "red\nblue\nFinal answer: re", "I do not know", "a\nb\nfinal answer: **blue**"]
    replies = [PlainReply(text, "length" if n == 1 else "stop") for n, text in enumerate(texts)]
    (found,) = sample(Speaker(replies), [question("?")], SAMPLED, 4, style="final_answer")
    assert [c.answer for c in found] == ["red", None, None, "**blue**"]
    (plain,) = sample(Speaker(replies), [question("?")], SAMPLED, 4)
    assert [c.answer for c in plain] == texts


def test_what_cannot_be_is_refused() -> None:
    speaker = Speaker([PlainReply("a", "stop")] * 4)
    with pytest.raises(InputError, match="at temperature 0 all 2 replies are the same"):
        sample(speaker, [question("?")], SamplingParams(), 2)
    with pytest.raises(InputError, match="got 0"):
        sample(speaker, [question("?")], SAMPLED, 0)
    with pytest.raises(InputError, match="no log-probabilities; choose by vote or judge"):
        sample(speaker, [question("?")], SAMPLED, 2, likelihood=True)


@pytest.mark.parametrize(
    ("text", "rating"),
    [("7", 7), ("10", 10), ("**8**/10", 8), ("Rating: 6.5", 6.5), ("0.", 0), ("100", None), ("80%", None), ("eleven", None),
     ("12, no: 3", 3), ("-", None), ("", None), ("我给 9 分", 9)],
)  # fmt: skip
def test_ratings_are_found(text: str, rating: float | None) -> None:
    assert rating_of(text) == rating


def test_a_judge_sees_the_question_with_its_pictures_and_equal_replies_once() -> None:
    image = ImageRef(picture(2))
    asked = (Message("system", (Text("be brief"),)), *question("what is it?", image))
    some = [Candidate(text=text, answer=text) for text in ("a dog", "a cat", "a dog", "a bird")]
    speaker = Speaker([PlainReply("3", "stop"), PlainReply("9", "stop"), PlainReply("no idea", "stop")])
    (rated,) = rate(RatingJudge(speaker), [asked], [some])
    assert [c.rating for c in rated] == [3, 9, 3, None] and best_of(rated, "judge") == 1
    assert speaker.asked[0] == judged(asked, "a dog") and image in speaker.asked[0][-1].content
    assert speaker.asked[0][0] == asked[0] and "a dog" in speaker.asked[0][-1].text
    (by_length,) = rate(lambda conversation, reply: len(reply), [asked], [some])
    assert [c.rating for c in by_length] == [5, 5, 5, 6]


def test_a_local_judge_can_only_say_a_number(directory: Path) -> None:
    pytest.importorskip("llguidance")
    some = [[Candidate(text=text, answer=text) for text in ("red", "blue", "a circle")]]
    (rated,) = rate(RatingJudge(ivl.load(directory).engine, GUIDED_RATING), [question("what colour?")], some)
    assert all(c.rating is not None and 0 <= c.rating <= 10 for c in rated)


def test_a_reader_tells_how_likely_it_would_have_said_the_reply(directory: Path) -> None:
    pytest.importorskip("llguidance")
    engine, asked = ivl.load(directory).engine, question("what colour?", ImageRef(picture(1)))
    own = engine.generate([asked], SamplingParams(max_new_tokens=200, logprobs=0))[0].text.strip("\ufffd")[:9]
    texts = ("red", "a 蓝 🦊", "two\nlines", "", own)
    (rated,) = rate(RewardModel(engine), [asked], [[Candidate(text=text, answer=text) for text in texts]])
    assert rated[3].rating is None and all(c.rating is not None and c.rating < 0 for c in rated if c.text)
    token = engine.processor.tokenizer
    ids = token.encode("red")
    first = engine.generate([asked], SamplingParams(max_new_tokens=1, logprobs=300))[0].logprobs[0]
    if len(ids) == 1:
        assert dict(first.top)[ids[0]] < 0


def test_reasoning_is_asked_for_after_the_pictures_in_the_language_of_the_question() -> None:
    image = ImageRef(picture(3))
    asked = (Message("user", (Text("look: "), image, Text("\nhow many?\nAnswer the question using a single word or phrase."))),)
    (turn,) = reasoned(asked, "final_answer")
    assert turn.content[:2] == asked[0].content[:2] and "single word" not in turn.text and "Final answer:" in turn.text
    assert "最终答案" in reasoned(question("有几个？"), "final_answer")[0].text
    assert reasoned(asked[:1], "direct") == asked
