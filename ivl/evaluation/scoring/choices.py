"""Reads the option of a multiple-choice question that a short answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ivl.evaluation.scoring.numbers import quantities, same_quantity
from ivl.evaluation.scoring.spelling import bare, introduced, plain, wording

_LETTERS = "ABCDEFGH"
_MOST_LETTERS = 60
"""The longest text that names several options."""
_NAMED = re.compile(r"(?:(?:option|choice|选项?|选择)\s*)?[(\[]?([A-Za-z])[)\]]?(?: ?(?:选项|option))?[.:,)]*", re.IGNORECASE)
_WITH_TEXT = re.compile(r"(?:[(\[]([A-Za-z])[)\]][.:,]?\s*|([A-Z])(?:[.):]\s*|,(?=\D)\s*)|([a-z])[.)]\s+)(\S.*)")
_ANOTHER = re.compile(
    r"^[(\[]?[A-H](?![A-Za-z])(?! \w)|\b(?:or|and)\b ?[(\[]?[A-H](?:[).:\]]|$)|[&/] ?[(\[]?[A-H](?:[).:\]]|$)"
)

_JOINT = r" ?(?:(?:[,;&]|(?i:\band\b)|和|与|及) ?)+|(?<=[)\]])(?=[(\[])| "
_SEVERAL = re.compile(
    rf"(?i:both )?(?i:(?:options?|choices?|选项?|选择) ?)?([(\[]?[A-I][)\]]?(?:(?:{_JOINT})[(\[]?[A-I][)\]]?)+)"
)
_JOINED = re.compile("[A-I]{2,}")
"""Several letters with something between them, and with nothing."""


def split_option(text: str) -> tuple[str, str] | None:
    """Split `B. cat` into ("B", "cat"), and the letter alone into ("B", ""); None for text that names no option."""
    text = introduced(plain(text))
    if len(text) > 1000:
        return None
    text = re.sub(r"(?<=^\w),? (?:because|since) .*", "", text)
    if match := _NAMED.fullmatch(text):
        return match[1].upper(), ""
    if match := _WITH_TEXT.fullmatch(text):
        letter, rest = (match[1] or match[2] or match[3]).upper(), match[4]
        # More letters after the first: several options, or none.
        return None if _ANOTHER.search(rest) else (letter, rest)
    return None


def same_choice(prediction: str, truth: str, choices: Sequence[str] = ()) -> bool | None:
    """Compare two options named by letter, text or both; None unless both texts name options.

    A letter counts before its text, unless that is another option's.

    Args:
        choices: The texts of options A, B, ...; without them letters go from A to H, and the truth gives the only text.
    """
    if several := _several(truth, choices):
        known = bool(choices) or not _JOINED.fullmatch(bare(truth))
        # Where options are unknown, AB and BA may be names.
        if (given := _several(prediction, choices)) and (known or not _JOINED.fullmatch(bare(prediction))):
            return given == several
        if known:
            return False if _option(prediction, choices) else None
    expected = _option(truth, choices)
    if expected is None or (not choices and expected[0] not in _LETTERS):
        return None
    given = _option(prediction, choices)
    if given is None:
        if expected[1]:
            return same_text(prediction, expected[1]) or None
        # Words must not decide about several letters: without its article, "A, B" is "B".
        return False if len(re.findall(r"\b[A-H]\b", plain(prediction))) > 1 else None
    if given[0] != expected[0]:
        return False
    if choices:
        return not given[1] or _letter_of(given[1], choices) in (None, given[0])
    # Two people may be called A., so that their names decide.
    return True if not given[1] or not expected[1] or same_text(given[1], expected[1]) else None


def _several(text: str, choices: Sequence[str]) -> set[str]:
    """Return the letters of a text that names several options: `A, C`, `C and A`, `(A)(C)`, `AC`."""
    text = bare(text)
    if len(text) > _MOST_LETTERS or _letter_of(text, choices):
        return set()
    text = re.sub("[/+]", ",", text.upper()) if choices else text  # without options, A/B is a quotient
    match = _JOINED.fullmatch(text) or _SEVERAL.fullmatch(text)
    letters = set(
        re.findall("(?<![A-Za-z])[A-I](?![A-Za-z])", match[1]) if match and match.re is _SEVERAL else text if match else ""
    )
    inside = not choices or all(ord(letter) - ord("A") < len(choices) for letter in letters)
    return letters if inside and len(letters) > 1 else set()


def _option(text: str, choices: Sequence[str]) -> tuple[str, str] | None:
    # An option's text first: "A dog" is not option A.
    if letter := _letter_of(text, choices):
        return letter, text
    option = split_option(text)
    if option is None or (choices and ord(option[0]) - ord("A") >= len(choices)):
        return None
    return option


def _letter_of(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the one option with this text."""
    same = [chr(ord("A") + n) for n, choice in enumerate(choices) if same_text(text, choice)]
    return same[0] if len(same) == 1 else None


def same_text(prediction: str, truth: str) -> bool:
    """Return whether two texts have the same words or are the same number; an empty text equals nothing."""
    if both := quantities(prediction, truth):
        return same_quantity(*both)
    words = wording(prediction)
    return bool(words) and words == wording(truth)
