"""A Generator that is somebody else's server: any OpenAI-compatible chat endpoint. Standard library only."""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import math
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from ivl.errors import InputError
from ivl.generators import PlainReply, Refused
from ivl.processing.image import load_image
from ivl.processing.video import load_frames
from ivl.types import Conversation, FinishReason, ImageRef, Message, Part, SamplingParams, Text, TextDelta

MAX_WAIT = 60.0
"""Longest pause before a retry, in seconds, whatever the server asks for."""
NUM_FRAMES = 8
BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Answers that another try may change."""
REFUSING = frozenset({400, 413, 422})
"""Answers about this one conversation: too long, or against the server's rules."""
DEFAULTS = SamplingParams()
SENT = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "seed")
"""Settings by the names that servers know."""
LOCAL = ("guide", "logprobs", "ignore_eos")
"""Settings that servers take in too many forms, or not at all."""
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


class _Busy(Exception):
    """Worth another try, after `wait` seconds if the server said so."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key must not follow a redirect to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class RemoteGenerator:
    """`base_url` is what the clients of such servers call so, usually ending in /v1.

    timeout: seconds without a byte before a try counts as failed. retries: tries after the first, with growing pauses or
    those the server asks for. concurrency: requests of `generate` in flight at once. May be used from many threads.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        api_key: str | None = None,
        timeout: float = 120,
        retries: int = 5,
        concurrency: int = 8,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"endpoint {base_url!r} must start with http:// or https://, such as http://localhost:8000/v1")
        if not model:
            raise InputError(f"{base_url}: name the model to ask")
        if timeout <= 0 or retries < 0 or concurrency < 1:
            raise InputError(f"need timeout > 0, retries >= 0 and concurrency >= 1, got {timeout}, {retries} and {concurrency}")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.timeout, self.retries, self.concurrency = model, timeout, retries, concurrency
        self._headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._limit_key = "max_tokens"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def generate(
        self, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[PlainReply]:
        """The reply to each conversation, in order, `concurrency` at a time.

        Raises:
            Refused: if the server will not answer one of them.
            InputError: naming the endpoint and what it said, after the last retry.
        """
        each = [params] * len(conversations) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(conversations):
            raise ValueError(f"{len(conversations)} conversations but {len(each)} sampling parameters")
        if len(each) < 2:
            return [self._reply(c, p) for c, p in zip(conversations, each, strict=True)]
        pool = ThreadPoolExecutor(min(self.concurrency, len(each)))
        try:
            return list(pool.map(self._reply, conversations, each))
        finally:
            pool.shutdown(cancel_futures=True)

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]:
        """The reply piece by piece; the last delta carries finish_reason. What was said cannot be taken back, so that only
        a stream that fails before its first piece is tried again.

        Raises:
            Refused, InputError: as `generate`.
        """
        body = self._body(prompt, params) | {"stream": True}
        for attempt in range(self.retries + 1):
            started = False
            try:
                for delta in self._events(body):
                    started = True
                    yield delta
                return
            except _Busy as error:
                if started:
                    raise InputError(f"{self.url}: the stream broke off: {error}") from None
                self._pause(attempt, error)

    def _reply(self, prompt: Conversation, params: SamplingParams) -> PlainReply:
        body = self._body(prompt, params)
        for attempt in range(self.retries + 1):
            try:
                with closing(self._post(body)) as response:
                    choice = _choice(_json(_read(response)))
                text = (choice.get("message") or {}).get("content")
                if not isinstance(text, str):
                    raise _Busy(f"no text in the reply: {_short(choice)}")
                return PlainReply(text, "length" if choice.get("finish_reason") == "length" else "stop")
            except _Busy as error:
                self._pause(attempt, error)
        raise AssertionError("the last _pause raises")

    def _events(self, body: dict[str, Any]) -> Iterator[TextDelta]:
        """Server-sent events to deltas."""
        finish: FinishReason | None = None
        with closing(self._post(body)) as response:
            for line in _lines(response):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    break
                event = _json(data)
                if isinstance(event, dict) and event.get("choices") == []:
                    continue  # usage figures
                choice = _choice(event)
                text = (choice.get("delta") or {}).get("content")
                if text:
                    yield TextDelta(text)
                if choice.get("finish_reason"):
                    finish = "length" if choice["finish_reason"] == "length" else "stop"
        if finish is None:
            raise _Busy("the stream ended without a finish_reason")
        yield TextDelta("", finish_reason=finish)

    def _post(self, body: dict[str, Any]) -> Any:
        limit = body["max_tokens"]
        sent = {key: value for key, value in body.items() if key != "max_tokens"} | {self._limit_key: limit}
        request = urllib.request.Request(self.url, json.dumps(sent).encode(), self._headers)
        try:
            return self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                said = _short(_message(_read(error)))
            problem = f"status {error.code}: {said}"
            if error.code in BUSY:
                raise _Busy(problem, _retry_after(error.headers.get("Retry-After"))) from None
            if error.code == 400 and "max_completion_tokens" in said and self._limit_key == "max_tokens":
                self._limit_key = "max_completion_tokens"  # some models know the limit under this name only
                return self._post(body)
            kind = Refused if error.code in REFUSING else InputError
            raise kind(f"{self.url}: {problem}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Busy(f"{getattr(error, 'reason', None) or error or type(error).__name__}") from None

    def _pause(self, attempt: int, error: _Busy) -> None:
        if attempt == self.retries:
            raise InputError(f"{self.url}: no reply after {attempt + 1} tries; the last said: {error}") from None
        wait = error.wait if error.wait is not None else 2**attempt * random.uniform(0.25, 0.75)
        time.sleep(min(wait, MAX_WAIT))

    def _body(self, prompt: Conversation, params: SamplingParams) -> dict[str, Any]:
        """Settings at their defaults are not sent: not every server knows top_k, seed or repetition_penalty.

        Raises:
            InputError: for settings that only a model run here follows.
        """
        if local := [name for name in LOCAL if getattr(params, name) != getattr(DEFAULTS, name)]:
            raise InputError(f"{self.url}: {', '.join(local)} cannot be asked of an endpoint; run the model here")
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": message.role, "content": _content(message)} for message in prompt],
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
        }
        for name in SENT:
            if getattr(params, name) != getattr(DEFAULTS, name):
                body[name] = getattr(params, name)
        return body


