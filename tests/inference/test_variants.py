"""Laws of variants: models that share one cache reply as each would alone, and nothing of one is found by another."""

from __future__ import annotations

import pytest
import torch

from ivl.errors import InputError
from ivl.inference.engine import Engine, Request
from ivl.model.vlm import VLM
from ivl.types import Conversation, ImageRef, SamplingParams
from tests.helpers.engines import FakeProcessor, ask, assert_idle, lively_model, picture, tiny_engine

NAMES = ("", "a", "b")
LONG = "a question that fills several blocks of the cache, " * 3
ASKED = [ask(LONG, ImageRef(picture(1), 2)), ask("short"), ask(LONG + "?", ImageRef(picture(1), 2)), ask("x" * 90)]
PARAMS = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module")
def models() -> dict[str, VLM]:
    """Three models of one configuration."""
    found = {name: lively_model() for name in NAMES}
    with torch.no_grad():
        for number, model in enumerate(found.values()):
            for parameter in model.parameters():
                parameter.mul_(1 + 0.07 * number)
    return found


@pytest.fixture
def engine(models: dict[str, VLM]) -> Engine:
    options = {"max_cache_tokens": 8192, "block_size": 16, "max_batch_tokens": 64}
    return Engine(models[""], FakeProcessor(models[""].config), variants={n: models[n] for n in NAMES[1:]}, **options)


def submit(engine: Engine, conversation: Conversation, variant: str) -> Request:
    request = engine.prepare_all(conversation, [PARAMS], variant=variant)[0]
    engine.add(request)
    return request


def finish(engine: Engine, *requests: Request) -> list[str]:
    while any(request.finish_reason is None for request in requests):
        engine.step()
    return ["".join(delta.text for delta in request.deltas) for request in requests]


def test_interleaved_variants_equal_each_alone(engine: Engine, models: dict[str, VLM]) -> None:
    asked = [(conversation, name) for conversation in ASKED for name in NAMES]
    replies = finish(engine, *(submit(engine, *each) for each in asked))
    alone = {name: tiny_engine(model) for name, model in models.items()}
    assert replies == [alone[name].generate([conversation], PARAMS)[0].text for conversation, name in asked]
    assert len(set(replies[:3])) == 3, "the models differ"
    assert_idle(engine)


def test_nothing_is_shared_between_variants(engine: Engine) -> None:
    for name, found in (("", False), ("a", False), ("a", True), ("", True), ("b", False)):
        misses = engine.stats().vision_misses
        request = submit(engine, ASKED[0], name)
        finish(engine, request)
        assert (request.num_cached > 0) == found
        assert (engine.stats().vision_misses == misses) == found


def test_a_step_is_of_one_variant_and_they_take_turns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, set[str]]] = []
    run = engine.runner.run
    monkeypatch.setattr(
        engine.runner, "run", lambda step: ran.append((step.variant, {r.variant for r in step.requests})) or run(step)
    )
    finish(engine, *(submit(engine, ask(f"question {n}"), name) for n in range(3) for name in NAMES))
    assert all(variants == {variant} for variant, variants in ran)
    assert [variant for variant, _ in ran[:6]] == ["", "a", "b", "", "a", "b"]


def test_a_variant_that_is_not_there_is_named(engine: Engine) -> None:
    with pytest.raises(InputError, match="no variant 'aa': did you mean 'a'"):
        engine.prepare_all(ASKED[1], [PARAMS], variant="aa")
