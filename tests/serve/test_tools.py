"""Tools: what the model reads and writes (Hermes), and what OpenAI's client sends and gets."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import ivl
from ivl.inference.engine import Engine
from ivl.processing.processor import Processor
from ivl.serve import routes
from ivl.serve.tools import CallReader
from ivl.types import Grammar
from tests.helpers.engines import tiny_directory
from tests.helpers.servers import KEY, data_url, engine, running
from tests.serve.test_app import error_of
from tests.serve.test_clients import post, written

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Paris", "北京"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["place", "days"],
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
        },
        "strict": True,
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "what?"}], "max_tokens": 200}


@pytest.fixture(scope="module")
def tool_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tiny_directory(tmp_path_factory.mktemp("model"), tools=True)
    return ivl.load(directory, max_cache_tokens=16384, block_size=16).engine


@pytest.fixture(scope="module")
def client(tool_engine: Engine) -> Generator[openai.OpenAI]:
    with running(tool_engine) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


BLOCK = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "now"}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def tokens(engine: Engine, **body: Any) -> list[int]:
    response = post(engine, body, "/tokenize")
    assert response.status_code == 200, response.text
    return response.json()["tokens"]


def test_the_system_turn_lists_the_tools(tool_engine: Engine) -> None:
    user = {"role": "user", "content": "what"}
    assert tokens(tool_engine, messages=[user], tools=[NOW]) == written(tool_engine, ("system", BLOCK), ("user", "what"))
    system = [{"role": "system", "content": "Be brief."}, user]
    expected = written(tool_engine, ("system", f"Be brief.\n\n{BLOCK}"), ("user", "what"))
    assert tokens(tool_engine, messages=system, tools=[NOW]) == expected
    assert isinstance(tool_engine.processor, Processor)
    call = tool_engine.processor.tokenizer.id("<tool_call>")
    assert expected.count(call) == 2, "the mark of a call is a token of its own"
    weather = post(tool_engine, ASK | {"tools": [WEATHER], "tool_choice": "none"}).json()["usage"]["prompt_tokens"]
    assert weather == len(tokens(tool_engine, messages=ASK["messages"])), "a reply that may call none reads of none"


def test_tools_of_the_responses_api_are_read(tool_engine: Engine) -> None:
    """The keys of a function beside the type, in a tool and in a choice."""
    flat, user = {"type": "function", **WEATHER["function"]}, ASK["messages"]
    assert tokens(tool_engine, messages=user, tools=[flat]) == tokens(tool_engine, messages=user, tools=[WEATHER])
    choice = {"type": "function", "name": "now"}
    said = post(tool_engine, ASK | {"tools": [flat, {**choice, "description": None}], "tool_choice": choice}).json()
    assert [call["function"]["name"] for call in said["choices"][0]["message"]["tool_calls"]] == ["now"]
    wrong = error_of(post(tool_engine, ASK | {"tools": [{**choice, "parameters": "x"}]}))
    assert wrong["param"] == "tools[0].function.parameters"


def test_a_model_with_a_system_message_of_its_own_keeps_it(tool_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(tool_engine.processor, Processor)
    config = replace(tool_engine.processor.config, system_message="I am tiny.")
    monkeypatch.setattr(tool_engine.processor, "config", config)
    expected = written(tool_engine, ("system", f"I am tiny.\n\n{BLOCK}"), ("user", "what"))
    assert tokens(tool_engine, messages=[{"role": "user", "content": "what"}], tools=[NOW]) == expected


def test_calls_and_results_stand_in_the_history_as_the_template_writes_them(tool_engine: Engine) -> None:
    calls = [
        {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"place":"北京","days":2}'}},
        {"id": "b", "type": "function", "function": {"name": "now", "arguments": ""}},
    ]
    messages = [
        {"role": "user", "content": "what"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "noon"}]},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls[1:]},
        {"role": "tool", "content": "1"},
    ]
    first = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "北京", "days": 2}}\n</tool_call>'
    second = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert tokens(tool_engine, messages=messages) == written(
        tool_engine,
        ("user", "what"),
        ("assistant", f"{first}\n{second}"),
        ("user", "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"),
        ("assistant", f"Let me see.\n{second}"),
        ("user", "<tool_response>\n1\n</tool_response>"),
    )


def test_a_tool_may_return_an_image(tool_engine: Engine) -> None:
    result = {"role": "tool", "content": [{"type": "image_url", "image_url": {"url": data_url(1)}}]}
    ids = tokens(tool_engine, messages=[{"role": "user", "content": "what"}, result])
    assert tool_engine.model.config.image_token_id in ids


def test_a_required_call(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_") and call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["place"] in ("Paris", "北京") and 1 <= arguments["days"] <= 7 and len(arguments) == 2
    assert call.function.arguments == json.dumps(arguments, ensure_ascii=False)


def test_a_named_call_whole_and_streaming_and_back(client: openai.OpenAI) -> None:
    options = ASK | {"tools": [WEATHER, NOW], "tool_choice": {"type": "function", "function": {"name": "now"}}}
    reply = client.chat.completions.create(**options, n=2)
    assert [[call.function.name for call in choice.message.tool_calls] for choice in reply.choices] == [["now"]] * 2
    assert reply.choices[0].message.tool_calls[0].function.arguments == "{}"
    with client.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and not final.message.content
    assert [call.function.name for call in final.message.tool_calls] == ["now"]
    messages = [
        *options["messages"],
        final.message,
        {"role": "tool", "tool_call_id": final.message.tool_calls[0].id, "content": "12"},
    ]
    after = client.chat.completions.create(**options | {"messages": messages, "tool_choice": "auto", "max_tokens": 8})
    assert after.choices[0].message.content


SAID = 'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"place": "北京", "days": 3}}\n</tool_call>\n'
SAID += '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def scripted(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Have the model write this text."""
    params = routes.sampling_params

    def with_text(*args: Any) -> Any:
        return [replace(each, guide=Grammar("choice", json.dumps([text]))) for each in params(*args)]

    monkeypatch.setattr(routes, "sampling_params", with_text)


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_that_a_model_makes_by_itself(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, parallel: bool) -> None:
    scripted(monkeypatch, SAID)
    options = ASK | {"tools": [WEATHER, NOW], "parallel_tool_calls": parallel}
    whole = client.chat.completions.create(**options).choices[0]
    text, calls, reasons = "", {}, []
    for chunk in client.chat.completions.create(**options, stream=True, logprobs=True):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or []:
                assert call.index not in calls
                calls[call.index] = (call.function.name, call.function.arguments)
    expected = [("get_weather", '{"place": "北京", "days": 3}'), ("now", "{}")][: 1 + parallel]
    assert whole.message.content == text == "Let me look." and whole.finish_reason == reasons[0] == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in whole.message.tool_calls] == expected
    assert list(calls.items()) == list(enumerate(expected)) and len(reasons) == 1


