"""The nouns of ivl. Every function takes one of these and returns the next.

Training:   Record -> Sample -> Pack -> Batch -> Loss.
Inference:  messages -> Prompt -> TextDelta.

Shape suffixes: T tokens, S sequences (SSC: side of a tile), L padded length, G tiles, R placeholder runs (one per tile shown),
P patches, U vision tokens per tile, N query heads, K key/value heads, H head size, D width, V vocabulary, C channels, X any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, get_args

from ivl.errors import InputError, short

if TYPE_CHECKING:
    import torch
    from PIL import Image

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]
Averaging = Literal["token", "sample", "square"]
"""Loss weight of a token in a sequence of n trained tokens: 1, 1/n or 1/sqrt(n) (arXiv:2412.05271, section 3.4)."""
FramesBy = Literal["index", "time"]
"""Frames are spread over their numbers, as the reference has it, or over time: a variable frame rate tells them apart."""
IGNORE = -100
"""Label of a token that is not trained."""


@dataclass(frozen=True)
class Text:
    """A piece of text in a message."""

    text: str


@dataclass(frozen=True)
class ImageRef:
    """An image by path, by encoded bytes (PNG, JPEG, ...) or as a PIL image. Equal refs in one record share their tiles."""

    source: str | bytes | Image.Image
    max_tiles: int | None = None
    """Tile cap of this image; None takes the processor's budget rule."""


@dataclass(frozen=True)
class VideoRef:
    """A video file, animated GIF or folder of frames by path, or an encoded video or GIF; clip is (start, end) in seconds."""

    source: str | bytes
    num_frames: int | None = None
    clip: tuple[float, float] | None = None
    frames_by: FramesBy = "index"


VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
"""A file of such a name is a video."""

Part = Text | ImageRef | VideoRef


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: tuple[Part, ...]

    def __post_init__(self) -> None:
        parts = self.content if isinstance(self.content, tuple | list) else (None,)
        if not all(isinstance(part, Part) and isinstance(getattr(part, "text", ""), str) for part in parts):
            raise InputError(f"a message's content must be a tuple of Text, ImageRef and VideoRef, got {short(self.content)}")

    @property
    def text(self) -> str:
        """The text of the turn, without its media."""
        return "".join(part.text for part in self.content if isinstance(part, Text))


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Record:
    """One row of a data set. Usually one conversation; several conversations about the same media share its tiles
    (many questions of one image; chosen and rejected of a preference pair), yet never see each other."""

    id: str
    conversations: tuple[Conversation, ...]
    source: str
    """Where it came from, as `file:line`; every error about the record starts with it."""
    dataset: str = ""
    is_pair: bool = False
    """Two conversations that differ in their last turn: a chosen and a rejected reply."""


@dataclass(frozen=True)
class Sample:
    """What must stay in one pack: one or more sequences and the tiles they show.

    tokens_T, labels_T: int64, labels already shifted (labels_T[t] is the token after t, or IGNORE).
    weights_T: float32 loss weights, 0 where the label is IGNORE.
    tiles_GSSC: uint8 RGB [num_tiles, size, size, 3]. tile_ids_R: int64, tile shown by each placeholder run.
    """

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    weights_T: torch.Tensor
    seq_lens: tuple[int, ...]
    tiles_GSSC: torch.Tensor
    tile_ids_R: torch.Tensor
    id: str = ""
    source: str = ""
    dataset: str = ""
    cut: str = ""
    """For a sample whose last turns were cut to fit the limits: its sizes before and after. Empty for a whole sample."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return len(self.tokens_T)

    @property
    def num_tiles(self) -> int:
        """Distinct tiles."""
        return len(self.tiles_GSSC)


Pack = tuple[Sample, ...]


@dataclass(frozen=True)
class Layout:
    """Where sequences lie on the token axis: sequence s has new_lens[s] tokens there and past_lens[s] in the cache."""

    new_lens: tuple[int, ...]
    past_lens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.new_lens) != len(self.past_lens):
            raise ValueError(f"{len(self.new_lens)} new lengths but {len(self.past_lens)} past lengths")
        if any(n < 1 for n in self.new_lens) or any(p < 0 for p in self.past_lens):
            raise ValueError(f"new lengths must be >= 1 and past lengths >= 0, got {self.new_lens} and {self.past_lens}")

    @classmethod
    def packed(cls, lens: tuple[int, ...]) -> Layout:
        """Whole sequences one after another, nothing in the cache."""
        return cls(tuple(lens), (0,) * len(lens))

    def part(self, first: int, stop: int) -> Layout:
        """The sequences from first up to stop, on a token axis of their own."""
        return Layout(self.new_lens[first:stop], self.past_lens[first:stop])

    @cached_property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(self.new_lens)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index on the token axis of the first new token of each sequence."""
        return tuple(accumulate(self.new_lens, initial=0))[:-1]

    @cached_property
    def total_lens(self) -> tuple[int, ...]:
        """Tokens of each sequence, cached ones included."""
        return tuple(n + p for n, p in zip(self.new_lens, self.past_lens, strict=True))


