"""Structured output: the tokens that may come next so that the reply follows a grammar (llguidance)."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ivl.errors import InputError
from ivl.inference.text import TokenizerLike
from ivl.types import FinishReason, Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_ERROR_CHARS = 400
"""Characters of llguidance's errors that are repeated: they quote the schema."""
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n]{1,32}"}
"""White space between the parts of JSON; without a limit a model may write nothing else."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary, which is read at the first. Safe in any thread."""

    def __init__(self, tokenizer: TokenizerLike, *, vocab_size: int, eos: frozenset[int]) -> None:
        self.tokenizer, self.vocab_size, self.eos = tokenizer, vocab_size, eos
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """Return a matcher at the beginning of a reply.

        Raises:
            InputError: if no reply can follow the grammar, or llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise InputError('constrained replies need llguidance: pip install "ivl[guide]"') from error
        try:
            source = _to_llguidance(grammar)
        except (ValueError, TypeError) as error:
            raise InputError(f"the {grammar.kind} cannot be read: {str(error)[:MAX_ERROR_CHARS]}") from error
        matcher = llguidance.LLMatcher(self._read_vocabulary(), source, log_level=0)
        if problem := _problem(matcher):
            raise InputError(f"the {grammar.kind} cannot be followed: {problem}")
        return GrammarMatcher(matcher, self.vocab_size)

    def _read_vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._vocabulary is None:
                wrapper = TokenizerWrapper(_WrappedTokenizer(self.tokenizer, self.eos))
                self._vocabulary = LLTokenizer(wrapper, n_vocab=self.vocab_size, eos_token=sorted(self.eos))
            return self._vocabulary


class GrammarMatcher:
    """Follows one reply through its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self.matcher, self.vocab_size = matcher, vocab_size

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [V]: end tokens where the reply may end, or cannot go on."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self.vocab_size].astype(bool))

    def advance(self, token: int) -> FinishReason | None:
        """Take the sampled token and return why the reply ends here, if it does.

        "stop": the reply is complete and nothing may follow. "length": the match exceeds llguidance's limits on complexity.
        """
        self.matcher.consume_token(token)
        if self.matcher.is_error():
            return "length"
        return "stop" if self.matcher.is_stopped() else None


class _WrappedTokenizer:
    """A tokenizer with the attributes that llguidance reads."""

    def __init__(self, tokenizer: TokenizerLike, eos: frozenset[int]) -> None:
        self.eos_token_id = min(eos)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(len(tokenizer))]
        self.special_token_ids = [i for i in range(len(tokenizer)) if tokenizer.is_control(i)]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _problem(matcher: LLMatcher) -> str:
    """Return why no reply can begin; empty if one can."""
    if not matcher.is_error():
        matcher.compute_bitmask()
    message = matcher.get_error().split("\n<state>")[0].strip() if matcher.is_error() else ""
    return "there is no text that it allows" if message.startswith("NoExtension") else message[:MAX_ERROR_CHARS]


def _to_llguidance(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    if grammar.kind == "json":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON_OPTIONS)
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.value, overrides=JSON_OPTIONS)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.value)
    if grammar.kind == "grammar":
        return LLMatcher.grammar_from_lark(grammar.value)
    choices = json.loads(grammar.value)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("choices are a JSON list of texts, none of them empty")
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_lark_string, choices)))


def _lark_string(text: str) -> str:
    """Return a text as a Lark string. Lark does not take DEL, which JSON leaves unescaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