@pytest.mark.parametrize(
    ("arguments", "read"),
    [('{"a": "b\nc"}', {"a": "b\nc"}), ('"{\\"a\\": 1}"', {"a": 1}), ("null", {}), ("5", None), ("[1]", None),
     ('"x"', None),      ("1e999", None), ('{"a": NaN}', None), ('{"a": "\\ud800"}', None)],
)  # fmt: skip
def test_arguments_are_an_object(arguments: str, read: Any) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    said, calls = CallReader().push(text, last=True)
    assert [json.loads(call["function"]["arguments"]) for call in calls] == ([] if read is None else [read])
    assert said == (text if read is None else "")


@pytest.mark.parametrize("text", ["no call <tool_ca", '<tool_call>\n{"name": }\n</tool_call>', "<tool_call> ", "a  \n"])
def test_what_is_no_call_stays_text(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    scripted(monkeypatch, text)
    whole = client.chat.completions.create(**ASK, tools=[NOW]).choices[0]
    said = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**ASK, tools=[NOW], stream=True))
    assert whole.message.content == said == text and whole.message.tool_calls is None and whole.finish_reason == "stop"


@given(
    st.lists(
        st.sampled_from([SAID, "words ", "<tool_call>", "</tool_call>", "\n", '<tool_call>{"name": "x"}</tool_call>', "<"])
    ),
    st.data(),
)
def test_calls_do_not_depend_on_how_a_reply_is_cut(pieces: list[str], data: st.DataObject) -> None:
    def read(parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
        reader, said, calls = CallReader(), "", []
        for number, part in enumerate(parts):
            text, found = reader.push(part, last=number == len(parts) - 1)
            said += text
            calls += [(call["index"], call["function"]["name"], call["function"]["arguments"]) for call in found]
        return said, calls

    text = "".join(pieces)
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=9))})
    parts = [text[a:b] for a, b in pairwise(cuts)]
    assert read([*parts, ""]) == read([text])


def test_a_reply_is_a_call_or_has_the_form_that_was_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    options = ASK | {
        "tools": [NOW],
        "response_format": form,
        "parallel_tool_calls": False,
        "n": 8,
        "temperature": 2.0,
        "seed": 1,
    }
    kinds = set()
    for choice in client.chat.completions.create(**options).choices:
        if choice.message.tool_calls:
            assert choice.message.content is None and choice.message.tool_calls[0].function.name == "now"
        else:
            assert choice.message.content in ('{"ok":true}', '{"ok":false}') and choice.finish_reason == "stop"
        kinds.add(choice.finish_reason)
    assert kinds == {"tool_calls", "stop"}


