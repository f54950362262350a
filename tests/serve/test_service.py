"""The engine in its thread: cancelling, failing, ending."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from ivl.errors import InputError
from ivl.inference.engine import Engine
from ivl.serve.config import ServeConfig
from ivl.serve.errors import APIError
from ivl.serve.service import Service, merge
from ivl.types import ImageRef, SamplingParams
from tests.helpers.engines import ask, assert_idle, picture
from tests.helpers.servers import engine

SHORT, LONG = SamplingParams(max_new_tokens=8), SamplingParams(max_new_tokens=400, seed=0, temperature=1.0)


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine(tmp_path_factory.mktemp("model"), max_sequences=4)


@pytest.fixture
def service(tiny_engine: Engine) -> Service:
    return Service(tiny_engine, ServeConfig(max_queue=4))


async def text(service: Service, question: str, *images: ImageRef, params: SamplingParams = SHORT) -> str:
    return "".join([delta.text async for delta in await service.submit(ask(question, *images), params)])


def test_many_at_once_are_each_alone(service: Service, tiny_engine: Engine) -> None:
    questions = [(f"what {n}?", [ImageRef(picture(n))] * (n % 3)) for n in range(8)]
    alone = [tiny_engine.generate([ask(question, *images)], SHORT)[0].text for question, images in questions]

    async def together() -> list[str]:
        async with service:
            return await asyncio.gather(*(text(service, question, *images) for question, images in questions))

    assert asyncio.run(together()) == alone and len(set(alone)) > 3
    assert_idle(tiny_engine)


def test_a_cancelled_reply_ends_within_a_step(service: Service, tiny_engine: Engine, monkeypatch: Any) -> None:
    step = tiny_engine.step

    def slow() -> None:
        time.sleep(0.02)
        step()

    monkeypatch.setattr(tiny_engine, "step", slow)

    async def leave() -> tuple[int, int]:
        async with service:
            stream = await service.submit(ask("what?"), LONG)
            async for _ in stream:
                if len(stream.request.tokens) >= 3:
                    break
            stream.cancel()
            before = len(stream.request.tokens)
            await asyncio.sleep(0.2)
            assert stream.request.cancelled and service.num_open == 0
            return before, len(stream.request.tokens)

    before, after = asyncio.run(leave())
    assert after - before <= 1
    assert_idle(tiny_engine)


def test_a_failed_step_ends_only_its_own(service: Service, tiny_engine: Engine, monkeypatch: Any) -> None:
    run, failing = tiny_engine.runner.run, [False]

    def broken(plan: Any) -> Any:
        if failing[0]:
            failing[0] = False
            raise RuntimeError("secret words")
        return run(plan)

    monkeypatch.setattr(tiny_engine.runner, "run", broken)

    async def fail() -> str:
        async with service:
            expected = await text(service, "what?")
            stream = await service.submit(ask("why?"), LONG)
            failing[0] = True
            with pytest.raises(APIError) as error:
                async for _ in stream:
                    pass
            assert error.value.status_code == 500 and "secret" not in error.value.message
            assert service.ready and await text(service, "what?") == expected
            return expected

    assert asyncio.run(fail())
    assert_idle(tiny_engine)


def test_an_engine_that_always_fails_is_not_ready(service: Service, tiny_engine: Engine, monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny_engine.scheduler, "schedule", lambda: 1 / 0)

    async def fail() -> None:
        async with service:
            for _ in range(3):
                with pytest.raises(APIError):
                    await text(service, "what?")
            assert not service.ready
            with pytest.raises(APIError) as error:
                await service.submit(ask("what?"), SHORT)
            assert error.value.status_code == 503

    asyncio.run(fail())
    assert_idle(tiny_engine)


def test_no_more_than_there_is_room_for(service: Service, tiny_engine: Engine) -> None:
    async def fill() -> None:
        async with service:
            streams = [await service.submit(ask("what?"), LONG) for _ in range(8)]
            with pytest.raises(APIError) as error:
                await service.submit(ask("what?"), SHORT)
            assert error.value.status_code == 429 and int((error.value.headers or {})["Retry-After"]) >= 1
            with pytest.raises(APIError) as error:
                await service.submit_all(ask("what?"), [SHORT] * 9)
            assert error.value.status_code == 400
            streams[0].cancel()
            assert await text(service, "what?")
            for stream in streams:
                stream.cancel()

    asyncio.run(fill())
    assert_idle(tiny_engine)


def test_what_cannot_be_prepared_leaves_nothing(service: Service, tiny_engine: Engine) -> None:
    async def refuse() -> None:
        async with service:
            for bad in (ask("x" * 5000), ask("?", ImageRef(b"no image")), ()):
                with pytest.raises(InputError):
                    await service.submit(bad, SHORT)
            many = Service(tiny_engine, ServeConfig(max_request_tiles=1))
            async with many:
                with pytest.raises(APIError):
                    await many.submit(ask("?", ImageRef(picture(1)), ImageRef(picture(2))), SHORT)
                assert many.num_open == 0
            assert service.num_open == 0

    asyncio.run(refuse())
    assert_idle(tiny_engine)


def test_replies_end_with_the_service(service: Service, tiny_engine: Engine) -> None:
    async def end() -> None:
        async with service:
            streams = [await service.submit(ask("what?"), LONG) for _ in range(6)]
            waiting = asyncio.ensure_future(text(service, "what?", params=LONG))
            await asyncio.sleep(0)
            service.drain(0.05)
            with pytest.raises(APIError):
                await service.submit(ask("what?"), SHORT)
            for stream in streams:
                with pytest.raises(APIError) as error:
                    async for _ in stream:
                        pass
                assert error.value.code == "shutting_down"
            with pytest.raises(APIError):
                await waiting

    asyncio.run(end())
    assert_idle(tiny_engine)


def test_a_deadline_and_silence(service: Service, tiny_engine: Engine, monkeypatch: Any) -> None:
    step = tiny_engine.step
    monkeypatch.setattr(tiny_engine, "step", lambda: (time.sleep(0.1), step()))

    async def wait() -> list[int]:
        async with service:
            stream = await service.submit(ask("what?"), LONG)
            sizes = []
            with pytest.raises(APIError) as error:
                async for news in merge([stream], ping=0.02, deadline=time.perf_counter() + 2):
                    sizes.append(len(news))
            assert error.value.code == "timeout" and stream.ended
            return sizes

    sizes = asyncio.run(wait())
    assert 0 in sizes and 1 in sizes
    assert_idle(tiny_engine)


def test_preparation_waits_for_the_engine(service: Service, tiny_engine: Engine, monkeypatch: Any) -> None:
    monkeypatch.setattr("ivl.serve.service.TILES_AHEAD", 2)

    async def pile() -> None:
        async with service:
            asked = [text(service, "what?", ImageRef(picture(n)), ImageRef(picture(n + 9))) for n in range(8)]
            assert len(await asyncio.gather(*asked)) == 8 and service._tiles_ahead == 0

    asyncio.run(pile())
