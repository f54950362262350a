"""Requests on the wire: OpenAI's, as far as a vision-language model can answer them.

A null is the same as a missing key. Keys in IGNORED do not affect a reply. Keys in UNSUPPORTED would, so a request with
one is refused, unless its value asks for nothing. A body gives few errors, whatever it holds: lists end at their first one,
and so do unknown keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ivl.serve.errors import APIError

IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
     "annotations", "name", "parsed", "parsed_arguments", "index")
)  # fmt: skip
UNSUPPORTED = {
    "functions": "functions are not supported: send tools", "function_call": "functions are not supported: send tools",
    "audio": "audio is not supported", "refusal": "a refusal cannot be sent back", "logit_bias": "logit_bias is not supported",
    "prediction": "predicted outputs are not supported", "web_search_options": "web search is not supported",
    "reasoning_effort": "reasoning_effort is not supported", "verbosity": "verbosity is not supported",
    "suffix": "suffix is not supported", "echo": "echo is not supported", "best_of": "best_of is not supported",
}  # fmt: skip
EMPTY: tuple[Any, ...] = ([], {}, "", "none", False)
MAX_PARAM_CHARS = 100
"""Characters of a field's place that an error repeats."""


class RequestPart(BaseModel):
    """Part of a request: takes known keys only, and no text in place of a number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given, known = {}, _known_keys(cls)
        for key, value in data.items():
            if value is None or (key not in known and key in IGNORED):
                continue
            if key in known:
                given[key] = value
            elif key not in UNSUPPORTED:
                raise PydanticCustomError("unknown", "not known to this server", {"param": key})
            elif not any(type(value) is type(empty) and value == empty for empty in EMPTY):  # 0 equals False
                raise PydanticCustomError("unsupported", "{reason}", {"reason": UNSUPPORTED[key], "param": key})
        return given


@cache
def _known_keys(kind: type[RequestPart]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


def _choice(kind: Callable[[Any], str | None], words: str) -> Discriminator:
    """Return what chooses between types, which are tagged in angle brackets: an error leaves the tags out of its place."""
    return Discriminator(kind, custom_error_type="wrong_type", custom_error_message=words)


def _text_or_list(value: Any) -> str | None:
    return {str: "<text>", list: "<list>"}.get(type(value))


def _kind_of_prompt(value: Any) -> str | None:
    first = type(value[0]) if isinstance(value, list) and value else None
    return {None: _text_or_list(value), str: "<list>", int: "<ids>", list: "<lists>"}.get(first)


def _kind_of_tool_choice(value: Any) -> str | None:
    return "<named>" if isinstance(value, dict | Tool) else "<text>" if isinstance(value, str) else None


def _kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("text", "image_url", "video_url") else None


class TextPart(RequestPart):
    type: Literal["text"]
    text: str


class MediaURL(RequestPart):
    """An address, alone or with what goes with it."""

    url: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, data: Any) -> Any:
        return {"url": data} if isinstance(data, str) else data


class ImageURL(MediaURL):
    detail: Literal["auto", "low", "high"] = "auto"
    """low is one tile; auto and high take the model's budget."""
    max_dynamic_patch: int | None = Field(None, ge=1)
    """Tile cap of this image."""


class ImagePart(RequestPart):
    type: Literal["image_url"]
    image_url: ImageURL


class VideoURL(MediaURL):
    num_frames: int | None = Field(None, ge=1)


class VideoPart(RequestPart):
    type: Literal["video_url"]
    video_url: VideoURL


FailFast = Field(fail_fast=True)
AnyText = Annotated[str, Tag("<text>")]
Texts = Annotated[list[str], FailFast, Tag("<list>")]
AnyPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")] | Annotated[VideoPart, Tag("<video_url>")],
    _choice(_kind_of_part, "a part is an object whose type is text, image_url or video_url"),
]
Parts = Annotated[list[AnyPart], FailFast, Tag("<list>")]
TokenIds = Annotated[list[int], FailFast]


class CalledFunction(RequestPart):
    name: str = Field(min_length=1, max_length=128)
    arguments: str = "{}"
    """A JSON object, as text."""


class ToolCall(RequestPart):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestPart):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[AnyText | Parts, _choice(_text_or_list, "a content is a text or a list of parts")] = ""
    """Only an assistant may say nothing."""
    tool_calls: list[ToolCall] = Field(default_factory=list, fail_fast=True)
    tool_call_id: str = ""
    """Accepted for compatibility: the results of calls come in their order."""

    @model_validator(mode="after")
    def _complete(self) -> ChatMessage:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise PydanticCustomError("missing", "Field required", {"param": "content"})
        if self.role != "assistant" and self.tool_calls:
            raise PydanticCustomError("role", "only an assistant calls tools", {"param": "tool_calls"})
        return self


class ToolFunction(RequestPart):
    name: str = Field(min_length=1, max_length=128)
    description: str = ""
    parameters: dict[str, Any] | None = None
    """A JSON schema of the arguments; without it there are none."""
    strict: bool = False