def test_langchain_calls_and_answers(client: openai.OpenAI) -> None:
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat_openai(model="tiny", base_url=str(client.base_url), api_key=KEY, temperature=0, max_tokens=200, max_retries=0)
    tools = model.bind_tools([WEATHER, NOW], tool_choice="get_weather")
    said = tools.invoke("what?")
    streamed = sum(list(tools.stream("what?"))[1:], start=next(iter(tools.stream("what?"))))
    assert said.tool_calls[0]["name"] == "get_weather" and said.tool_calls[0]["args"]["place"] in ("Paris", "北京")
    assert [call["args"] for call in streamed.tool_calls] == [call["args"] for call in said.tool_calls]
    result = {"role": "tool", "tool_call_id": said.tool_calls[0]["id"], "content": "sunny"}
    assert model.bind_tools([WEATHER]).invoke([{"role": "user", "content": "what?"}, said, result]).content

    class Weather(BaseModel):
        """Weather of a place"""

        days: Literal[1, 2]

    for method in ("function_calling", "json_schema"):
        assert model.with_structured_output(Weather, method=method).invoke("what?").days in (1, 2)


def test_text_of_calls_and_tools_counts_as_text(tool_engine: Engine) -> None:
    long = {"messages": [*ASK["messages"], {"role": "assistant", **calling("[" * 501)}]}
    for body in (long, {"tools": [wrong(description="x" * 501)]}):
        response = post(tool_engine, ASK | body, max_text_chars=500)
        assert response.status_code == 400 and "characters of text, the limit is 500" in error_of(response)["message"]


def test_a_strict_tool_is_shown_as_it_was_sent(tool_engine: Engine) -> None:
    body = ASK | {"tools": [WEATHER]}
    shown = [post(tool_engine, body | {"tool_choice": c}).json()["usage"]["prompt_tokens"] for c in ("auto", "required")]
    assert shown == [len(tokens(tool_engine, messages=ASK["messages"], tools=[WEATHER]))] * 2


ARGUMENTS = "messages[1].tool_calls[0].function.arguments"


def wrong(**options: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **options}}


def calling(arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Field required"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "Input should be 'function'"),
        ({"tools": [NOW, NOW]}, "tools", "two tools have one name"),
        ({"tools": [NOW] * 129}, "tools", "129 tools, the limit is 128"),
        ({"tool_choice": "required"}, "tool_choice", "a call is required, but tools has none"),
        ({"functions": [{"name": "f"}]}, "functions", "functions: functions are not supported: send tools"),
        ({"tools": [wrong(parameters={"type": "string"})], "tool_choice": "required"}, "tools", "'f' are not a schema of type"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no such tool"),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice", "none"),
        ({"tools": [NOW], "tool_choice": 1}, "tool_choice", "tool_choice is none, auto, required, or an object"),
        ({"tools": [NOW], "guided_regex": "a"}, "guided_regex", "guided_regex and tools each say"),
        ({"tools": [wrong(parameters={"properties": {"a": {"type": 7}}})], "tool_choice": "required"}, None, "grammar cannot"),
        ({"messages": [{"role": "user", "content": "x", **calling("{}")}]}, "messages[0].tool_calls", "only an assistant"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content", "Field required"),
        ({"messages": [*ASK["messages"], {"role": "assistant", **calling("[1")}]}, ARGUMENTS, "not a JSON object"),
        ({"messages": [*ASK["messages"], {"role": "assistant", **calling("[1]")}]}, ARGUMENTS, "not a JSON object"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_named(tool_engine: Engine, body: dict[str, Any], param: str | None, words: str) -> None:
    response = post(tool_engine, ASK | body)
    error = error_of(response)
    assert response.status_code == 400 and words in error["message"] and error["param"] == param


@pytest.mark.parametrize("body", [{"tools": [NOW]}, {"messages": [*ASK["messages"], {"role": "tool", "content": "x"}]}])
def test_a_model_that_knows_no_tools_says_so(tmp_path_factory: pytest.TempPathFactory, body: dict[str, Any]) -> None:
    plain = engine(tmp_path_factory.mktemp("plain"))
    error = error_of(post(plain, ASK | body))
    assert (
        "(qwen2) was not trained to use tools: its vocabulary has no <tool_call>" in error["message"]
        and error["param"] == "tools"
    )
    assert post(plain, ASK | {"tools": [NOW], "tool_choice": "none"}).status_code == 200
