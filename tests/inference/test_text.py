"""Stop strings are never shown, and how text is cut into pieces does not matter."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from ivl.inference.text import TextStream

letters = st.text("abc", max_size=12)


class Pieces:
    """A detokenizer whose token n is piece n."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def push(self, token: int, /) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return ""


def run(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    stream = TextStream(Pieces(pieces), stop)
    shown = "".join(map(stream.push, range(len(pieces)))) + stream.flush()
    return shown, stream.stopped


@given(st.lists(letters, max_size=6), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple))
def test_pieces_do_not_matter_and_stops_are_not_shown(pieces: list[str], stop: tuple[str, ...]) -> None:
    text = "".join(pieces)
    shown, stopped = run(pieces, stop)
    assert (shown, stopped) == run(list(text), stop) == run([text], stop)
    assert stopped == any(s in text for s in stop)
    assert text.startswith(shown) and not any(s in shown for s in stop)
    assert stopped or shown == text


def test_text_is_held_back_only_while_it_may_become_a_stop() -> None:
    stream = TextStream(Pieces(["Hi", "\nUs", "e", "!", "\n"]), ("\nUser:",))
    assert [stream.push(token) for token in range(5)] == ["Hi", "", "", "\nUse!", ""]
    assert stream.flush() == "\n" and not stream.stopped
