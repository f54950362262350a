"""A generator behind any OpenAI-compatible chat endpoint, by the openai client."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from ivl.errors import InputError
from ivl.generators import PlainReply, Refused, join_deltas
from ivl.processing.image import load_image
from ivl.processing.video import load_frames
from ivl.types import Conversation, FinishReason, ImageRef, Message, Part, SamplingParams, Text, TextDelta
from ivl.utils.jsonl import whole_text
from ivl.utils.pictures import open_image

DEFAULT_FRAMES = 8
"""Frames of a video that names no number."""
REFUSED_STATUSES = frozenset({400, 413, 422})
"""Statuses that concern this one conversation: it is too long, or against the server's rules."""
SENT = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "seed")
"""Settings by the names that servers know."""
LOCAL = ("guide", "logprobs", "ignore_eos")
"""Settings that servers take in too many forms, or not at all."""
MAX_REPLY_BYTES = 16 << 20
"""Bytes of one reply with its headers; a reply of 30,000 tokens in pieces has a third of it."""
MAX_REPLY_ITEMS = 1_000_000
"""Commas and opening brackets of one reply, which bound its values; one of two bytes takes up to 70 in memory."""
MAX_REPLY_LINES = 200_000
"""Lines of a stream: two for each token, and as many tokens as MAX_REPLY_BYTES hold."""
TIMEOUTS_A_REPLY = 10
"""A whole reply may take so many times the seconds that may pass without a byte."""
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


class _UnusableReply(Exception):
    """A reply that has no text, breaks off, or is no chat completion at all."""


class _Limited:
    """Part of the HTTP library whose connections have the limits of `reply`. Each thread reads one reply after another.

    The library limits the time between two bytes only, of headers and of the body.
    """

    def __init__(self, inner: Any, reply: Any, seconds: float) -> None:
        self.inner, self.reply, self.seconds = inner, reply, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _LimitedBackend(_Limited):
    def connect_tcp(self, *args: Any, **options: Any) -> Any:
        return _LimitedStream(self.inner.connect_tcp(*args, **options), self.reply, self.seconds)


class _LimitedStream(_Limited):
    def start_tls(self, *args: Any, **options: Any) -> Any:
        return _LimitedStream(self.inner.start_tls(*args, **options), self.reply, self.seconds)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        seconds = self.reply.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError(f"timed out: the whole reply took more than {self.seconds:g} s")
        data = self.inner.read(max_bytes, seconds if timeout is None else min(timeout, seconds))
        self.reply.bytes_left -= len(data)
        if self.reply.bytes_left < 0:
            raise OSError(f"the reply has more than {MAX_REPLY_BYTES:,} bytes")
        self.reply.items_left -= data.count(b",") + data.count(b"[") + data.count(b"{")
        if self.reply.items_left < 0:
            raise OSError(f"the reply has more than {MAX_REPLY_ITEMS:,} items")
        return data


