"""From tokens to text that is certain: whole characters, and never a part of a stop string."""

from __future__ import annotations

from typing import Protocol


class Decoder(Protocol):
    """Incremental detokeniser, as `Tokenizer.stream()` returns it."""

    def push(self, token: int, /) -> str: ...
    def flush(self) -> str: ...


class StopFilter:
    """Passes text through until a stop string is complete; text that may become one is held back.

    The stop string that is complete first wins, and of those the longest, so the outcome does not depend on
    how the text was cut into pieces.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = tuple(s for s in stop if s)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain now. Sets `stopped` when a stop string was met; it and what follows are dropped."""
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
        """What was held back, at the end of the text."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """Tokens of one reply in, certain text out."""

    def __init__(self, decoder: Decoder, stop: tuple[str, ...]) -> None:
        self.decoder = decoder
        self.filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        return self.filter.stopped

    def push(self, token: int) -> str:
        return self.filter.push(self.decoder.push(token))

    def flush(self) -> str:
        """The rest of the text, once no token will follow."""
        return self.filter.push(self.decoder.flush()) + self.filter.flush()
