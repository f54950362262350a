"""Laws of sharing and of fairness: what was computed is not computed again, and nobody waits longer than one step."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from ivl.inference.engine import Engine, Request
from ivl.model.vlm import VLM
from ivl.types import Conversation, ImageRef, Message, SamplingParams, Text
from tests.helpers.engines import ask, assert_idle, lively_model, picture, tiny_engine
from tests.inference.test_engine import MIXED, requests

IMAGES = tuple(ImageRef(picture(n), 3) for n in range(4))
SHORT = SamplingParams(max_new_tokens=6)


@pytest.fixture
def model() -> VLM:
    return lively_model()


@pytest.fixture
def computed(model: VLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward call."""
    counts: list[int] = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda tokens, *rest: counts.append(len(tokens)) or embed(tokens, *rest))
    return counts


def run(engine: Engine, *wanted: Request) -> None:
    for request in wanted:
        engine.add(request)
    while any(request.finish_reason is None for request in wanted):
        engine.step()


def text_of(request: Request) -> str:
    return "".join(delta.text for delta in request.deltas)


def test_a_prompt_found_in_the_cache_gives_the_same_text(model: VLM) -> None:
    """Questions about the same images, the same questions again, and conversations that go on."""
    shared = tiny_engine(model, max_batch_tokens=64)
    rng = random.Random(3)
    asked: list[Conversation] = []
    for n in range(40):
        if n % 3 == 0 or not asked:
            asked.append(ask("".join(chr(rng.randint(40, 110)) for _ in range(30)), *rng.sample(IMAGES, rng.randint(0, 3))))
        elif n % 3 == 1:
            asked.append(rng.choice(asked))
        else:
            before = rng.choice(asked)
            said = shared.generate([before], SamplingParams(max_new_tokens=20))[0].text
            asked.append((*before, Message("assistant", (Text(said),)), Message("user", (Text("and then?"),))))
        reply = shared.generate([asked[-1]], MIXED[n % len(MIXED)])[0]
        fresh = tiny_engine(model).generate([asked[-1]], MIXED[n % len(MIXED)])[0]
        assert (reply.text, reply.tokens) == (fresh.text, fresh.tokens) and fresh.num_cached == 0
    stats = shared.stats()
    assert stats.prefix_hit_tokens > stats.prompt_tokens / 3
    assert_idle(shared)


@pytest.mark.parametrize("budget", [2048, 29])
@pytest.mark.parametrize("length", [3, 47, 100])
def test_many_replies_to_one_prompt_compute_it_once(model: VLM, computed: list[int], budget: int, length: int) -> None:
    conversation = ask("x" * length, IMAGES[0])
    params = [SamplingParams(max_new_tokens=9, temperature=1.0, seed=n) for n in range(8)]
    expected = [tiny_engine(model).generate([conversation], p)[0].text for p in params]
    computed.clear()
    shared = tiny_engine(model, max_batch_tokens=budget)
    replies = shared.generate([conversation] * 8, params)
    assert [r.text for r in replies] == expected and len(set(expected)) > 1
    num_prompt, generated = replies[0].prompt_tokens, sum(len(r.tokens) - 1 for r in replies)
    assert sum(computed) == num_prompt + 7 + generated  # each reply follows the last token of the prompt
    assert sorted(r.num_cached for r in replies) == [0] + [num_prompt - 1] * 7
    assert_idle(shared)


def test_a_second_question_computes_only_what_is_new(model: VLM, computed: list[int]) -> None:
    shared = tiny_engine(model, vision_cache_bytes=0)
    first, second = (shared.generate([ask(text, *IMAGES)], SHORT)[0] for text in ("what is it?" * 3, "and what colour?"))
    shown = 1 + 12 * 4
    assert first.num_cached == 0 and second.num_cached == shown // 16 * 16
    assert computed[0] == first.prompt_tokens and second.prompt_tokens - second.num_cached in computed
    # The last tile is shown beyond the last full block: it alone is encoded again.
    assert shared.stats().vision_misses == 12 + 1 and second.timings.vision > 0
    third = shared.generate([ask("what is it?" * 3, *IMAGES)], SHORT)[0]
    assert third.num_cached == third.prompt_tokens - 1 and third.timings.vision == 0
    assert shared.stats().vision_misses == 13


