"""One model on several processes gives the tokens of one process, and a rank that dies is named."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.rendezvous import TCPStore  # pyright: ignore[reportPrivateImportUsage]

import ivl
from ivl.errors import InputError
from ivl.generators import ranks
from ivl.inference.engine import Engine
from ivl.inference.request import Request
from ivl.parallel import follow
from ivl.parallel.follow import LeadingEngine
from ivl.train.world import RankLostError, World
from ivl.types import Grammar, ImageRef, SamplingParams
from tests.helpers.engines import ask, assert_idle, picture, tiny_directory

REQUESTS = int(os.environ.get("IVL_TEST_REQUESTS", "30"))
"""More of them also ask four processes."""
OPTIONS = {"max_cache_tokens": 2048, "block_size": 16, "max_batch_tokens": 96, "max_sequences": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("ranks") / "model", num_kv_heads=4)


def requests(engine: Engine, count: int) -> list[Request]:
    """Questions with and without pictures, prefixes that come again, greedy and sampled, some with a grammar."""
    draw = random.Random(0)
    texts = ["what colour is the shape?", "is it red? " * 4, "what colour is the circle? green or blue or red?"]
    made = []
    for number in range(count):
        images = [ImageRef(picture(draw.randrange(4)), max_tiles=draw.choice((1, 4))) for _ in range(draw.randrange(3))]
        params = SamplingParams(max_new_tokens=draw.randrange(1, 24), ignore_eos=draw.random() < 0.5)
        if number % 3 == 1:
            params = replace(params, temperature=0.9, top_p=0.95, seed=number, repetition_penalty=draw.choice((1.0, 1.2)))
        if number % 10 == 5:
            params = replace(params, guide=Grammar("regex", "(yes|no) red"))
        if number % 7 == 3:
            params = replace(params, stop=("r",))
        made.append(engine.prepare(ask(draw.choice(texts) + " " * draw.randrange(2), *images), params))
    return made


def answer(engine: Engine, count: int) -> list[tuple[list[int], str | None, str]]:
    """Tokens, end and text of every request; they come a few at a time, and every eighth is cancelled on its way."""
    asked = requests(engine, count)
    waiting, steps = list(enumerate(asked)), 0
    while waiting or engine.scheduler.running or engine.scheduler.waiting:
        for number, request in waiting[:2]:
            engine.add(request)
            if number % 8 == 7 and number > 8:
                engine.cancel(asked[number - 1])
        waiting = waiting[2:]
        engine.step()
        steps += 1
    assert_idle(engine)
    return [(r.tokens, r.finish_reason, "".join(d.text for d in r.deltas)) for r in asked if not r.cancelled]


@pytest.mark.parametrize("count", [2, 4] if REQUESTS > 30 else [2])
def test_tokens_are_those_of_one_process(directory, count):
    one = ivl.load(directory, **OPTIONS).engine
    several = ivl.load(directory, tensor_parallel=count, **OPTIONS).engine
    assert isinstance(several, LeadingEngine)
    try:
        assert several.cache.keys.nbytes * count == one.cache.keys.nbytes
        expected, found = answer(one, REQUESTS), answer(several, REQUESTS)
        assert expected == found
        assert sum(len(tokens) for tokens, _, _ in found) > 5 * REQUESTS
        assert several.stats() == replace(one.stats(), steps=several.stats().steps) and several.stats().prefix_hit_tokens > 100
    finally:
        several.close()


def test_a_failed_step_ends_its_replies_and_a_rank_that_dies_the_engine(directory):
    engine = ivl.load(directory, tensor_parallel=2, **OPTIONS).engine
    lost, params = [], SamplingParams(max_new_tokens=20, ignore_eos=True)
    engine.on_lost = lost.append
    question, whole = ask("red?", ImageRef(picture(1), max_tiles=4)), follow.NewRequest.of
    try:
        [expected] = engine.generate([question], params)
        engine.generate([ask("is it red? " * 4)], params)
        for words in ("spoiled here", r"rank 1 on .*: RuntimeError.*shape"):
            waiting = engine.submit(ask("blue?"), params)
            with pytest.MonkeyPatch.context() as patch:
                if words == "spoiled here":
                    patch.setattr(engine.runner, "run", spoil)
                else:
                    patch.setattr(follow.NewRequest, "of", lambda r: replace(whole(r), tiles_GSSC=whole(r).tiles_GSSC[:, 1:]))
                with pytest.raises(RuntimeError, match=words):
                    engine.generate([ask("red?", ImageRef(picture(2), max_tiles=4))], params)
            assert waiting.cancelled and not lost
            assert_idle(engine)
            assert engine.generate([question], params)[0].tokens == expected.tokens
        process = engine.ended.args[0][1]
        process.kill()
        began = time.monotonic()
        with pytest.raises(RankLostError, match=rf"rank 1 \(process {process.pid}\) was ended by signal 9"):
            engine.generate([ask("blue?")], SamplingParams(max_new_tokens=400, ignore_eos=True))
        assert time.monotonic() - began < 25
        assert len(lost) == 1 and engine.stats().running == 0
    finally:
        engine.close()


def spoil(step):
    raise RuntimeError("spoiled here")


def test_a_process_that_is_stopped_while_it_loads_is_named():
    world = World(0, 2, store=TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False))
    with subprocess.Popen(["sleep", "60"]) as process:
        assert ranks._stopped({1: process}) is None
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(InputError, match=rf"^rank 1 \(process {process.pid}\) was stopped by a signal while it loaded"):
            ranks._wait(world, "loaded 1", {1: process})
        with pytest.raises(InputError, match="was stopped by a signal while it loaded"):
            ranks._together(threading.Event().wait, {1: process})
        process.kill()
    assert ranks._together(lambda: 3, {}) == 3


def test_what_does_not_fit_is_refused_before_anything_starts(directory):
    with pytest.raises(InputError, match=r"tensor_parallel is 3, but the decoder's 4 key/value heads .* take 1 or 2 or 4"):
        ivl.load(directory, tensor_parallel=3)
    with pytest.raises(InputError, match="tensor_parallel must be a whole number"):
        ivl.load(directory, tensor_parallel=0)
