"""A strict schema forbids the properties that it does not list, unless it says otherwise."""

from __future__ import annotations

import json

import pytest

from ivl.serve.config import ServeConfig
from ivl.serve.conversation import _grammar
from ivl.serve.schemas import ChatRequest


@pytest.mark.parametrize("strict", [True, False])
def test_a_strict_schema_is_closed(strict: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {}, "additionalProperties": True}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
    body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": form})
    grammar = _grammar(body, ServeConfig())
    assert grammar is not None
    expected = {**schema, "additionalProperties": False} if strict else schema
    assert json.loads(grammar.value) == expected
