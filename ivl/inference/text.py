"""Turns sampled tokens into text that will not change: whole characters, and never a part of a stop string."""

from __future__ import annotations

from typing import Protocol


class Detokenizer(Protocol):
    """Turns tokens into text one by one, as `Tokenizer.stream()` returns it."""

    def push(self, token: int, /) -> str: ...  # noqa: D102
    def flush(self) -> str: ...  # noqa: D102


class TokenizerLike(Protocol):
    """What inference needs of a tokenizer."""

    def __len__(self) -> int: ...
    def stream(self) -> Detokenizer: ...  # noqa: D102
    def encode(self, text: str) -> list[int]: ...  # noqa: D102
    def token_bytes(self, token_id: int) -> bytes: ...  # noqa: D102
    def is_control(self, token_id: int) -> bool: ...  # noqa: D102


class StopFilter:
    """Passes text through until a stop string is complete, and holds back text that may become one.

    The stop string that is complete first wins, and of those the longest, so the outcome does not depend on how the text
    was cut into pieces.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = tuple(s for s in stop if s)
        self.held: str = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that is certain now. At a stop string set `stopped`, and drop it and what follows."""
        if not self.stop or self.stopped:
            return "" if self.stopped else text
        text = self.held + text
        ends = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)[1]]
        keep = max(_overlap(text, s) for s in self.stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text that was held back, at the end of the reply."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of text that begins stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """Takes the tokens of one reply and returns text that is certain."""

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self.detokenizer = detokenizer
        self.filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self.filter.stopped

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now."""
        return self.filter.push(self.detokenizer.push(token))

    def flush(self) -> str:
        """Return the rest of the text, once no token will follow."""
        return self.filter.push(self.detokenizer.flush()) + self.filter.flush()
