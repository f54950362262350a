"""Generators: whatever writes replies to conversations, an engine in this process or an OpenAI-compatible endpoint.

Filters, evaluation and preference know only this protocol.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from ivl.errors import InputError, short
from ivl.types import Conversation, FinishReason, SamplingParams, TextDelta
from ivl.utils.checks import check_choices

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Refused(InputError):
    """The generator refuses this one conversation and may answer others. The caller decides what happens then."""


class Generator(Protocol):
    """Writes one reply at a time."""

    def stream(self, prompt: Conversation, params: SamplingParams) -> Iterator[TextDelta]: ...


class ReplyLike(Protocol):
    """A finished reply."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> FinishReason: ...


@runtime_checkable
class BatchGenerator(Protocol):
    """A generator that answers many conversations at once, faster than one after another."""

    def generate(
        self, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams]
    ) -> Sequence[ReplyLike]: ...


@dataclass(frozen=True)
class PlainReply:
    """A reply of which only the text and its end are known."""

    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How a model is loaded."""

    dtype: Dtype = "auto"
    """Type of the weights; auto is the stored type where the processor computes in it well (bfloat16 needs AVX512-BF16, AMX
    or Arm BF16), else float32."""
    device: str = "auto"
    """cpu, cuda, or auto: the GPU if there is one. Several share the layers of a model that is too large for one, in this
    process: cuda:0,cuda:1."""
    max_tiles: int | None = None
    """Tiles an image may be cut into (more show finer detail and take longer); by default what the checkpoint says."""
    adapter: tuple[str, ...] = ()
    """LoRA adapter to reply with, unmerged: its directory. A server takes several as NAME=DIR, which requests name as model."""
    tensor_parallel: int = 1
    """Processes, each on a GPU of its own, that share the heads, MLPs and vocabulary of one model (tensor parallelism). They
    are started here, or by torchrun over several machines."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("max_tiles", "tensor_parallel"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1000
            if not whole and (name, value) != ("max_tiles", None):
                raise InputError(f"{name} must be a whole number in [1, 1000], got {short(value)}")
        if len(self.adapters) < len(self.adapter):
            raise InputError(f"{' '.join(self.adapter)}: give each adapter a name of its own, as in --adapter a=DIR b=DIR")
        if self.adapter and self.tensor_parallel > 1:
            raise InputError(f"tensor_parallel {self.tensor_parallel} takes no adapter: merge it first (ivl merge)")

    @property
    def is_follower(self) -> bool:
        """Whether this process is not the first of those that a launcher has started for one model."""
        return self.tensor_parallel > 1 and (os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) != "0"

    @property
    def adapters(self) -> dict[str, Path]:
        """The directories of the adapters by name; an empty name stands for the adapter of requests that name none."""
        found = {}
        for each in self.adapter:
            match = None if Path(each).exists() else re.fullmatch(r"([\w.:-]+)=(.+)", each)
            found[match[1] if match else ""] = Path(match[2] if match else each)
        return found

    def with_one_adapter(self) -> LoadConfig:
        """Return the options for a command in which every reply is of one adapter, whose name does not matter.

        Raises:
            InputError: if they name several.
        """
        if len(self.adapter) > 1:
            raise InputError(f"one adapter at a time, got {', '.join(self.adapter)}; `ivl serve` takes several")
        return replace(self, adapter=tuple(map(str, self.adapters.values())))


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The model that writes replies: either one that runs here, or one behind an endpoint."""

    model: str | None = None
    """Directory or hub id of a model that runs here."""
    url: str | None = None
    """Base URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1."""
    url_model: str | None = None
    """Name of the model at the endpoint."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key."""
    concurrency: int = 8
    """Requests at the endpoint at the same time."""


def connect(config: GeneratorConfig) -> tuple[Generator, str]:
    """Load a model or set up the client of an endpoint.

    Returns:
        The generator, and a name that changes when its replies may change: for a model that runs here, the name has a
        fingerprint of the weights.

    Raises:
        InputError: unless the configuration names either a model, or an endpoint and its model.
    """
    if (config.model is None) == (config.url is None):
        raise InputError("give either --model DIR, or --url ENDPOINT with --url-model NAME")
    if config.model is not None:
        from ivl.checkpoint import resolve
        from ivl.checkpoint.files import fingerprint
        from ivl.generators.local import load_engine

        directory = resolve(config.model)
        return load_engine(directory), f"{config.model} {fingerprint(directory)}"
    if config.url is None or not config.url_model:
        raise InputError("--url needs --url-model, the name of the model at the endpoint")
    try:
        from ivl.generators.remote import RemoteGenerator
    except ImportError as error:
        raise InputError(f'an endpoint needs the openai client: pip install "ivl[eval]" ({error})') from error
    key = os.environ.get(config.key_variable)
    generator = RemoteGenerator(config.url, model=config.url_model, api_key=key, concurrency=config.concurrency)
    return generator, f"{config.url} {config.url_model}"


def replies_of(
    generator: Generator, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams]
) -> Sequence[ReplyLike]:
    """Return the reply to each conversation, in order; all at once if the generator can.

    Args:
        params: One for all conversations, or one per conversation.

    Raises:
        InputError: if the generator gives another number of replies, or one without text; and whatever the generator raises.
    """
    if not isinstance(generator, BatchGenerator):
        params = [params] * len(conversations) if isinstance(params, SamplingParams) else params
        return [join_deltas(generator.stream(*question)) for question in zip(conversations, params, strict=True)]
    replies = generator.generate(conversations, params)
    if not isinstance(replies, Sequence) or len(replies) != len(conversations):
        raise InputError(f"the generator must give {len(conversations)} replies, got {short(replies)}")
    for reply in replies:
        _text(reply)
    return replies


def answers_of(
    generator: Generator, conversations: Sequence[Conversation], params: SamplingParams | Sequence[SamplingParams]
) -> list[str]:
    """Return the texts of `replies_of`."""
    return [reply.text for reply in replies_of(generator, conversations, params)]


def join_deltas(deltas: Iterator[TextDelta]) -> PlainReply:
    """Return a whole reply from its deltas."""
    texts: list[str] = []
    reason: FinishReason = "stop"
    for delta in deltas:
        texts.append(_text(delta))
        reason = delta.finish_reason or reason
    return PlainReply("".join(texts), reason)


def _text(reply: object) -> str:
    text = getattr(reply, "text", None)
    if not isinstance(text, str):
        raise InputError(f"the generator gave a reply without text: {short(reply)}")
    return text
