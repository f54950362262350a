"""What clients get: OpenAI's answers, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from ivl.processing.tokenizer import Tokenizer
from ivl.types import FinishReason, TextDelta


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: Error


class PromptDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request; those of images count as prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenScore(Alternative):
    top_logprobs: list[Alternative]


class Scores(BaseModel):
    content: list[TokenScore]
    refusal: None = None


class TextScores(BaseModel):
    """Scores as /v1/completions writes them."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float] = Field(default_factory=list)
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int] = Field(default_factory=list)


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: Scores | None
    finish_reason: FinishReason


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Scores | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextScores | None = None
    finish_reason: FinishReason | None = None


class TextReply(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ivl"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Status(BaseModel):
    status: str


def usage(prompt_tokens: int, new_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=new_tokens,
        total_tokens=prompt_tokens + new_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=cached_tokens),
    )


def now() -> int:
    return int(time.time())


def scores(deltas: Sequence[TextDelta], tokenizer: Tokenizer) -> Scores | None:
    """Log probabilities of the tokens of a piece of reply; control tokens say nothing and are left out."""
    content = [
        TokenScore(
            **_named(tokenizer, each.token, each.logprob),
            top_logprobs=[Alternative(**_named(tokenizer, token, value)) for token, value in each.top],
        )
        for delta in deltas
        if (each := delta.logprob) is not None and not tokenizer.is_control(each.token)
    ]
    return Scores(content=content) if content else None


def text_scores(deltas: Sequence[TextDelta], tokenizer: Tokenizer, offset: int, *, top: bool) -> TextScores | None:
    """The same for /v1/completions; offset is where the piece begins in the reply."""
    found = scores(deltas, tokenizer)
    if found is None:
        return None
    out = TextScores(top_logprobs=[] if top else None)
    for each in found.content:
        out.tokens.append(each.token)
        out.token_logprobs.append(each.logprob)
        out.text_offset.append(offset)
        offset += len(each.token)
        if out.top_logprobs is not None:
            out.top_logprobs.append({alternative.token: alternative.logprob for alternative in each.top_logprobs})
    return out


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """A token that is a part of a character only is told by its bytes; one of a padded vocabulary has none."""
    written = tokenizer.token_bytes(token) if token < len(tokenizer) else b""
    return {"token": written.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(written)}