@dataclass(frozen=True)
class Batch:
    """A collated pack. Run r of vision placeholders shows tiles_GSSC[tile_ids_R[r]].

    It stays on the CPU, where its values can be looked at while a card computes; an objective sends the card what it needs.
    """

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    weights_T: torch.Tensor
    tiles_GSSC: torch.Tensor
    tile_ids_R: torch.Tensor
    layout: Layout
    ids: tuple[str, ...] = ()
    """Sample ids in order, for the log and for errors."""
    sources: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    sample_lens: tuple[int, ...] = ()
    """Tokens of each sample, in order."""


@dataclass(frozen=True)
class Loss:
    """A summed loss and the weight to divide it by. The loop divides once per step, by the global weight.

    `weight` lies on the CPU, where the batch is; the rest is read once a step, from wherever the model is.
    """

    total: torch.Tensor
    weight: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])
    """Figures to log, each a vector (sum, count); the loop logs their quotient over the whole step."""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation that ends where the assistant's reply begins."""

    tokens_T: torch.Tensor
    tiles_GSSC: torch.Tensor
    tile_ids_R: torch.Tensor


GrammarKind = Literal["json", "json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True)
class Grammar:
    """The form that a reply must have from its first character to its last (structured output)."""

    kind: GrammarKind
    """json: any JSON object. json_schema, regex, grammar (Lark or GBNF), choice: as `value` says."""
    value: str = ""
    """The schema, the pattern, the grammar, or a JSON list of the choices."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind) or not isinstance(self.value, str):
            raise InputError(f"a grammar is one of {', '.join(get_args(GrammarKind))}, and a text, got {short(vars(self))}")
        if (self.kind == "json") == bool(self.value):
            raise InputError(f"a grammar of kind {self.kind} {'takes no' if self.value else 'needs a'} value")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. The defaults are greedy decoding."""

    max_new_tokens: int = 1024
    """Upper limit of generated tokens."""
    temperature: float = 0.0
    """0 is greedy; from 0.0001 on samples."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this, in [0.000001, 1]."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the most likely one, in [0, 1]; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative scores of tokens of prompt and reply; 1 is off."""
    presence_penalty: float = 0.0
    """Taken off the scores of tokens that the reply has; 0 is off."""
    frequency_penalty: float = 0.0
    """Taken off the scores of tokens of the reply for every time they came; 0 is off."""
    stop: tuple[str, ...] = ()
    """Generation ends before any of these strings."""
    seed: int | None = None
    """Makes sampling repeatable, whatever else is in the batch."""
    logprobs: int | None = None
    """Report the log-probability of every token, and of so many of the most likely ones; None reports nothing. They are the
    model's own, before penalties, temperature and guide."""
    ignore_eos: bool = False
    """Go on after end tokens, to max_new_tokens: for measurements."""
    guide: Grammar | None = None
    """The form that the reply must have."""

    def __post_init__(self) -> None:
        for name, (kind, low, high) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
            if not number and (value is not None or name not in ("seed", "logprobs")):
                raise InputError(f"{name} must be {_KINDS[kind]} in [{low}, {high}], got {short(value)}")
            if value is not None and type(value) not in (int, float):  # neither torch nor JSON takes numbers of numpy
                object.__setattr__(self, name, int(value) if kind is Integral else float(value))
        if 0 < self.temperature < 1e-4:
            raise InputError(f"temperature must be 0 (greedy) or at least 0.0001, got {self.temperature}")
        if not isinstance(self.stop, tuple | list) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop must be a tuple of texts, none of them empty, got {short(self.stop)}")
        if not isinstance(self.ignore_eos, bool) or not isinstance(self.guide, Grammar | None):
            raise InputError(f"ignore_eos is a bool and guide a Grammar, got {short(self.ignore_eos)} and {short(self.guide)}")


_RANGES: dict[str, tuple[type, float, float]] = {
    "max_new_tokens": (Integral, 1, 2**31 - 1), "temperature": (Real, 0, 1000), "top_p": (Real, 1e-6, 1),
    "top_k": (Integral, 0, 2**31 - 1), "min_p": (Real, 0, 1), "repetition_penalty": (Real, 0.01, 100),
    "presence_penalty": (Real, -2, 2), "frequency_penalty": (Real, -2, 2), "seed": (Integral, -(2**63), 2**64 - 1),
    "logprobs": (Integral, 0, 2**31 - 1),
}  # fmt: skip
_KINDS = {Integral: "a whole number", Real: "a number"}


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a sampled token, and (token, log-probability) of the most likely ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """A piece of generated text. The last one of a reply carries finish_reason."""

    text: str
    token: int | None = None
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
