"""A generator behind any OpenAI-compatible chat endpoint, by the openai client."""

from __future__ import annotations

import base64
import io
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from ivl.errors import InputError
from ivl.generators import PlainReply, Refused, join_deltas
from ivl.processing.image import load_image
from ivl.processing.video import load_frames
from ivl.types import Conversation, FinishReason, ImageRef, Message, Part, SamplingParams, Text, TextDelta
from ivl.utils.pictures import open_image

DEFAULT_FRAMES = 8
"""Frames of a video that names no number."""
REFUSED_STATUSES = frozenset({400, 413, 422})
"""Statuses that concern this one conversation: it is too long, or against the server's rules."""
SENT = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "seed")
"""Settings by the names that servers know."""
LOCAL = ("guide", "logprobs", "ignore_eos")
"""Settings that servers take in too many forms, or not at all."""
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


class _UnusableReply(Exception):
    """A reply with status 200 that has no text, or breaks off."""


class RemoteGenerator:
    """Asks an endpoint for replies. May be used from many threads.

    Args:
        base_url: Base URL of the endpoint, usually ending in /v1.
        model: Name of the model at the endpoint.
        timeout: Seconds without a byte after which a try has failed.
        retries: Tries after the first. The client waits longer from try to try, or as long as the server asks for.
        concurrency: Requests of `generate` at the same time.
    """

    def __init__(
        self, base_url: str, *, model: str, api_key: str | None = None, timeout: float = 120, retries: int = 5,
        concurrency: int = 8,
    ) -> None:  # fmt: skip
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"endpoint {base_url!r} must start with http:// or https://, such as http://localhost:8000/v1")
        if not model:
            raise InputError(f"{base_url}: name the model to ask")
        if timeout <= 0 or retries < 0 or concurrency < 1:
            raise InputError(f"need timeout > 0, retries >= 0 and concurrency >= 1, got {timeout}, {retries} and {concurrency}")
        self.url, self.model, self.retries, self.concurrency = base_url, model, retries, concurrency
        self._limit_name = "max_tokens"
        http_client = openai.DefaultHttpxClient(follow_redirects=False)  # a key must not follow a redirect to another host
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key or "none", timeout=timeout, max_retries=retries, http_client=http_client
        )

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
            raise ValueError(f"{len(conversations)} conversations but {len(params)} sampling parameters")
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
        reply, finish = self._post(messages, settings, stream), None
        for chunk in _chunks(reply) if stream else [reply]:
            choices = getattr(chunk, "choices", None)
            if not choices and stream:
                continue  # a chunk of usage
            if not isinstance(choices, list) or not choices:  # servers report errors with status 200, too
                raise _UnusableReply(f"no choices in the reply: {str(chunk)[:300]}")
            text = getattr(choices[0].delta if stream else choices[0].message, "content", None)
            if text is None and not stream:
                raise _UnusableReply(f"no text in the reply: {str(chunk)[:300]}")
            if text:
                yield TextDelta(text)
            if choices[0].finish_reason or not stream:
                finish: FinishReason | None = "length" if choices[0].finish_reason == "length" else "stop"
        if finish is None:
            raise _UnusableReply("the stream ended without a finish_reason")
        yield TextDelta("", finish_reason=finish)

    def _post(self, messages: list[Any], settings: dict[str, Any], stream: bool) -> Any:
        try:
            return self._client.chat.completions.create(
                model=self.model, messages=messages, stream=stream or openai.omit, extra_body=settings
            )
        except openai.APIStatusError as error:
            status, reason = error.status_code, _reason(error)[:300]
            if status == 400 and "max_completion_tokens" in reason and "max_tokens" in settings:
                self._limit_name = "max_completion_tokens"  # some models know the limit by this name only
                settings[self._limit_name] = settings.pop("max_tokens")
                return self._post(messages, settings, stream)
            retried = status in (408, 409, 429) or status >= 500
            tries = f"no reply after {self.retries + 1} tries; the last error: " if retried else ""
            kind = Refused if status in REFUSED_STATUSES else InputError
            raise kind(f"{self.url}: {tries}status {status}: {reason}") from None
        except openai.APIConnectionError as error:
            reason = error.message if isinstance(error, openai.APITimeoutError) else str(error.__cause__ or error)
            raise InputError(f"{self.url}: no reply after {self.retries + 1} tries; the last error: {reason}") from None
        except ValueError as error:  # the client does not catch JSON that cannot be read
            raise _UnusableReply(f"not valid JSON ({error})") from None

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


def _chunks(stream: Any) -> Iterator[Any]:
    try:
        with stream:
            yield from stream
    except Exception as error:  # the client does not catch the errors of its HTTP library while it reads a stream
        raise _UnusableReply(str(error) or type(error).__name__) from None


def _reason(error: openai.APIStatusError) -> str:
    """Return the message of an error response, without its wrapping."""
    message = error.body.get("message") if isinstance(error.body, dict) else error.body
    return str(message or error.response.text.strip() or "nothing")


def _content(message: Message) -> str | list[dict[str, Any]]:
    if all(isinstance(part, Text) for part in message.content):
        return message.text
    return [entry for part in message.content for entry in _entries(part)]


def _entries(part: Part) -> list[dict[str, Any]]:
    """Return a part of a message in OpenAI's form. A video becomes announced frames, since few servers take videos."""
    if isinstance(part, Text):
        return [{"type": "text", "text": part.text}]
    if isinstance(part, ImageRef):
        return [{"type": "image_url", "image_url": {"url": _data_url(part)}}]
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
