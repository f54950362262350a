"""Stop strings are never shown, and how text is cut into pieces does not matter."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ivl.inference.text import StopFilter

letters = st.text("abc", max_size=12)


def run(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    filter_ = StopFilter(stop)
    shown = "".join(filter_.push(piece) for piece in pieces) + filter_.flush()
    return shown, filter_.stopped


@given(st.lists(letters, max_size=6), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple))
def test_pieces_do_not_matter_and_stops_are_not_shown(pieces: list[str], stop: tuple[str, ...]) -> None:
    text = "".join(pieces)
    shown, stopped = run(pieces, stop)
    assert (shown, stopped) == run(list(text), stop) == run([text], stop)
    assert stopped == any(s in text for s in stop)
    assert text.startswith(shown) and not any(s in shown for s in stop)
    assert stopped or shown == text


def test_text_is_held_back_only_while_it_may_become_a_stop() -> None:
    filter_ = StopFilter(("\nUser:",))
    assert [filter_.push(piece) for piece in ("Hi", "\nUs", "e", "!", "\n")] == ["Hi", "", "", "\nUse!", ""]
    assert filter_.flush() == "\n" and not filter_.stopped