class Tool(RequestPart):
    """A tool that may be called, or the choice of one. The Responses API has the function's keys beside the type."""

    type: Literal["function"]
    function: ToolFunction

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("type") != "function" or data.get("function") or len(data) < 2:
            return data
        return {"type": "function", "function": {key: data[key] for key in data if key not in ("type", "function")}}


class JSONSchema(RequestPart):
    name: str = Field("", max_length=64)
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(RequestPart):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema belongs to the type json_schema, and to no other", {})
        return self


SchemaOrText = Annotated[
    Annotated[dict[str, Any], Tag("<object>")] | AnyText,
    _choice(lambda value: {dict: "<object>", str: "<text>"}.get(type(value)), "a JSON schema is an object, or one as text"),
]


class StructuredOutputs(RequestPart):
    """vLLM's: the form of a reply, one of these."""

    json_: SchemaOrText | None = Field(None, alias="json")
    choice: list[str] | None = Field(None, fail_fast=True)
    regex: str | None = None
    grammar: str | None = None
    """Lark, or GBNF."""


class StreamOptions(RequestPart):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted for compatibility; nothing is added."""


class SamplingBody(RequestPart):
    """The settings that chat and completions share. Without a temperature the reply is greedy."""

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    """Up to 2, as OpenAI has it."""
    top_p: float = Field(1.0, ge=1e-6, le=1)
    top_k: int = Field(0, ge=-1, le=(1 << 31) - 1)
    """0 and -1 keep all tokens."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(1 << 63), le=(1 << 64) - 1)
    stop: Annotated[AnyText | Texts, _choice(_text_or_list, "stop is a text or a list of texts")] = Field(default_factory=list)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    """This and the next: older names of what structured_outputs holds."""
    guided_choice: list[str] | None = Field(None, fail_fast=True)
    guided_regex: str | None = None
    guided_grammar: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _streamed(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream", "stream_options is for streams only", {"param": "stream_options"})
        if 0 < self.temperature < 1e-4:
            raise PydanticCustomError("temperature", "temperature must be 0 or at least 0.0001", {"param": "temperature"})
        return self


class ChatRequest(SamplingBody):
    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0)
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field(default_factory=list, fail_fast=True)
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[Tool, Tag("<named>")],
        _choice(_kind_of_tool_choice, "tool_choice is none, auto, required, or an object that names a function"),
    ] = "auto"
    parallel_tool_calls: bool = True
    """False ends a reply with its first call."""
    modalities: list[Literal["text"]] = Field(default_factory=list, fail_fast=True)

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("logprobs", "top_logprobs needs logprobs", {"param": "top_logprobs"})
        if None not in (both := (self.max_tokens, self.max_completion_tokens)) and both[0] != both[1]:
            raise PydanticCustomError(
                "max_tokens", "max_tokens and max_completion_tokens differ: give one", {"param": "max_tokens"}
            )
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "two tools have one name", {"param": "tools"})
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, Tool) else None
        if wanted is not None and wanted not in names:
            raise PydanticCustomError("tools", "there is no such tool among tools", {"param": "tool_choice"})
        if self.tool_choice == "required" and not names:
            raise PydanticCustomError("tools", "a call is required, but tools has none", {"param": "tool_choice"})
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the reply may call."""
        return [] if self.tool_choice == "none" else self.tools


class CompletionRequest(SamplingBody):
    prompt: Annotated[
        AnyText | Texts | Annotated[TokenIds, Tag("<ids>")] | Annotated[list[TokenIds], FailFast, Tag("<lists>")],
        _choice(_kind_of_prompt, "a prompt is a text, a list of texts, a list of token ids, or a list of such lists"),
    ]
    """A text, token ids, or several of either."""
    logprobs: int | None = Field(None, ge=0)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]  # type: ignore[list-item]
        return list(prompt)  # type: ignore[arg-type]


class TokenizeRequest(RequestPart):
    """Takes exactly one of prompt and messages."""

    model: str = ""
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, fail_fast=True)
    tools: list[Tool] = Field(default_factory=list, fail_fast=True)

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give either prompt or messages", {"param": "prompt"})
        return self


def validation_error(error: ValidationError) -> APIError:
    """Return the first fault of a request, with its place as `messages[0].content`."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, message = first["type"], first["msg"]
    place = ""
    for step in (*first["loc"], *filter(None, [first.get("ctx", {}).get("param")])):
        if isinstance(step, int):
            place += f"[{step}]"
        elif not step.startswith("<"):
            place += f".{step}" if place else step
    place = place[:MAX_PARAM_CHARS]
    if kind == "json_invalid":
        return APIError(400, "the body is not valid JSON", code="invalid_json")
    if kind == "unknown":
        return APIError(400, f"{place} is {message}", param=place, code="unknown_parameter")
    if kind == "unsupported":
        return APIError(400, f"{place}: {message}", param=place, code="unsupported_parameter")
    code = "missing" if kind == "missing" else "invalid_value"
    return APIError(400, f"{place}: {message}" if place else message, param=place or None, code=code)