class RemoteGenerator:
    """Asks an endpoint for replies. May be used from many threads.

    Args:
        base_url: Base URL of the endpoint, usually ending in /v1.
        model: Name of the model at the endpoint.
        timeout: Seconds without a byte after which a try has failed; so it has after ten times these seconds in all.
        retries: Tries after the first. The client waits longer from try to try, or as long as the server asks for.
        concurrency: Requests of `generate` at the same time.
    """

    def __init__(
        self, base_url: str, *, model: str, api_key: str | None = None, timeout: float = 120, retries: int = 5,
        concurrency: int = 8,
    ) -> None:  # fmt: skip
        if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
            raise InputError(f"endpoint {base_url!r} must start with http:// or https://, such as http://localhost:8000/v1")
        if not model:
            raise InputError(f"{base_url}: name the model to ask")
        if timeout <= 0 or retries < 0 or concurrency < 1:
            raise InputError(f"need timeout > 0, retries >= 0 and concurrency >= 1, got {timeout}, {retries} and {concurrency}")
        self.url, self.model, self.retries, self.concurrency = base_url, model, retries, concurrency
        self._limit_name = "max_tokens"
        http_client = openai.DefaultHttpxClient(
            follow_redirects=False,  # a key must not follow a redirect to another host
            headers={"Accept-Encoding": "identity"},
            event_hooks={"request": [self._start_reply], "response": [_check_encoding]},
        )
        self._reply, self._seconds = threading.local(), TIMEOUTS_A_REPLY * timeout
        # The transports of the endpoint and of proxies; the HTTP library takes no network backend from outside.
        for transport in (http_client._transport, *http_client._mounts.values()):  # noqa: SLF001
            if (pool := getattr(transport, "_pool", None)) is not None:
                pool._network_backend = _LimitedBackend(pool._network_backend, self._reply, self._seconds)  # noqa: SLF001
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key or "none", timeout=timeout, max_retries=retries, http_client=http_client
        )

    def _start_reply(self, _: Any) -> None:
        self._reply.deadline = time.monotonic() + self._seconds
        self._reply.bytes_left, self._reply.items_left = MAX_REPLY_BYTES, MAX_REPLY_ITEMS

    def generate(
        self, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[PlainReply]:
        """Return the reply to each conversation, in order, asking for `concurrency` of them at a time.

        Raises:
            Refused: if the server refuses one of the conversations.
            InputError: after the last try, with the endpoint and its last error.
        """
        params = [params] * len(conversations) if isinstance(params, SamplingParams) else list(params)
        if len(params) != len(conversations):
            raise InputError(f"{len(conversations)} conversations but {len(params)} sampling parameters")
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            return list(pool.map(lambda *question: join_deltas(self._deltas(*question, stream=False)), conversations, params))
        finally:
            pool.shutdown(cancel_futures=True)

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
        """Yield the reply piece by piece; the last delta carries finish_reason. Raises as `generate`."""
        return self._deltas(prompt, params, stream=True)

    def _deltas(self, prompt: Conversation, params: SamplingParams, *, stream: bool) -> Iterator[TextDelta]:
        """Yield a reply. A piece cannot be taken back, so only a stream that fails before its first piece is tried again."""
        messages, settings = [{"role": m.role, "content": _content(m)} for m in prompt], self._settings(params)
        for attempt in range(self.retries + 1):
            started = False
            try:
                for delta in self._attempt(messages, settings, stream):
                    started = True
                    yield delta
                return
            except _UnusableReply as error:
                if started:
                    raise InputError(f"{self.url}: the stream broke off: {error}") from None
                if attempt == self.retries:
                    raise InputError(f"{self.url}: no reply after {attempt + 1} tries; the last error: {error}") from None
                time.sleep(2**attempt * random.uniform(0.25, 0.75))

    def _attempt(self, messages: list[Any], settings: dict[str, Any], stream: bool) -> Iterator[TextDelta]:
        try:
            yield from self._read(messages, settings, stream)
        except (InputError, _UnusableReply):
            raise
        except Exception as error:  # of the client, its HTTP library, or a reply of another form
            raise _UnusableReply(f"not a chat completion ({type(error).__name__}: {_line(error, 200)})") from None

    def _read(self, messages: list[Any], settings: dict[str, Any], stream: bool) -> Iterator[TextDelta]:
        finish: FinishReason | None = None
        with closing(self._post(messages, settings, stream)) as response:
            for chunk in _chunks(response) if stream else [json.loads(response.read())]:
                choices = chunk.get("choices")
                if stream and not choices and "error" not in chunk:
                    continue  # a chunk of usage
                if not isinstance(choices, list) or not choices:  # servers report errors with status 200, too
                    raise _UnusableReply(f"no choices in the reply: {_line(chunk)}")
                text = (choices[0].get("delta" if stream else "message") or {}).get("content")
                if not isinstance(text, str) and (text is not None or not stream):
                    raise _UnusableReply(f"no text in the reply: {_line(chunk)}")
                if text:
                    yield TextDelta(whole_text(text))
                if (reason := choices[0].get("finish_reason")) or not stream:
                    finish = "length" if reason == "length" else "stop"
        if finish is None:
            raise _UnusableReply("the stream ended without a finish_reason")
        yield TextDelta("", finish_reason=finish)

    def _post(self, messages: list[Any], settings: dict[str, Any], stream: bool) -> Any:
        """Return the open response. Raises InputError for a status that is an error, and after the last try."""
        try:
            return self._client.chat.completions.with_streaming_response.create(
                model=self.model, messages=messages, stream=stream or openai.omit, extra_body=settings
            ).__enter__()
        except openai.APIStatusError as error:
            status, reason = error.status_code, _line(_reason(error))
            if status == 400 and "max_completion_tokens" in reason and "max_tokens" in settings:
                self._limit_name = "max_completion_tokens"  # some models know the limit by this name only
                settings[self._limit_name] = settings.pop("max_tokens")
                return self._post(messages, settings, stream)
            retried = status in (408, 409, 429) or status >= 500
            tries = f"no reply after {self.retries + 1} tries; the last error: " if retried else ""
            kind = Refused if status in REFUSED_STATUSES else InputError
            raise kind(f"{self.url}: {tries}status {status}: {reason}") from None
        except openai.APIConnectionError as error:
            reason = str(error.__cause__ or "") or error.message
            raise InputError(f"{self.url}: no reply after {self.retries + 1} tries; the last error: {_line(reason)}") from None

    def _settings(self, params: SamplingParams) -> dict[str, Any]:
        """Return what differs from the defaults, since not every server knows top_k or seed.

        Raises:
            InputError: for settings that only a model here follows.
        """
        changed = {name: getattr(params, name) for name in (*SENT, *LOCAL)}
        changed = {name: value for name, value in changed.items() if value != getattr(SamplingParams(), name)}
        if local := [name for name in LOCAL if name in changed]:
            raise InputError(f"{self.url}: {', '.join(local)} cannot be asked of an endpoint; run the model here")
        return {self._limit_name: params.max_new_tokens, "temperature": params.temperature, **changed}


def _check_encoding(response: Any) -> None:
    """Refuse a compressed reply, whose size no limit would see."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("the reply is compressed, which was not asked for")


def _chunks(response: Any) -> Iterator[Any]:
    """Yield the JSON values of a stream of server-sent events."""
    for number, line in enumerate(response.iter_lines()):
        if number >= MAX_REPLY_LINES:
            raise _UnusableReply(f"the stream has more than {MAX_REPLY_LINES:,} lines")
        data = line[5:].strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)


def _reason(error: openai.APIStatusError) -> str:
    """Return the message of an error response, without its wrapping."""
    message = error.body.get("message") if isinstance(error.body, dict) else error.body
    return str(message or error.response.text.strip() or "nothing")


def _line(text: object, limit: int = 300) -> str:
    """Return the beginning of a server's text on one line: control characters would rule the reader's terminal or log."""
    characters = str(text)[:limit]
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in characters)


def _content(message: Message) -> str | list[dict[str, Any]]:
    if all(isinstance(part, Text) for part in message.content):
        return message.text
    return [entry for part in message.content for entry in _entries(part)]


def _entries(part: Part) -> list[dict[str, Any]]:
    """Return a part of a message in OpenAI's form. A video becomes announced frames, since few servers take videos."""
    if isinstance(part, Text):
        return [{"type": "text", "text": part.text}]
    if isinstance(part, ImageRef):
        tiles = {} if part.max_tiles is None else {"max_dynamic_patch": part.max_tiles}  # known to servers of InternVL
        return [{"type": "image_url", "image_url": {"url": _data_url(part), **tiles}}]
    entries: list[dict[str, Any]] = []
    for number, frame in enumerate(load_frames(part, part.num_frames or DEFAULT_FRAMES), 1):
        entries += [*_entries(Text(f"Frame-{number}: ")), *_entries(ImageRef(frame)), *_entries(Text("\n"))]
    return entries


def _data_url(ref: ImageRef) -> str:
    """Return an image as a data URL: the file itself in a common format, else a PNG."""
    image = load_image(ref)  # checks the size, and that it is an image at all
    data, mime = b"", None
    if not isinstance(ref.source, Image.Image):
        data = Path(ref.source).read_bytes() if isinstance(ref.source, str) else ref.source
        mime = MIME.get(open_image(io.BytesIO(data))[0].format or "")
    if mime is None:
        out = io.BytesIO()
        image.save(out, "PNG")
        data, mime = out.getvalue(), "image/png"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
