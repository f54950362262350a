"""Unicode's normal forms, in time that grows with the length of a text."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

MOST_MARKS = 30
"""Accents and other marks in a row; Unicode's stream-safe format (Annex 15) allows as many."""


def normal_form(form: Literal["NFC", "NFKC"], text: str) -> str:
    """Return a text in a normal form. Further marks of a row of more than MOST_MARKS are dropped.

    Python sorts the marks of a row in quadratic time: a million of them would take hours.
    """
    if not text.isascii():
        import numpy as np  # here, as scoring alone must import in no time

        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        if np.count_nonzero(_is_mark()[codes]) > MOST_MARKS:  # else no row can be too long
            text = _long_rows().sub(r"\1", text)
    return unicodedata.normalize(form, text)


@cache
def _is_mark() -> np.ndarray:
    """Whether each code point combines with the letter before it."""
    import numpy as np

    found = np.zeros(0x110000, bool)
    found[:0x1F000] = [unicodedata.combining(chr(code)) > 0 for code in range(0x1F000)]  # none lie beyond
    return found


@cache
def _long_rows() -> re.Pattern[str]:
    marks = "".join(map(chr, _is_mark().nonzero()[0]))
    return re.compile(f"([{marks}]{{{MOST_MARKS}}})[{marks}]+")