def test_other_pictures_or_places_are_other_prompts(model: VLM) -> None:
    shared = tiny_engine(model)
    conversations = [ask("which?" * 9, IMAGES[a], IMAGES[b]) for a, b in [(0, 1), (1, 0), (0, 2), (3, 1)]]
    replies = shared.generate(conversations, SHORT)
    assert [r.num_cached for r in replies] == [0, 0, 0, 0]  # blocks of 16: three tokens of the second tile are in the first
    assert [r.text for r in replies] == [tiny_engine(model).generate([c], SHORT)[0].text for c in conversations]


def test_requests_of_different_salts_share_nothing(model: VLM) -> None:
    """One user cannot find out what another has asked: neither blocks of prompt and reply nor vision tokens are shared."""
    shared = tiny_engine(model)
    asked = ask("which?" * 9, IMAGES[0])
    longer = SamplingParams(max_new_tokens=40, ignore_eos=True)

    def reply_of(salt: str, conversation: Conversation) -> tuple[str, int]:
        request = shared.submit(conversation, longer, cache_salt=salt)
        text = "".join(delta.text for delta in shared.deltas(request))
        return text, request.num_cached

    (text, first), misses = reply_of("alice", asked), shared.stats().vision_misses
    follow_up = (*asked, Message("assistant", (Text(text),)), Message("user", (Text("and then?"),)))
    assert first == 0 and reply_of("bob", asked) == (text, 0) and reply_of("", asked) == (text, 0)
    assert shared.stats().vision_misses == 3 * misses
    assert reply_of("bob", follow_up)[1] > len("which?" * 9) + 12 + 16  # blocks that the reply has filled, too
    assert reply_of("eve", follow_up)[1] == 0
    together = [shared.submit(asked, longer, cache_salt=salt) for salt in "xyxy"]
    for request in together:
        list(shared.deltas(request))
    assert [request.num_cached for request in together] == [0, 0, together[0].num_prompt - 1, together[1].num_prompt - 1]
    assert_idle(shared)


def test_what_is_longest_out_of_use_is_given_up_first(model: VLM) -> None:
    small = tiny_engine(model, max_cache_tokens=16 * 12)
    a, b, c = ask("a" * 79), ask("b" * 79), ask("c" * 111)  # five, five and seven blocks of twelve
    for conversation, cached in [(a, 0), (b, 0), (a, 79), (c, 0), (a, 79), (b, 0), (b, 79)]:
        assert small.generate([conversation], SamplingParams(max_new_tokens=1))[0].num_cached == cached
        assert_idle(small)
    many = [ask(chr(40 + n) * (20 + n)) for n in range(60)]
    replies = small.generate(many, SHORT)
    assert [r.text for r in replies] == [tiny_engine(model).generate([q], SHORT)[0].text for q in many]
    assert_idle(small)


