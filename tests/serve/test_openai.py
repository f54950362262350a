"""The official client, unchanged, against a live server."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import openai
import pytest

from ivl.inference.engine import Engine
from ivl.processing.chat import user
from ivl.types import ImageRef, SamplingParams
from tests.helpers.engines import picture
from tests.helpers.servers import KEY, Running, data_url, engine, running, says


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    with running(engine(tmp_path_factory.mktemp("model"))) as server:
        yield server


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same model, asked directly."""
    return engine(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def client(server: Running) -> Generator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**options)


def test_chat_equals_the_engine(client: openai.OpenAI, alone: Engine) -> None:
    images = [data_url(1), data_url(2)]
    reply = chat(client, **says("what colour?", *images))
    expected = alone.generate(
        [(user("what colour?", ImageRef(picture(1)), ImageRef(picture(2))),)], SamplingParams(max_new_tokens=12)
    )
    assert reply.choices[0].message.content == expected[0].text and reply.choices[0].finish_reason == expected[0].finish_reason
    assert reply.usage.prompt_tokens == expected[0].prompt_tokens and reply.usage.completion_tokens == len(expected[0].tokens)
    assert reply.model == "tiny" and reply.object == "chat.completion"


def test_streams_equal_whole_replies(client: openai.OpenAI) -> None:
    body = says("what shape?", data_url(3), n=2, temperature=1.0, seed=5)
    whole = chat(client, **body)
    said, reasons, usages = ["", ""], {}, []
    for chunk in chat(client, **body, stream=True, stream_options={"include_usage": True}):
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert said == [choice.message.content for choice in whole.choices] and said[0] != said[1]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert [usage.completion_tokens for usage in usages] == [whole.usage.completion_tokens]
    assert usages[0].prompt_tokens_details.cached_tokens > 0


def test_detail_and_caps_change_the_tiles(client: openai.OpenAI) -> None:
    def tokens(**options: Any) -> int:
        body = says("?")
        wide = data_url_wide()
        body["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": wide, **options}}]
        return chat(client, **body).usage.prompt_tokens

    low, high, four = tokens(detail="low"), tokens(detail="high"), tokens(max_dynamic_patch=4)
    assert low < four < high == tokens()


def data_url_wide() -> str:
    import base64
    import io

    out = io.BytesIO()
    picture(1).resize((28 * 6, 28 * 2)).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def test_completions_and_stop(client: openai.OpenAI, server: Running) -> None:
    reply = client.completions.create(model="alias", prompt=["what colour", "yes"], max_tokens=8, n=2)
    texts = [choice.text for choice in reply.choices]
    assert texts[0] == texts[1] and texts[2] == texts[3] and texts[0] != texts[2]
    ids = server.service.processor.tokenizer.encode("what colour")
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=8).choices[0].text == texts[0]
    stop = texts[0][len(texts[0]) // 2]
    cut = client.completions.create(model="tiny", prompt="what colour", max_tokens=8, stop=[stop])
    assert cut.choices[0].text == texts[0].partition(stop)[0] and cut.choices[0].finish_reason == "stop"
    chunks = client.completions.create(model="tiny", prompt="what colour", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == texts[0]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_logprobs(client: openai.OpenAI) -> None:
    body = says("what?", logprobs=True, top_logprobs=3)
    reply = chat(client, **body).choices[0]
    scores = reply.logprobs.content
    assert len(scores) in (11, 12) and all(score.logprob <= 0 and len(score.top_logprobs) == 3 for score in scores)
    assert all(score.token == score.top_logprobs[0].token for score in scores)
    assert bytes(b for score in scores for b in score.bytes).decode(errors="replace") == reply.message.content
    streamed = [
        s for c in chat(client, **body, stream=True) for choice in c.choices if choice.logprobs for s in choice.logprobs.content
    ]
    assert [s.token for s in streamed] == [s.token for s in scores]
    silent = chat(client, **says("what?", logprobs=True), extra_body={"guided_regex": "()"}).choices[0]
    assert silent.message.content == "" and silent.logprobs.content == []
    old = client.completions.create(model="tiny", prompt="what?", max_tokens=4, logprobs=2).choices[0].logprobs
    assert len(old.tokens) == len(old.token_logprobs) == 4 and all(len(top) <= 2 for top in old.top_logprobs)


def test_json(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    reply = chat(
        client, **says("is it red?", data_url(1), response_format=form, max_completion_tokens=100) | {"max_tokens": None}
    )
    assert set(json.loads(reply.choices[0].message.content)) == {"red"}
    with pytest.raises(openai.BadRequestError):
        chat(client, **says("?", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}))


def test_errors(client: openai.OpenAI, server: Running) -> None:
    bad = [
        (openai.BadRequestError, says("?", tools=[{"type": "function", "function": {"name": "f"}}])),
        (openai.BadRequestError, says("?", n=99)),
        (openai.BadRequestError, says("x " * 2000)),
        (openai.BadRequestError, says("?", "data:image/png;base64,AAAA")),
        (openai.PermissionDeniedError, says("?", "http://127.0.0.1/x.png")),
        (openai.NotFoundError, says("?", model="gpt-4o") | {"model": "gpt-4o"}),
        (openai.BadRequestError, says("?") | {"messages": [{"role": "assistant", "content": "?"}]}),
    ]
    for kind, body in bad:
        for stream in (False, True):
            with pytest.raises(kind) as error:
                chat(client, **body, stream=stream)
            assert set(error.value.body) == {"message", "type", "param", "code"}  # type: ignore[arg-type]
    with pytest.raises(openai.AuthenticationError):
        chat(openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0), **says("?"))


def test_continuing_a_reply(client: openai.OpenAI) -> None:
    body = says("what colour?")
    whole = chat(client, **body).choices[0].message.content
    started = body["messages"] + [{"role": "assistant", "content": "red"}]
    assert chat(client, **body | {"messages": started}).choices[0].message.content != whole


def test_langchain(server: Running, alone: Engine) -> None:
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat_openai(model="tiny", base_url=f"{server.url}/v1", api_key=KEY, temperature=0, max_tokens=12, max_retries=0)
    content = [{"type": "image_url", "image_url": {"url": data_url(1)}}, {"type": "text", "text": "what colour?"}]
    said = model.invoke([{"role": "user", "content": content}]).content
    expected = alone.generate([(user("what colour?", ImageRef(picture(1))),)], SamplingParams(max_new_tokens=12))[0].text
    assert said == expected and "".join(c.content for c in model.stream([{"role": "user", "content": content}])) == expected
