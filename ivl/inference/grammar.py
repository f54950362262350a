"""Structured output: the tokens that may come next so that the reply follows a grammar (llguidance)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ivl.errors import InputError
from ivl.inference.text import TokenizerLike
from ivl.types import FinishReason, Grammar
from ivl.utils.grammars import TokenTable, build_vocabulary, compile_source, killable_trial, read_source
from ivl.utils.killable import CallStopped
from ivl.utils.machine import return_freed_memory

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_ERROR_CHARS = 400
"""Characters of llguidance's errors that are repeated: they quote the schema."""
MAX_REMEMBERED, MIN_COUNTED = 20_000, 300
"""Characters of the grammars that an engine remembers, and characters that each counts for at least. The newest is remembered
whatever its length. Compiled, a character takes up to 1.7 kB, in regular expressions."""
USUAL_SECONDS, EXTRA_SECONDS = 0.02, 1.0
"""Processor time of a token, and the time beyond it that the tokens of one reply may take in all."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary, which is read with the first grammar, and remembers them. Safe in any thread."""

    def __init__(self, tokenizer: TokenizerLike, *, vocab_size: int, eos: frozenset[int]) -> None:
        self.tokenizer, self.vocab_size, self.eos = tokenizer, vocab_size, eos
        self._compiled: dict[Grammar, LLMatcher | str] = {}

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """Return a matcher at the beginning of a reply.

        Raises:
            InputError: if no reply can follow the grammar, it is too large, or llguidance is not installed.
        """
        if (compiled := self._compiled.get(grammar)) is None:
            try:
                compiled = self._compile(grammar)
            except ImportError as error:
                raise InputError('constrained replies need llguidance: pip install "ivl[guide]"') from error
            self._compiled[grammar] = compiled
            known = [*self._compiled]
            while len(known) > 1 and sum(max(MIN_COUNTED, len(each.value)) for each in known) > MAX_REMEMBERED:
                self._compiled.pop(known.pop(0), None)
            return_freed_memory()
        if isinstance(compiled, str):
            raise InputError(f"the {grammar.kind} cannot be {compiled}")
        # A grammar that has failed once is compiled anew, for copies share states that llguidance counts.
        return GrammarMatcher(compiled.deep_copy(), self.vocab_size, lambda: self._compiled.pop(grammar, None))

    def _compile(self, grammar: Grammar) -> LLMatcher | str:
        """Return a matcher, or why there is none."""
        try:
            source = read_source(grammar)
        except (ValueError, TypeError) as error:
            return f"read: {' '.join(str(error)[:MAX_ERROR_CHARS].split())}"
        vocabulary, trial = self._vocabulary
        try:
            trial(source)
        except CallStopped as error:
            return f"followed: compiling it takes {error}; make it smaller or simpler"
        except Exception:
            return "followed: llguidance fails on it; make it smaller or simpler"
        matcher = compile_source(vocabulary, source)
        if not matcher.is_error():
            return matcher
        # One line of several, without the listing of the source, which for calls of tools is ours.
        message = " ".join(re.split(r"\n<state>|\n\s*\d+ \| ", matcher.get_error())[0].split())
        reason = "there is no text that it allows" if message.startswith("NoExtension") else message[:MAX_ERROR_CHARS]
        return f"followed: {reason}"

    @cached_property
    def _vocabulary(self) -> tuple[Any, Callable[[str], None]]:
        unused = set(self.tokenizer.unused(self.vocab_size))
        tokens = [b"" if i in unused else self.tokenizer.token_bytes(i) for i in range(self.vocab_size)]
        special = [i for i in range(self.vocab_size) if self.tokenizer.is_control(i)]
        table = TokenTable(tokens, special, sorted(self.eos))
        return build_vocabulary(table, self.tokenizer.encode), killable_trial(table)


class GrammarMatcher:
    """Follows one reply through its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, on_error: Callable[[], object]) -> None:
        self.matcher, self.vocab_size, self.on_error = matcher, vocab_size, on_error
        self.started = self.extra_seconds = 0.0

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [V]: end tokens where the reply may end, or cannot go on."""
        self.started = time.thread_time()
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self.vocab_size].astype(bool))

    def advance(self, token: int) -> FinishReason | None:
        """Take the sampled token and return why the reply ends here, if it does.

        "stop": the reply is complete and nothing may follow. "length": the grammar takes more time or memory than it may.
        """
        self.matcher.consume_token(token)
        self.extra_seconds += max(0.0, time.thread_time() - self.started - USUAL_SECONDS)
        if self.matcher.is_error() or self.extra_seconds > EXTRA_SECONDS:
            self.on_error()
            return "length"
        return "stop" if self.matcher.is_stopped() else None
