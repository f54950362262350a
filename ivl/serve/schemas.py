"""The types on the wire: OpenAI's requests as far as a vision-language model can answer them, and its responses.

A null is the same as a missing key. Keys in IGNORED do not affect a reply. Keys in UNSUPPORTED would, so a request with
one is refused, unless its value asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ivl.serve.errors import APIError
from ivl.types import FinishReason

IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
     "parallel_tool_calls", "annotations", "name")
)  # fmt: skip
UNSUPPORTED = {
    "tools": "tools are not supported", "tool_choice": "tools are not supported", "tool_calls": "tools are not supported",
    "functions": "functions are not supported", "function_call": "functions are not supported",
    "audio": "audio is not supported", "refusal": "a refusal cannot be sent back", "logit_bias": "logit_bias is not supported",
    "prediction": "predicted outputs are not supported", "web_search_options": "web search is not supported",
    "reasoning_effort": "reasoning_effort is not supported", "verbosity": "verbosity is not supported",
    "suffix": "suffix is not supported", "echo": "echo is not supported", "best_of": "best_of is not supported",
}  # fmt: skip
EMPTY: tuple[Any, ...] = ([], {}, "", "none", False)


# Requests


class RequestPart(BaseModel):
    """Part of a request: takes known keys only, and no text in place of a number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None and key not in IGNORED - set(cls.model_fields)}
        for key in [key for key in given if key in UNSUPPORTED and key not in cls.model_fields]:
            if given[key] not in EMPTY:
                raise PydanticCustomError("unsupported", "{reason}", {"reason": UNSUPPORTED[key], "param": key})
            del given[key]
        return given


class TextPart(RequestPart):
    type: Literal["text"]
    text: str


class ImageURL(RequestPart):
    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] = "auto"
    """low is one tile; auto and high take the model's budget."""
    max_dynamic_patch: int | None = Field(None, ge=1)
    """Tile cap of this image."""


class ImagePart(RequestPart):
    type: Literal["image_url"]
    image_url: ImageURL


class VideoURL(RequestPart):
    url: str = Field(min_length=1)
    num_frames: int | None = Field(None, ge=1)


class VideoPart(RequestPart):
    type: Literal["video_url"]
    video_url: VideoURL


AnyPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class ChatMessage(RequestPart):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[AnyPart]


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


class StreamOptions(RequestPart):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted for compatibility; nothing is added."""


class SamplingBody(RequestPart):
    """The settings that chat and completions share. Without a temperature the reply is greedy."""

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=1 << 31)
    """0 and -1 keep all tokens."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(1 << 63), le=(1 << 63) - 1)
    stop: str | list[str] = Field(default_factory=list)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

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
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0)
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("logprobs", "top_logprobs needs logprobs", {"param": "top_logprobs"})
        if None not in (both := (self.max_tokens, self.max_completion_tokens)) and both[0] != both[1]:
            raise PydanticCustomError(
                "max_tokens", "max_tokens and max_completion_tokens differ: give one", {"param": "max_tokens"}
            )
        return self


class CompletionRequest(SamplingBody):
    prompt: str | list[str] | list[int] | list[list[int]]
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
    messages: list[ChatMessage] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give either prompt or messages", {"param": "prompt"})
        return self


# Responses


class ErrorContent(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorContent


class PromptDetails(BaseModel):
    cached_tokens: int = 0


class TokenUsage(BaseModel):
    """Tokens of a request; tokens of images count as prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class WireTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[WireTokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """ChatLogprobs as /v1/completions writes them."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float] = Field(default_factory=list)
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int] = Field(default_factory=list)


class ResponseMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: TokenUsage | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ivl"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class StatusResponse(BaseModel):
    status: str


def validation_error(error: ValidationError) -> APIError:
    """Return the first fault of a request, with its place as `messages[0].content`."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    place = ""
    for step in first["loc"]:
        place += f"[{step}]" if isinstance(step, int) else f".{step}" if place else step
    param = str(context.get("param", "")) if kind != "extra_forbidden" else ""
    place = ".".join(filter(None, (place, param))) or None
    if kind == "json_invalid":
        return APIError(400, "the body is not valid JSON", code="invalid_json")
    if kind == "extra_forbidden":
        return APIError(400, f"{place} is not known to this server", param=place, code="unknown_parameter")
    if kind == "unsupported":
        return APIError(400, f"{place}: {first['msg']} by this server", param=place, code="unsupported_parameter")
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    return APIError(400, message, param=place, code="missing" if kind == "missing" else "invalid_value")