def test_replies_go_on_beside_a_long_prompt(model: VLM, computed: list[int]) -> None:
    engine = tiny_engine(model, max_batch_tokens=24)
    engine.eos = frozenset()
    replies = [engine.submit(ask(f"talk {n}"), SamplingParams(max_new_tokens=100)) for n in range(4)]
    while any(not request.tokens for request in replies):
        engine.step()
    long = engine.submit(ask("y" * 300, *IMAGES))
    computed.clear()
    while not long.tokens:
        before = [len(request.tokens) for request in replies]
        encoded = engine.stats().vision_misses
        engine.step()
        assert [len(request.tokens) for request in replies] == [n + 1 for n in before]
        tiles = engine.stats().vision_misses - encoded
        assert tiles <= max(1, 20 // engine.scheduler.tile_cost) and computed[-1] <= 24
    assert long.timings.vision > 0
    words, more = engine.submit(ask("w" * 200)), engine.submit(ask("me, too"))
    while not more.tokens:
        engine.step()
    assert words.tokens  # first come, first served
    for request in (*replies, long, words, more):
        engine.cancel(request)
    assert_idle(engine)


def test_encodings_wait_for_their_turn_whatever_the_memory(model: VLM) -> None:
    """More tiles than a step encodes, and none remembered: each is encoded once, and the replies are right."""
    engine = tiny_engine(model, vision_cache_bytes=0, max_batch_tokens=16)
    conversations = [ask("look", *IMAGES[n:], *IMAGES[:n]) for n in range(3)]
    replies = engine.generate(conversations, SHORT)
    assert [r.text for r in replies] == [tiny_engine(model).generate([c], SHORT)[0].text for c in conversations]
    assert not engine.vision.cached and engine.stats().vision_misses <= 36


def test_cancelling_at_any_moment_frees_everything(model: VLM) -> None:
    rng = random.Random(5)
    engine = tiny_engine(model, max_batch_tokens=48, max_cache_tokens=1600, max_sequences=9)
    pool, open_requests = requests(30, seed=9), []
    expected = {id(c): tiny_engine(model).generate([c], SHORT)[0].text for c in pool}
    finished = []
    for _ in range(300):
        if len(open_requests) < 12:
            conversation = rng.choice(pool)
            open_requests.append((conversation, engine.submit(conversation, SHORT)))
        engine.step()
        if rng.random() < 0.4:
            engine.cancel(open_requests.pop(rng.randrange(len(open_requests)))[1])
        finished += [(c, r) for c, r in open_requests if r.finish_reason]
        open_requests = [(c, r) for c, r in open_requests if not r.finish_reason]
    assert len(finished) > 50 and all(text_of(r) == expected[id(c)] for c, r in finished)
    for _, request in open_requests:
        engine.cancel(request)
        engine.cancel(request)
        assert request.cancelled and not request.cache.tiles and not request.cache.vision
    assert_idle(engine)


def test_who_waits_for_a_cancelled_prompt_computes_it(model: VLM) -> None:
    engine = tiny_engine(model, max_batch_tokens=32)
    leader, follower, other = (engine.submit(ask(t * 90), SHORT) for t in "aab")
    engine.step()
    engine.step()
    assert follower in engine.scheduler.waiting
    engine.cancel(leader)
    list(engine.deltas(other))
    while follower.finish_reason is None:
        engine.step()
    assert 0 < follower.num_cached < 90 and follower.timings.queue > 0
    assert text_of(follower) == tiny_engine(model).generate([ask("a" * 90)], SHORT)[0].text
    assert_idle(engine)


def test_prompts_of_stretched_positions_are_read_whole(model: VLM) -> None:
    """With dynamic NTK the rotary base depends on the whole length, so neither pieces nor prefixes would be right."""
    config = replace(model.config, decoder=replace(model.config.decoder, rope_dynamic_factor=2.0, max_positions=60))
    stretched = VLM(config).eval()
    stretched.load_state_dict(model.state_dict())
    conversations = [ask("s" * 90, IMAGES[0]), ask("s" * 90, IMAGES[0]), ask("t" * 20), ask("u" * 70)]
    shared = tiny_engine(stretched, max_batch_tokens=16, max_context=200)
    replies = shared.generate(conversations, SHORT)
    assert [r.num_cached for r in replies] == [0, 0, 0, 0]
    for conversation, reply in zip(conversations, replies, strict=True):
        assert reply.text == tiny_engine(stretched, max_context=200).generate([conversation], SHORT)[0].text
    assert_idle(shared)


def test_several_replies_are_prepared_once(model: VLM) -> None:
    engine = tiny_engine(model)
    params = [SamplingParams(max_new_tokens=n) for n in (1, 4)]
    wanted = engine.prepare_all(ask("hello", IMAGES[0]), params)
    assert engine.processor.calls == 1 and [r.max_new_tokens for r in wanted] == [1, 4]  # type: ignore[attr-defined]
    run(engine, *wanted)
    assert [len(r.tokens) for r in wanted] == [1, 4]
    with torch.inference_mode():
        engine.step()  # nothing to do
    assert_idle(engine)
