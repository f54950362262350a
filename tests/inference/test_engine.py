"""Laws of the engine: a batch equals each alone, nothing leaks, limits are told with numbers."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch

from ivl.errors import InputError
from ivl.inference.engine import Engine, Reply
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import train_tokenizer
from ivl.types import Conversation, Grammar, ImageRef, SamplingParams
from tests.helpers.engines import FIRST_CHARACTER, FakeProcessor, ask, assert_idle, lively_model, picture, tiny_engine


@pytest.fixture
def lively() -> VLM:
    return lively_model()


def requests(count: int, seed: int = 0) -> list[Conversation]:
    """Conversations of 3 to 270 characters with 0 to 6 images of 1 to 3 tiles: prompts of 5 to 340 tokens."""
    rng = random.Random(seed)
    conversations = []
    for _ in range(count):
        images = [ImageRef(picture(rng.randrange(8)), rng.randint(1, 3)) for _ in range(rng.randint(0, 6))]
        length = rng.randint(3, 60) if rng.random() < 0.8 else rng.randint(60, 270)
        conversations.append(ask("".join(chr(rng.randint(40, 110)) for _ in range(length)), *images))
    return conversations


MIXED = [
    SamplingParams(max_new_tokens=24),
    SamplingParams(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=11),
    SamplingParams(max_new_tokens=30, temperature=1.2, top_k=20, repetition_penalty=1.3, seed=7),
    SamplingParams(max_new_tokens=1),
    SamplingParams(max_new_tokens=40, stop=("a", "Q!")),
]


@pytest.fixture(scope="module")
def alone() -> list[tuple[Conversation, SamplingParams, Reply]]:
    """200 requests with the reply each gives in an engine of its own."""
    model = lively_model()
    params = [MIXED[n % len(MIXED)] for n in range(200)]
    return [(c, p, tiny_engine(model).generate([c], p)[0]) for c, p in zip(requests(200), params, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 37, "max_cache_tokens": 1024},  # prompts, images and tiles are cut, blocks given up
        {"max_batch_tokens": 101, "max_sequences": 5, "vision_cache_bytes": 0, "block_size": 5},
    ],
)
def test_a_batch_equals_each_alone(
    lively: VLM, alone: list[tuple[Conversation, SamplingParams, Reply]], options: dict[str, int]
) -> None:
    conversations, params, expected = zip(*alone, strict=True)
    together = tiny_engine(lively, **options)
    replies = together.generate(conversations, params)
    assert [(r.text, r.tokens, r.finish_reason) for r in replies] == [(r.text, r.tokens, r.finish_reason) for r in expected]
    assert len({r.text for r in replies}) > 100 and {r.finish_reason for r in replies} == {"stop", "length"}
    assert_idle(together)


def test_interleaved_streams_equal_generate(lively: VLM) -> None:
    conversations = requests(6, seed=1)
    expected = [r.text for r in tiny_engine(lively).generate(conversations, MIXED[0])]
    shared = tiny_engine(lively)
    streams = {n: shared.stream(c, MIXED[0]) for n, c in enumerate(conversations)}
    texts = [""] * 6
    while streams:
        for n, stream in list(streams.items()):
            delta = next(stream, None)
            if delta is None:
                del streams[n]
            else:
                texts[n] += delta.text
    assert texts == expected
    assert_idle(shared)


def test_stream_ends_with_one_finish_reason(lively: VLM) -> None:
    deltas = list(tiny_engine(lively).stream(ask("hello"), SamplingParams(max_new_tokens=9)))
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason in ("stop", "length") and all(d.token is not None for d in deltas)


def test_closing_a_stream_frees_its_blocks(lively: VLM) -> None:
    shared = tiny_engine(lively)
    others = shared.submit(ask("another"), SamplingParams(max_new_tokens=3))
    stream = shared.stream(requests(1)[0], SamplingParams(max_new_tokens=200))
    assert len(list(islice(stream, 2))) == 2
    stream.close()
    list(shared.deltas(others))
    assert_idle(shared)
    waiting = shared.submit(ask("never started"))
    shared.cancel(waiting)
    assert_idle(shared)
    with pytest.raises(RuntimeError, match="cancelled"):
        next(shared.deltas(waiting))


def test_an_interrupted_run_frees_its_blocks(lively: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tiny_engine(lively)
    stream = shared.stream(ask("hello"), SamplingParams(max_new_tokens=50))
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(lively.decoder, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert_idle(shared)
    assert shared.generate([ask("hello")])[0].text == tiny_engine(lively).generate([ask("hello")])[0].text


def test_scores_that_are_not_finite_end_one_reply_alone(lively: VLM) -> None:
    params = SamplingParams(max_new_tokens=20)
    expected = tiny_engine(lively).generate([ask("hello"), ask("there")], params)
    shared = tiny_engine(lively, max_cache_tokens=160)  # so that blocks are used again
    lively.decoder.embeddings.weight.data[ord("~") - FIRST_CHARACTER] = torch.nan
    others = [shared.submit(ask(text), params) for text in ("hello", "there")]
    broken = shared.submit(ask("~~~~ and a question"), params)
    with pytest.raises(InputError, match="not finite in"):
        list(shared.deltas(broken))
    for request, reply in zip(others, expected, strict=True):
        assert "".join(delta.text for delta in shared.deltas(request)) == reply.text
    assert_idle(shared)
    with pytest.raises(InputError, match="conversation 1: the model's scores"):
        shared.generate([ask("hello"), ask("~")], params)
    assert_idle(shared)
    again = shared.generate([ask("hello"), ask("there"), ask("more")], params)
    assert [reply.text for reply in again[:2]] == [reply.text for reply in expected]


def test_ids_without_a_token_are_never_sampled(lively: VLM) -> None:
    """The head of a model has often more rows than its tokenizer has tokens."""
    tokenizer = train_tokenizer(["a b c"], 300)
    config = replace(
        lively.config, decoder=replace(lively.config.decoder, vocab_size=400), system_message="",
        image_token_id=tokenizer.id("<IMG_CONTEXT>"), eos_token_ids=(tokenizer.id("<|im_end|>"),),
    )  # fmt: skip
    model = VLM(config).eval()
    model.init_weights()
    engine = Engine(model, Processor(config, tokenizer), max_cache_tokens=4096)
    unused = tokenizer.unused(400)
    assert unused == list(range(len(tokenizer), 400))
    hot = [SamplingParams(temperature=100, ignore_eos=True, max_new_tokens=300, seed=n) for n in range(4)]
    hot += [replace(params, guide=Grammar("regex", "(?s:.*)")) for params in hot]
    replies = engine.generate([ask("hello")] * len(hot), hot)
    assert [len(reply.tokens) for reply in replies[:4]] == [300] * 4
    assert not {token for reply in replies for token in reply.tokens} & set(unused)
    assert_idle(engine)


def test_a_fault_in_one_reply_ends_it_alone(lively: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_new_tokens=20)
    expected = tiny_engine(lively).generate([ask("hello"), ask("there")], params)
    shared = tiny_engine(lively)
    others = [shared.submit(ask(text), params) for text in ("hello", "there")]
    in_text, in_sampling = (shared.submit(ask(text), params) for text in ("broken", "defect"))
    monkeypatch.setattr(in_text.stream, "push", lambda token: {}["outside the vocabulary"])
    monkeypatch.setattr(in_sampling.sampler, "sample", lambda *_: [][0])
    for request, fault in ((in_text, KeyError), (in_sampling, IndexError)):
        with pytest.raises(fault):
            list(shared.deltas(request))
    for request, reply in zip(others, expected, strict=True):
        assert "".join(delta.text for delta in shared.deltas(request)) == reply.text
    assert_idle(shared)


def test_stop_strings_end_the_text_and_are_not_in_it(lively: VLM) -> None:
    plain = tiny_engine(lively).generate(requests(8), SamplingParams(max_new_tokens=30))
    for conversation, reply in zip(requests(8), plain, strict=True):
        if len(reply.text) < 6:
            continue
        stop = reply.text[3:5]
        stopped = tiny_engine(lively).generate([conversation], SamplingParams(max_new_tokens=30, stop=(stop,)))[0]
        assert stopped.text == reply.text[: reply.text.find(stop)] and stopped.finish_reason == "stop"


def test_tiles_are_encoded_once(lively: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    plain = lively.encode_tiles
    monkeypatch.setattr(lively, "encode_tiles", lambda tiles: encoded.append(len(tiles)) or plain(tiles))
    shared = tiny_engine(lively)
    conversations = [ask(text, ImageRef(picture(5), 3), ImageRef(picture(6))) for text in ("one", "two", "three")]
    shared.generate(conversations, SamplingParams(max_new_tokens=2))
    shared.generate(conversations, SamplingParams(max_new_tokens=2))
    assert sum(encoded) == 4
    small = Engine(lively, FakeProcessor(lively.config), max_cache_tokens=512, vision_cache_bytes=0)
    small.generate(conversations, SamplingParams(max_new_tokens=2))
    assert sum(encoded) == 8 and not small.vision.cached


def test_limits_are_told_with_numbers(lively: VLM) -> None:
    with pytest.raises(InputError, match=r"prompt has 53 tokens, 12 of them for 3 image tiles, but the context is 50"):
        tiny_engine(lively, max_context=50).generate([ask("x" * 40, ImageRef(picture(0), 3))])
    with pytest.raises(InputError, match=r"41 prompt tokens and up to 100 new ones need 9 cache blocks of 16 tokens.*are 8"):
        tiny_engine(lively, max_cache_tokens=128).generate([ask("x" * 40)], SamplingParams(max_new_tokens=100))
    with pytest.raises(InputError, match="conversation 2: the prompt has"):
        tiny_engine(lively, max_context=50).generate([ask("a"), ask("b"), ask("x" * 60)])
    with pytest.raises(ValueError, match="2 conversations but 1 sampling"):
        tiny_engine(lively).generate([ask("a"), ask("b")], [SamplingParams()])
    with pytest.raises(ValueError, match="eval"):
        Engine(lively.train(), FakeProcessor(lively.config))


def test_a_reply_ends_where_the_context_ends(lively: VLM) -> None:
    lively.config = replace(lively.config, eos_token_ids=(91,))
    reply = tiny_engine(lively, max_context=50).generate([ask("x" * 40)], SamplingParams(max_new_tokens=1000))[0]
    assert reply.finish_reason == "length" and len(reply.tokens) == 9


def test_many_requests_leave_nothing_behind(lively: VLM) -> None:
    shared = tiny_engine(lively, max_cache_tokens=512)
    for seed in range(5):
        shared.generate(requests(20, seed), SamplingParams(max_new_tokens=6))
        assert_idle(shared)
