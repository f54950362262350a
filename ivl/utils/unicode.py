"""Unicode's normal forms, in time that grows with the length of a text."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Literal

MOST_MARKS = 30
"""Accents and other marks in a row; Unicode's stream-safe format (Annex 15) allows as many."""


def normal_form(form: Literal["NFC", "NFKC"], text: str) -> str:
    """Return a text in a normal form. Further marks of a row of more than MOST_MARKS are dropped.

    Python sorts the marks of a row in quadratic time: a million of them would take hours.
    """
    return unicodedata.normalize(form, text if text.isascii() else _long_rows().sub(r"\1", text))


@cache
def _long_rows() -> re.Pattern[str]:
    marks = "".join(char for char in map(chr, range(0x300, 0x1F000)) if unicodedata.combining(char))
    return re.compile(f"([{marks}]{{{MOST_MARKS}}})[{marks}]+")
