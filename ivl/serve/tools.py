"""Tools as Qwen2.5 and Qwen3 were trained to use them, which is the form of Hermes.

The system turn lists the tools, a reply calls them as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and a user
turn has their results as `<tool_response>`. The templates of Qwen2.5 and Qwen3 have these words.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ivl.inference.text import overlap
from ivl.processing.chat import template_of
from ivl.processing.processor import Processor
from ivl.serve.errors import APIError
from ivl.serve.schemas import Tool, ToolCall
from ivl.types import Conversation, Grammar, Message, Text
from ivl.utils.grammars import COMPACT, close_objects

CALL, CALL_END = "<tool_call>", "</tool_call>"
RESPONSE, RESPONSE_END = "<tool_response>\n", "\n</tool_response>"
_WORDS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
_AS_TRAINED: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""llguidance's options for the white space that the templates write in JSON."""


def check_tools(processor: Processor) -> None:
    """Check that a model knows tools. Raises APIError for one whose vocabulary has no word for a call."""
    if CALL not in processor.tokenizer:
        family = processor.config.decoder.family
        reason = f"this model's language model ({family}) was not trained to use tools: its vocabulary has no {CALL}"
        raise APIError(400, f"{reason}, which those of Qwen2.5 and Qwen3 have", param="tools", code="unsupported_parameter")


def with_tools(conversation: Conversation, tools: Sequence[Tool], processor: Processor) -> Conversation:
    """Return a conversation whose system turn lists the tools; the model's own system message stands before them."""
    if not tools:
        return conversation
    config = processor.config
    own = template_of(config.template).system_message if config.system_message is None else config.system_message
    has_system = conversation[0].role == "system"
    first = conversation[0] if has_system else Message("system", (Text(own),))
    shown = [tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}}) for tool in tools]
    listed = _WORDS.format(tools="\n".join(map(_json, shown)))
    content = (*first.content, Text(f"\n\n{listed}")) if first.text else (Text(listed),)
    return (replace(first, content=content), *conversation[int(has_system) :])


def calls_text(calls: Sequence[ToolCall], place: str) -> str:
    """Return calls as an assistant writes them. Raises APIError, at place, for arguments that are not a JSON object."""
    lines: list[str] = []
    for number, call in enumerate(calls):
        if (arguments := read_object(call.function.arguments or "{}")) is None:
            param = f"{place}.tool_calls[{number}].function.arguments"
            raise APIError(400, f"{param}: not a JSON object, as text", param=param, code="invalid_value")
        lines.append(f"{CALL}\n{_json({'name': call.function.name, 'arguments': arguments})}\n{CALL_END}")
    return "\n".join(lines)


def call_grammar(tools: Sequence[Tool], other: Grammar | None, *, several: bool) -> Grammar:
    """Return the grammar of a reply that calls tools.

    Args:
        other: JSON that it may be instead of calls.
        several: Whether more than one call may come.
    """
    rules: list[str] = []
    end = f"}}\n{CALL_END}"
    for tool in tools:
        parameters = {key: value for key, value in (tool.function.parameters or {}).items() if value is not None}
        if parameters.get("type", "object") != "object":
            reason = f"the parameters of {tool.function.name!r} are not a schema of type object"
            raise APIError(400, reason, param="tools", code="invalid_value")
        given = copy.deepcopy(parameters or {"properties": {}, "additionalProperties": False})
        schema = {"type": "object", **given, "x-guidance": _AS_TRAINED}
        close_objects(schema)  # strict or not: a model may write further arguments without end
        start = f'{CALL}\n{{"name": {json.dumps(tool.function.name)}, "arguments": '
        rules.append(f"{json.dumps(start)} %json {json.dumps(schema)} {json.dumps(end)}")
    start = f"start: call{' more*' if several else ''}"
    if other is not None:
        schema = json.loads(other.value or '{"type": "object"}') | {"x-guidance": COMPACT}
        start += f" | other\nother: %json {json.dumps(schema)}"
    return Grammar("grammar", start + '\nmore: "\\n" call\ncall: ' + "\n    | ".join(rules))


class CallReader:
    """Takes the text of a reply as it comes, and takes the calls out of it. What is no call stays text."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""

    def push(self, text: str, *, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Take a piece of the reply. Return the text that is certain now, and the calls that are complete, as OpenAI has them.

        Args:
            last: Whether nothing follows.
        """
        self._held += text
        said, calls = "", list[dict[str, Any]]()
        while (at := self._held.find(CALL)) >= 0:
            end = self._held.find(CALL_END, at)
            if end < 0 and not last:
                break
            stop = len(self._held) if end < 0 else end
            call = _read_call(self._held[at + len(CALL) : stop], self.num_calls)
            said += self._held[: stop + len(CALL_END)] if call is None else self._held[:at].rstrip()
            self._held = self._held[stop + len(CALL_END) :]
            if call is not None:
                calls.append(call)
                self.num_calls += 1
        if last:
            rest, self._held = self._held, ""
            return said + (rest.rstrip() if self.num_calls else rest), calls
        if at < 0:  # the end may be the beginning of a mark
            at = len(self._held) - overlap(self._held, CALL)
        certain = self._held[:at].rstrip()  # white space before a call is no content
        self._held = self._held[len(certain) :]
        return said + certain, calls


def _read_call(text: str, index: int) -> dict[str, Any] | None:
    """Return what a model wrote between the marks as a call of OpenAI's, None if it is none."""
    try:
        call = json.loads(text, strict=False)  # models write line breaks into strings
        name, given = call["name"], call.get("arguments") or {}
        if isinstance(given, str):  # some models write the arguments as text, as the API has them
            given = read_object(given)
        arguments = json.dumps(given, ensure_ascii=False, allow_nan=False)
        f"{name}{arguments}".encode()  # half a surrogate pair cannot be sent
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(given, dict):
        return None
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def read_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text is, None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json(value: Any) -> str:
    """Return a value as JSON with the white space of the templates."""
    return json.dumps(value, ensure_ascii=False)
