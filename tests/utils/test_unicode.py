"""Unicode's normal forms, and letters with more marks than any language has."""

from __future__ import annotations

import unicodedata

from ivl.utils.unicode import MOST_MARKS, normal_form


def test_normal_forms_are_pythons_but_for_long_rows_of_marks() -> None:
    for text in ("abc", "e\u0301 \u1ebf \uac01 \ufb01 \U0001d15e", "a" + "\u0301\u0316" * (MOST_MARKS // 2), "\ud83d"):
        assert normal_form("NFC", text) == unicodedata.normalize("NFC", text)
        assert normal_form("NFKC", text) == unicodedata.normalize("NFKC", text)
    long = "a" + "\u0301\u0316" * 1_000_000 + "e\u0301"  # sorting so many would take days
    assert normal_form("NFC", long) == unicodedata.normalize("NFC", "a" + "\u0301\u0316" * (MOST_MARKS // 2)) + "\u00e9"
