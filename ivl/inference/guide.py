"""Constrained decoding: which tokens may come next so that the reply is JSON, one of some choices, ... (llguidance)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ivl.errors import InputError
from ivl.types import FinishReason, Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_WORDS = 400
"""Characters of llguidance's own words that an error repeats: they quote the schema."""
JSON_OPTIONS = {"whitespace_pattern": r"[ \n]{1,32}"}
"""Blanks between the parts of JSON; without a limit a model may write nothing else."""


MOST_TRIES = 200
"""Parts of a schema that are looked at for the one at fault."""
NAMED, LISTED = ("properties", "patternProperties", "$defs", "definitions"), ("anyOf", "oneOf", "allOf", "prefixItems")
"""Keywords of JSON Schema whose value holds schemas by name, or a list of them."""


class Words(Protocol):
    """What guides need of a Tokenizer."""

    def __len__(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def is_control(self, token_id: int) -> bool: ...


class Guides:
    """Matchers over one vocabulary, which is read when the first is asked for. Safe in any thread."""

    def __init__(self, tokenizer: Words, *, vocab_size: int, eos: frozenset[int]) -> None:
        self.tokenizer, self.vocab_size, self.eos = tokenizer, vocab_size, eos
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    def matcher(self, guide: Grammar) -> Matcher:
        """A fresh matcher.

        Raises:
            InputError: if the guide cannot be followed, or llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise InputError('constrained replies need llguidance: pip install "ivl[guide]"') from error
        try:
            grammar = _grammar(guide)
        except (ValueError, TypeError) as error:
            raise InputError(f"the {guide.kind} cannot be read: {str(error)[:MAX_WORDS]}") from error
        found = llguidance.LLMatcher(self._read(), grammar, log_level=0)
        if words := _trouble(found):
            place = f" at {self._place(guide)}" if guide.kind == "json_schema" else ""
            raise InputError(f"the {guide.kind} cannot be followed{place}: {words}")
        return Matcher(found, self.vocab_size)

    def _place(self, guide: Grammar) -> str:
        """A JSON pointer to the smallest part of a schema that cannot be followed by itself; `#` is the whole."""
        from llguidance import LLMatcher

        schema = part = json.loads(guide.value)
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        pointer, tries = "#", 0
        while True:
            for where, child in _parts(part):
                grammar = _grammar(Grammar("json_schema", json.dumps(shared | child)))
                if _trouble(LLMatcher(self._read(), grammar, log_level=0)):
                    pointer, part = f"{pointer}/{where}", child
                    break
                if (tries := tries + 1) == MOST_TRIES:
                    return pointer
            else:
                return pointer

    def _read(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._vocabulary is None:
                wrapper = TokenizerWrapper(_Vocabulary(self.tokenizer, self.eos))
                self._vocabulary = LLTokenizer(wrapper, n_vocab=self.vocab_size, eos_token=sorted(self.eos))
            return self._vocabulary


class Matcher:
    """How far one reply has come."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self.matcher, self.vocab_size = matcher, vocab_size

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next, bool [V]; end tokens where the reply may end, or cannot go on."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self.vocab_size].astype(bool))

    def advance(self, token: int) -> FinishReason | None:
        """Take the chosen token. "stop": the reply is complete, nothing may follow. "length": a limit of llguidance's on the
        complexity of what is being matched; the reply is cut there."""
        self.matcher.consume_token(token)
        if self.matcher.is_error():
            return "length"
        return "stop" if self.matcher.is_stopped() else None


class _Vocabulary:
    """The tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Words, eos: frozenset[int]) -> None:
        self.eos_token_id = min(eos)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(len(tokenizer))]
        self.special_token_ids = [i for i in range(len(tokenizer)) if tokenizer.is_control(i)]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _trouble(matcher: LLMatcher) -> str:
    """Why no reply can begin, empty if one can."""
    if not matcher.is_error():
        matcher.compute_bitmask()
    words = matcher.get_error().split("\n<state>")[0].strip() if matcher.is_error() else ""
    return "there is no text that it allows" if words.startswith("NoExtension") else words[:MAX_WORDS]


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Schemas within a schema, with the end of their pointer."""
    for key, value in schema.items():
        inner = {key: value}
        if key in NAMED and isinstance(value, dict):
            inner = {f"{key}/{name}": each for name, each in value.items()}
        elif key in LISTED and isinstance(value, list):
            inner = {f"{key}/{number}": each for number, each in enumerate(value)}
        elif key not in ("items", "additionalProperties"):
            continue
        yield from ((where, each) for where, each in inner.items() if isinstance(each, dict))


def _grammar(guide: Grammar) -> str:
    from llguidance import LLMatcher

    if guide.kind == "json":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    if guide.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(guide.value, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    if guide.kind == "regex":
        return LLMatcher.grammar_from_regex(guide.value)
    if guide.kind == "grammar":
        return LLMatcher.grammar_from_lark(guide.value)
    choices = json.loads(guide.value)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("choices are a JSON list of texts, none of them empty")
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, choices)))


def _quoted(text: str) -> str:
    """A text as Lark writes it; DEL, which JSON leaves alone, may not stand there."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
