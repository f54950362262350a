"""Turns sampled tokens into text that will not change: whole characters, and never a part of a stop string."""

from __future__ import annotations

from typing import Protocol


class Detokenizer(Protocol):
    """Turns tokens into text one by one, as `Tokenizer.stream()` returns it."""

    def push(self, token: int, /) -> str: ...  # noqa: D102
    def flush(self) -> str: ...  # noqa: D102


class TokenizerLike(Protocol):
    """What inference needs of a tokenizer."""

    def stream(self) -> Detokenizer: ...  # noqa: D102
    def encode(self, text: str) -> list[int]: ...  # noqa: D102
    def token_bytes(self, token_id: int) -> bytes: ...  # noqa: D102
    def is_control(self, token_id: int) -> bool: ...  # noqa: D102
    def unused(self, vocab_size: int) -> list[int]: ...  # noqa: D102


class TextStream:
    """Takes the tokens of one reply and returns text that is certain: what may become a stop string is held back.

    The stop string that is complete first wins, and of those the longest, so the outcome does not depend on how the text
    was cut into pieces.
    """

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self.detokenizer = detokenizer
        self.stop = tuple(s for s in stop if s)
        self.held = ""
        self.stopped = False
        """Whether a stop string was met."""

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now, which ends before a stop string."""
        return self._pass(self.detokenizer.push(token))

    def flush(self) -> str:
        """Return the rest of the text, once no token will follow."""
        text = self._pass(self.detokenizer.flush()) + self.held
        self.held = ""
        return text

    def _pass(self, text: str) -> str:
        if not self.stop or self.stopped:
            return "" if self.stopped else text
        text = self.held + text
        ends = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)[1]]
        keep = max(overlap(text, s) for s in self.stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
