"""A request into what the engine takes: conversations with checked media, prompts, sampling parameters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ivl.processing.processor import Processor
from ivl.serve.config import ServeConfig
from ivl.serve.media import MediaGateway
from ivl.serve.problems import Problem
from ivl.serve.protocol import AnyPart, ChatMessage, ChatRequest, CompletionRequest, ImagePart, Sampling, TextPart, VideoPart
from ivl.types import Conversation, Grammar, ImageRef, Message, Part, Prompt, SamplingParams, Text, VideoRef


async def conversation(
    messages: Sequence[ChatMessage], config: ServeConfig, gateway: MediaGateway, hold: Callable[[int], None]
) -> Conversation:
    """The messages with their media fetched and checked. hold: told the size of what was fetched; may refuse it.

    Raises:
        Problem: for too much of something.
        MediaError: for media that are refused.
    """
    check_messages(messages, config)
    fetches: list[asyncio.Task[ImageRef | VideoRef]] = []
    for message in messages:
        for part in message.content:
            if not isinstance(part, str | TextPart):
                fetches.append(asyncio.ensure_future(_fetch(part, config, gateway, hold)))
    try:
        media = iter(await asyncio.gather(*fetches))
    finally:
        for fetch in fetches:
            fetch.cancel()
    out = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        content: list[Part] = [Text(part.text) if isinstance(part, TextPart) else next(media) for part in parts]
        out.append(Message(role, tuple(content)))
    return tuple(out)


def check_messages(messages: Sequence[ChatMessage], config: ServeConfig) -> None:
    """Raises Problem unless the numbers of messages, media and characters are within the limits."""
    parts = [part for message in messages if not isinstance(message.content, str) for part in message.content]
    texts = [message.content for message in messages if isinstance(message.content, str)]
    texts += [part.text for part in parts if isinstance(part, TextPart)]
    check_text(texts, config, "messages")
    images = [part.image_url for part in parts if isinstance(part, ImagePart)]
    videos = [part.video_url for part in parts if isinstance(part, VideoPart)]
    for count, limit, noun in (
        (len(messages), config.max_messages, "messages"),
        (len(parts) - len(images) - len(videos), config.max_messages, "pieces of text"),
        (len(images), config.max_images, "images"),
        (len(videos), config.max_videos, "videos"),
        (max((image.max_dynamic_patch or 1 for image in images), default=0), config.max_image_tiles, "tiles of an image"),
        (max((video.num_frames or 1 for video in videos), default=0), config.max_frames, "frames of a video"),
    ):
        if count > limit:
            raise Problem(400, f"{count} {noun}, the limit is {limit}", param="messages", code="limit_exceeded")


def check_text(texts: Sequence[str], config: ServeConfig, param: str) -> None:
    """Raises Problem for more characters than are allowed."""
    if (count := sum(map(len, texts))) > config.max_text_chars:
        message = f"{count} characters of text, the limit is {config.max_text_chars}"
        raise Problem(400, message, param=param, code="context_length_exceeded")


async def _fetch(part: AnyPart, config: ServeConfig, gateway: MediaGateway, hold: Callable[[int], None]) -> ImageRef | VideoRef:
    if isinstance(part, ImagePart):
        image = part.image_url
        url, most = image.url, 1 if image.detail == "low" else image.max_dynamic_patch
        found: ImageRef | VideoRef = await gateway.image(url, max_tiles=most)
    else:
        assert isinstance(part, VideoPart)
        url, frames = part.video_url.url, part.video_url.num_frames or min(8, config.max_frames)
        found = await gateway.video(url, num_frames=frames)
    if url[:5].lower() != "data:" and isinstance(found.source, bytes):  # a data: URL was counted with the body
        hold(len(found.source))
    return found


def prompt(text: str | list[int], config: ServeConfig, processor: Processor) -> Prompt:
    """Text or token ids as they are, without the model's template. Tokenises: not for the event loop.

    Raises:
        Problem: for ids that are none, or nothing at all.
    """
    tokenizer = processor.tokenizer
    if isinstance(text, str):
        check_text([text], config, "prompt")
        ids = [] if tokenizer.bos is None else [tokenizer.bos]
        ids += tokenizer.encode(text)
    else:
        ids, vocab = text, processor.config.decoder.vocab_size
        if wrong := [i for i in ids if not 0 <= i < vocab or i == processor.config.image_token_id]:
            raise Problem(400, f"token id {wrong[0]} is not one of text: ids are 0 to {vocab - 1}", param="prompt")
    if not ids:
        raise Problem(400, "the prompt is empty", param="prompt")
    size = processor.tiling.tile_size
    none = torch.zeros(0, size, size, 3, dtype=torch.uint8)
    return Prompt(torch.tensor(ids, dtype=torch.long), none, torch.zeros(0, dtype=torch.long))


def params(body: Sampling, config: ServeConfig) -> list[SamplingParams]:
    """Parameters of each of the n replies; with a seed each has its own.

    Raises:
        Problem: for a value beyond the limits.
    """
    stops = body.stops
    longest = max(map(len, stops), default=0)
    asked = body.max_tokens
    scored, top = None, 0
    if isinstance(body, ChatRequest):
        asked = body.max_completion_tokens or asked
        scored, top = (body.top_logprobs if body.logprobs else None), body.top_logprobs
    elif isinstance(body, CompletionRequest):
        scored, top = body.logprobs, body.logprobs or 0
    for value, limit, param, noun in (
        (body.n, config.max_n, "n", "replies"),
        (asked or 1, config.max_new_tokens, "max_tokens", "new tokens"),
        (len(stops), config.max_stop, "stop", "stop strings"),
        (longest, config.max_stop_chars, "stop", "characters in a stop string"),
        (top, config.max_logprobs, "top_logprobs", "alternatives per token"),
    ):
        if value > limit:
            raise Problem(400, f"{value} {noun}, the limit is {limit}", param=param, code="limit_exceeded")
    if "" in stops:
        raise Problem(400, "a stop string is empty", param="stop")
    options: dict[str, Any] = {
        "max_new_tokens": asked or config.default_new_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": max(0, body.top_k),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "stop": stops,
        "logprobs": scored,
        "ignore_eos": body.ignore_eos,
        "guide": guide(body, config) if isinstance(body, ChatRequest) else None,
    }
    try:
        return [SamplingParams(**options, seed=_seed(body.seed, number)) for number in range(body.n)]
    except ValueError as error:
        raise Problem(400, str(error), code="invalid_value") from error


def _seed(seed: int | None, number: int) -> int | None:
    return None if seed is None else (seed + number) % (1 << 63)


def guide(body: ChatRequest, config: ServeConfig) -> Grammar | None:
    """What the reply must look like, None if anything goes."""
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return Grammar("json")
    schema = json.dumps(form.json_schema.schema_, ensure_ascii=False)
    if len(schema) > config.max_schema_chars:
        message = f"a schema of {len(schema)} characters, the limit is {config.max_schema_chars}"
        raise Problem(400, message, param="response_format.json_schema", code="limit_exceeded")
    return Grammar("json_schema", schema)
