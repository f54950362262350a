"""Turns requests into what the engine takes: conversations with checked media, prompts, sampling parameters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ivl.processing.chat import open_lines
from ivl.processing.image import num_tiles
from ivl.processing.processor import Processor
from ivl.serve.config import ServeConfig
from ivl.serve.errors import APIError
from ivl.serve.guard import RequestContext
from ivl.serve.media import MediaGateway, is_data_url
from ivl.serve.schemas import (
    AnyPart,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    JSONSchema,
    SamplingBody,
    TextPart,
    Tool,
)
from ivl.serve.tools import CALL_END, RESPONSE, RESPONSE_END, call_grammar, calls_text, check_tools, read_object, with_tools
from ivl.types import Conversation, Grammar, ImageRef, Message, Part, Prompt, Role, SamplingParams, Text, VideoRef
from ivl.utils.grammars import close_objects, schema_counts

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "tool": "user", "assistant": "assistant",
}  # fmt: skip
"""Roles of the API as the template writes them."""
DEFAULT_FRAMES = 8
"""Frames of a video whose request names no number."""
FRAMES_PER_TAKEN = 16
"""Frames that are only decoded on the way to others, and take about as long as one that is taken."""


def check_lengths(body: Any, config: ServeConfig) -> None:
    """Check the lists of a body, before their items are checked one by one, which takes much longer.

    Raises:
        APIError: for more items than the limits allow.
    """
    fields = body if isinstance(body, dict) else {}
    lists = {name: value for name in ("messages", "prompt", "stop", "tools") if isinstance(value := fields.get(name), list)}
    messages, prompts = lists.get("messages", []), lists.get("prompt", [])
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    most_parts = config.max_messages + config.max_images + config.max_videos
    _check_limits(
        (len(messages), config.max_messages, "messages", "messages"),
        (sum(len(content) for content in contents if isinstance(content, list)), most_parts, "parts", "messages"),
        (len(prompts) if prompts and isinstance(prompts[0], str | list) else 0, config.max_n, "prompts", "prompt"),
        (len(lists.get("stop", [])), config.max_stop, "stop strings", "stop"),
        (len(lists.get("tools", [])), config.max_tools, "tools", "tools"),
    )


def _check_limits(*limits: tuple[int, int, str, str]) -> None:
    """Raise APIError for a count above its limit. limits: count, limit, noun and field of each."""
    for count, limit, noun, param in limits:
        if count > limit:
            raise APIError(400, f"{count} {noun}, the limit is {limit}", param=param, code="limit_exceeded")


async def load_conversation(
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool],
    config: ServeConfig,
    gateway: MediaGateway,
    context: RequestContext,
    processor: Processor,
) -> Conversation:
    """Return messages as a conversation whose media are fetched and checked; nothing of them is decoded.

    Args:
        tools: What the reply may call.
        context: Has the media that came with the body, counts what is fetched, and gets the number of pixels.
        processor: Says how many tiles an image becomes.

    Raises:
        APIError: for more of something than the limits allow.
        MediaRefusal: for media that are refused.
    """
    if tools or any(message.role == "tool" or message.tool_calls for message in messages):
        check_tools(processor)
    check_text([call.function.arguments for message in messages for call in message.tool_calls], config, "messages")
    conversation = with_tools(to_conversation(messages, config), tools, processor)
    check_conversation(conversation, config)
    refs = media_of(conversation)
    share = max(1, processor.tiling.max_tiles // max(1, sum(isinstance(ref, ImageRef) for ref in refs)))
    tiles = 0

    async def fetch(ref: ImageRef | VideoRef) -> ImageRef | VideoRef:
        nonlocal tiles
        url = ref.source
        assert isinstance(url, str)
        fetched, header = await gateway.read(ref, context.media.pop(url, url), context.group)
        if not is_data_url(url) and isinstance(fetched.source, bytes):  # a data: URL was counted with the body
            context.hold(len(fetched.source))
        frames, width, height = 1, header.width, header.height
        if isinstance(ref, VideoRef):
            frames = ref.num_frames or 1
            frames += header.frames if header.format == "GIF" else header.frames // FRAMES_PER_TAKEN
            tiles += ref.num_frames or 1
        else:  # it may lie on its side
            sides = ((width, height), (height, width))
            tiles += min(num_tiles(w, h, processor.tiling, ref.max_tiles or share) for w, h in sides)
        context.pixels += width * height * frames
        if context.pixels > config.max_pixels_per_request:
            reason = f"the images and frames have {context.pixels:,} pixels or more, the limit of a request is "
            reason += f"{config.max_pixels_per_request:,} (max_pixels_per_request): scale them down, or send fewer"
            raise APIError(413, reason, param="messages", code="limit_exceeded")
        _check_limits((tiles, config.max_request_tiles, "tiles of images and frames", "messages"))
        return fetched

    fetches = [asyncio.ensure_future(fetch(ref)) for ref in refs]
    try:
        fetched = iter(await asyncio.gather(*fetches))
    finally:
        for task in fetches:
            task.cancel()
    return tuple(
        replace(message, content=tuple(part if isinstance(part, Text) else next(fetched) for part in message.content))
        for message in conversation
    )


def to_conversation(messages: Sequence[ChatMessage], config: ServeConfig) -> Conversation:
    """Return messages as a conversation whose media are still addresses."""

    def part(sent: AnyPart) -> Part:
        if isinstance(sent, TextPart):
            return Text(sent.text)
        if isinstance(sent, ImagePart):
            image = sent.image_url
            return ImageRef(image.url, 1 if image.detail == "low" else image.max_dynamic_patch)
        return VideoRef(sent.video_url.url, sent.video_url.num_frames or min(DEFAULT_FRAMES, config.max_frames))

    turns: list[Message] = []
    for number, message in enumerate(messages):
        sent = message.content
        content = (Text(sent),) if isinstance(sent, str) else tuple(open_lines(list(map(part, sent))))
        if message.tool_calls:
            said = Message("assistant", content).text
            content = (Text(said + "\n" * bool(said) + calls_text(message.tool_calls, f"messages[{number}]")),)
        if message.role == "tool":
            content = (Text(RESPONSE), *content, Text(RESPONSE_END))
            if number and messages[number - 1].role == "tool":  # results that follow one another are one turn
                content = (*turns.pop().content, Text("\n"), *content)
        turns.append(Message(ROLES[message.role], content))
    return tuple(turns)


def check_conversation(conversation: Conversation, config: ServeConfig) -> None:
    """Check the numbers of messages, media and characters of a conversation.

    Raises:
        APIError: for more than the limits allow.
    """
    texts = [part.text for message in conversation for part in message.content if isinstance(part, Text)]
    check_text(texts, config, "messages")
    refs = media_of(conversation)
    images = [ref for ref in refs if isinstance(ref, ImageRef)]
    videos = [ref for ref in refs if isinstance(ref, VideoRef)]
    _check_limits(
        (len(texts), config.max_messages, "pieces of text", "messages"),
        (len(images), config.max_images, "images", "messages"),
        (len(videos), config.max_videos, "videos", "messages"),
        (max((image.max_tiles or 1 for image in images), default=0), config.max_image_tiles, "tiles of an image", "messages"),
        (max((video.num_frames or 1 for video in videos), default=0), config.max_frames, "frames of a video", "messages"),
    )


def check_text(texts: Sequence[str], config: ServeConfig, param: str) -> None:
    """Check the numbers of characters and of their bytes. Raises APIError for more than are allowed."""
    reason = None
    if (count := sum(map(len, texts))) > config.max_text_chars:
        reason = f"{count} characters of text, the limit is {config.max_text_chars}"
    elif (count := sum(len(text.encode(errors="replace")) for text in texts)) > config.max_text_bytes:
        reason = f"{count} bytes of text in UTF-8, the limit is {config.max_text_bytes}"
    if reason is not None:
        raise APIError(400, reason, param=param, code="context_length_exceeded")


def media_of(conversation: Conversation) -> list[ImageRef | VideoRef]:
    """Return the images and videos of a conversation, in order."""
    return [part for message in conversation for part in message.content if not isinstance(part, Text)]


def plain_prompt(text: str | list[int], processor: Processor) -> Prompt:
    """Return text or token ids as a prompt without the model's template. Tokenizes: not for the event loop.

    Raises:
        APIError: for ids that are not of text, or an empty prompt.
    """
    tokenizer = processor.tokenizer
    if isinstance(text, str):
        ids = [] if tokenizer.bos is None else [tokenizer.bos]
        ids += tokenizer.encode(text)
    else:
        ids, vocab_size = text, processor.config.decoder.vocab_size
        if wrong := [i for i in ids if not 0 <= i < vocab_size or i == processor.config.image_token_id]:
            raise APIError(400, f"token id {wrong[0]} is not one of text: ids are 0 to {vocab_size - 1}", param="prompt")
    if not ids:
        raise APIError(400, "the prompt is empty", param="prompt")
    size = processor.tiling.tile_size
    no_tiles = torch.zeros(0, size, size, 3, dtype=torch.uint8)
    # Not torch.tensor, which holds the interpreter for a third of a second over a million ids.
    return Prompt(torch.from_numpy(np.array(ids, dtype=np.int64)), no_tiles, torch.zeros(0, dtype=torch.long))


def sampling_params(body: SamplingBody, config: ServeConfig) -> list[SamplingParams]:
    """Return the parameters of each of the n replies; with a seed each has its own.

    Raises:
        APIError: for a value beyond the limits.
    """
    stops, max_tokens, logprobs, num_top = body.stops, body.max_tokens, None, 0
    if isinstance(body, ChatRequest):
        max_tokens = body.max_completion_tokens or max_tokens
        logprobs, num_top = (body.top_logprobs if body.logprobs else None), body.top_logprobs
    elif isinstance(body, CompletionRequest):
        logprobs, num_top = body.logprobs, body.logprobs or 0
    _check_limits(
        (body.n, config.max_n, "replies", "n"),
        (max_tokens or 1, config.max_new_tokens, "new tokens", "max_tokens"),
        (len(stops), config.max_stop, "stop strings", "stop"),
        (max(map(len, stops), default=0), config.max_stop_chars, "characters in a stop string", "stop"),
        (num_top, config.max_logprobs, "alternatives per token", "top_logprobs"),
    )
    if "" in stops:
        raise APIError(400, "a stop string is empty", param="stop")
    shared = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos")
    options: dict[str, Any] = {name: getattr(body, name) for name in shared}
    try:
        params = SamplingParams(
            max_new_tokens=max_tokens or config.default_new_tokens,
            top_k=max(0, body.top_k),
            stop=stops,
            logprobs=logprobs,
            guide=_grammar(body, config),
            **options,
        )
    except ValueError as error:
        raise APIError(400, str(error), code="invalid_value") from error
    if isinstance(body, ChatRequest) and body.offered and not body.parallel_tool_calls:
        params = replace(params, stop=(*stops, CALL_END))  # CallReader completes the call
    seeds = [None if body.seed is None else (body.seed + number) % (1 << 64) for number in range(body.n)]
    return [replace(params, seed=seed) for seed in seeds]


def _grammar(body: SamplingBody, config: ServeConfig) -> Grammar | None:
    """Return the grammar of the reply, None if it has none.

    Raises:
        APIError: for more than one, or one that cannot be read or is beyond the limits.
    """
    fields = ("guided_json", "guided_choice", "guided_regex", "guided_grammar")
    given: dict[str, Any] = {name: getattr(body, name) for name in fields}
    if (outputs := body.structured_outputs) is not None:
        given |= {f"structured_outputs.{name.strip('_')}": value for name, value in outputs}
    tools: list[Tool] = []
    choice: Any = "auto"
    if isinstance(body, ChatRequest):
        tools, wanted, choice = body.offered, body.response_format, body.tool_choice
        if wanted is not None and wanted.type != "text":
            given["response_format"] = wanted.json_schema or True
    given = {param: value for param, value in given.items() if value is not None}
    calls = bool(tools) and not (choice == "auto" and set(given) <= {"response_format"})
    if len(given) + calls > 1:
        names = " and ".join([*given, "tools"] if calls else given)
        raise APIError(400, f"{names} each say what form the reply has: give one", param=next(iter(given)))
    form = _grammar_of(*given.popitem(), config) if given else None
    if not isinstance(body, ChatRequest) or not tools or (choice == "auto" and form is None):
        return form
    if isinstance(choice, Tool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    for tool in tools:
        _check_schema(tool.function.parameters or {}, config, "tools")
    return call_grammar(tools, form, several=body.parallel_tool_calls and not isinstance(choice, Tool))


def _grammar_of(param: str, value: Any, config: ServeConfig) -> Grammar:
    """Return the grammar that a field of a request asks for."""
    kind: Any = param.rpartition(".")[2].removeprefix("guided_")
    if value is True:  # a JSON object, whatever it holds
        return Grammar("json")
    if kind not in ("json", "response_format"):
        text = json.dumps(value) if kind == "choice" else value
        _check_limits((len(text), config.max_schema_chars, f"characters of a {kind}", param))
        return Grammar(kind, text)
    schema, strict = value, True
    if isinstance(value, JSONSchema):
        param, schema, strict = "response_format.json_schema", value.schema_, value.strict
    if isinstance(schema, str):
        _check_limits((len(schema), config.max_schema_chars, "characters of a schema", param))
        schema = read_object(schema)
    if schema is None:
        raise APIError(400, f"{param} is a JSON schema: an object, or one as text", param=param)
    _check_schema(schema, config, param)
    if strict:  # as OpenAI has it, where a schema must forbid other properties, and vLLM
        close_objects(schema)
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))


def _check_schema(schema: dict[str, Any], config: ServeConfig, param: str) -> None:
    """Raise APIError for a schema beyond the limits."""
    _check_limits((len(json.dumps(schema, ensure_ascii=False)), config.max_schema_chars, "characters of a schema", param))
    counts = schema_counts(schema)
    _check_limits(
        (counts["levels"], config.max_schema_depth, "levels of a schema", param),
        (counts["properties"], config.max_schema_properties, "properties of a schema", param),
        (counts["references"], config.max_schema_refs, "references of a schema", param),
    )