def _content(message: Message) -> str | list[dict[str, Any]]:
    if all(isinstance(part, Text) for part in message.content):
        return message.text
    return [entry for part in message.content for entry in _parts(part)]


def _parts(part: Part) -> list[dict[str, Any]]:
    """A video is sent as frames, each announced, since few servers take video."""
    if isinstance(part, Text):
        return [{"type": "text", "text": part.text}]
    if isinstance(part, ImageRef):
        return [_image(part)]
    frames = load_frames(part, part.num_frames or NUM_FRAMES)
    pairs = ((_text(f"Frame-{n}: "), _image(ImageRef(frame)), _text("\n")) for n, frame in enumerate(frames, 1))
    return [entry for entries in pairs for entry in entries]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(ref: ImageRef) -> dict[str, Any]:
    """A data URL: the file as it is if it is of a common format, else as PNG."""
    data, mime = _encoded(ref)
    return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"}}


def _encoded(ref: ImageRef) -> tuple[bytes, str]:
    image = load_image(ref)  # checks the size, and that it is an image at all
    if not isinstance(ref.source, Image.Image):
        data = Path(ref.source).read_bytes() if isinstance(ref.source, str) else ref.source
        with Image.open(io.BytesIO(data)) as opened:
            mime = MIME.get(opened.format or "")
        if mime:
            return data, mime
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue(), "image/png"


def _read(response: Any) -> bytes:
    try:
        return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise _Busy(f"the reply broke off ({error})") from None


def _lines(response: Any) -> Iterator[bytes]:
    lines = iter(response)
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except (OSError, http.client.HTTPException) as error:
            raise _Busy(f"the reply broke off ({error})") from None
        yield line


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise _Busy(f"not valid JSON: {_short(data.decode(errors='replace'))}") from None


def _choice(reply: Any) -> dict[str, Any]:
    """The first choice; an error that a server reports under status 200 counts as a failed try."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _Busy(f"no choices in the reply: {_short(reply)}")
    return choices[0]


def _message(body: bytes) -> str:
    """What an error page says, without its wrapping."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        return body.decode(errors="replace").strip() or "nothing"


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or an HTTP date; None if the header is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _short(value: Any, limit: int = 300) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
