"""What a request may say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from ivl.errors import InputError
from ivl.serve import conversation
from ivl.serve.auth import Keys, load_keys
from ivl.serve.config import ServeConfig
from ivl.serve.errors import APIError
from ivl.serve.schemas import ChatRequest, CompletionRequest, validation_error

HELLO = [{"role": "user", "content": "Hello"}]


def parsed(**options: Any) -> ChatRequest:
    return ChatRequest.model_validate_json(json.dumps({"messages": HELLO, **options}))


def refused(**options: Any) -> APIError:
    with pytest.raises(ValidationError) as error:
        parsed(**options)
    return validation_error(error.value)


def test_null_is_nothing_and_what_asks_for_nothing_is_taken() -> None:
    body = parsed(
        stop=None, tools=[], tool_choice="none", logit_bias={}, audio=None, user="me", metadata={"a": "b"}, store=False
    )
    assert conversation.sampling_params(body, ServeConfig()) == conversation.sampling_params(parsed(), ServeConfig())


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tools": 0}, "tools", "invalid_value"),
        ({"functions": 0}, "functions", "unsupported_parameter"),
        ({"echo": 0.0}, "echo", "unsupported_parameter"),
        ({"top_k": 1 << 31}, "top_k", "invalid_value"),
        ({"top_p": 1e-7}, "top_p", "invalid_value"),
        ({"seed": 1 << 64}, "seed", "invalid_value"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "invalid_value"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": 1e-9}, "temperature", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, None, "invalid_value"),
    ],
)
def test_what_is_refused_is_named(options: dict[str, Any], param: str | None, code: str) -> None:
    problem = refused(**options)
    assert problem.status_code == 400 and problem.code == code
    assert param is None or problem.param == param


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "null", '{"messages": NaN}', "[" * 5000, '{"messages": [{"role": "\\ud800"}]}']
)
def test_what_is_no_request_is_refused(body: str) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate_json(body)


@pytest.mark.parametrize(
    "options",
    [{"n": 9}, {"max_tokens": 4097}, {"stop": ["a", "b", "c", "d", "e"]}, {"stop": "x" * 257}, {"stop": ""},
     {"logprobs": True, "top_logprobs": 21}],
)  # fmt: skip
def test_limits_of_sampling(options: dict[str, Any]) -> None:
    with pytest.raises(APIError) as error:
        conversation.sampling_params(parsed(**options), ServeConfig())
    assert error.value.status_code == 400


def test_each_reply_has_its_own_seed() -> None:
    every = conversation.sampling_params(
        parsed(n=3, seed=(1 << 64) - 2, temperature=1.0, max_completion_tokens=7), ServeConfig()
    )
    assert [params.seed for params in every] == [(1 << 64) - 2, (1 << 64) - 1, 0]
    assert {params.max_new_tokens for params in every} == {7}


def test_limits_of_messages() -> None:
    config = ServeConfig(max_images=1, max_text_chars=10, max_image_tiles=4, max_messages=2)

    def image(**options: Any) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": "data:,", **options}}

    def check(body: ChatRequest) -> None:
        conversation.check_conversation(conversation.to_conversation(body.messages, config), config)

    for content in ([image(), image()], [image(max_dynamic_patch=5)], "x" * 11, [{"type": "text", "text": "x"}] * 11):
        with pytest.raises(APIError):
            check(parsed(messages=[{"role": "user", "content": content}]))
    with pytest.raises(APIError):
        check(parsed(messages=HELLO * 3))


def test_prompts_of_completions() -> None:
    for prompt, prompts in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])):
        assert CompletionRequest.model_validate({"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize("prompt", [[0.5] * 49_000, [True], [{}], 0.5])
def test_prompts_of_another_kind_are_told_what_prompts_are(prompt: Any) -> None:
    conversation.check_lengths({"prompt": prompt}, ServeConfig())
    with pytest.raises(ValidationError) as error:
        CompletionRequest.model_validate({"prompt": prompt})
    problem = validation_error(error.value)
    assert "a prompt is a text, a list of texts, a list of token ids" in problem.message and problem.param == "prompt"


@pytest.mark.parametrize(
    "options",
    [{"top_k": (1 << 31) - 1}, {"top_k": -1}, {"top_p": 1e-6}, {"seed": (1 << 64) - 1}, {"seed": -(1 << 63)},
     {"min_p": 1}, {"repetition_penalty": 0.01}, {"repetition_penalty": 100}, {"presence_penalty": -2},
     {"frequency_penalty": 2}, {"temperature": 2}, {"temperature": 1e-4}],
)  # fmt: skip
def test_what_the_schema_takes_the_sampler_takes(options: dict[str, Any]) -> None:
    assert len(conversation.sampling_params(parsed(**options), ServeConfig())) == 1


def test_keys(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\n" + "a" * 20 + "\n\n" + "b" * 20 + "\n")
    keys = load_keys(file, {"IVL_API_KEYS": "c" * 20 + ", " + "a" * 20})
    assert keys == ("a" * 20, "b" * 20, "c" * 20)
    assert all(Keys(keys).admit(f"Bearer {key}".encode()) for key in keys)
    assert Keys(keys).admit(b"bearer  " + b"b" * 20) and Keys(keys).admit(b"Basic OmJiYmJiYmJiYmJiYmJiYmJiYmJi")
    for wrong in (
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer " + b"a" * 19,
        b"a" * 20,
        b"Basic !",
        b"Basic " + b"a" * 20,
        b"\xff",
    ):
        assert not Keys(keys).admit(wrong)
    assert Keys().admit(None)
    file.write_text("short")
    with pytest.raises(InputError) as error:
        load_keys(file, {})
    assert "short" not in str(error.value) and ":1" in str(error.value)
