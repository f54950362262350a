"""Which option of a multiple-choice question a short answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ivl.evaluation.scoring.quantities import quantities, same_quantity
from ivl.evaluation.scoring.spelling import plain, wording

_LETTERS = "ABCDEFGH"
_NAMED = re.compile(r"(?:(?:option|choice|选项?|选择)\s*)?[(\[]?([A-Za-z])[)\]]?(?: ?(?:选项|option))?[.:,)]*", re.IGNORECASE)
_WITH_TEXT = re.compile(r"(?:[(\[]([A-Za-z])[)\]][.:,]?\s*|([A-Z])(?:[.):]\s*|,(?=\D)\s*)|([a-z])[.)]\s+)(\S.*)")
_ANOTHER = re.compile(
    r"^[(\[]?[A-H](?![A-Za-z])(?! \w)|\b(?:or|and)\b ?[(\[]?[A-H](?:[).:\]]|$)|[&/] ?[(\[]?[A-H](?:[).:\]]|$)"
)
_LEAD = re.compile(
    r"i (?:choose|pick|select) "
    r"|(?:(?:so|thus|therefore|hence),? )?(?:the |my )?(?:(?:final|correct|right|best) )?(?:answer|option|choice)(?: is)?:? *"
    r"|(?:所以|因此)?,?(?:正确)?(?:答案|选项)(?:是|为)?:?\s*",
    re.IGNORECASE,
)


def split_option(text: str) -> tuple[str, str] | None:
    """`B. cat` -> ("B", "cat"), and ("B", "") for the letter alone; None for what names no option."""
    text = plain(text)
    if len(text) > 1000:
        return None
    if (found := _LEAD.match(text)) and found.end() < len(text):
        text = text[found.end() :]
    text = re.sub(r"(?<=^\w),? (?:because|since) .*", "", text)
    if found := _NAMED.fullmatch(text):
        return found[1].upper(), ""
    if found := _WITH_TEXT.fullmatch(text):
        letter, rest = (found[1] or found[2] or found[3]).upper(), found[4]
        # More letters behind the first: several options, or none.
        return None if _ANOTHER.search(rest) else (letter, rest)
    return None


def letters(text: str) -> frozenset[str] | None:
    """`A, C and D` or `ACD` as a set of at least two letters, else None."""
    text = plain(text).rstrip(".")
    if re.fullmatch(r"[A-H]{2,8}", text) or re.fullmatch(
        r"[(\[]?[A-H][)\]]?(?:(?: ?[,;&] ?| and |, and | )[(\[]?[A-H][)\]]?){1,7}", text
    ):
        found = re.findall("[A-H]", text)
        return frozenset(found) if len(set(found)) == len(found) else None
    return None


def same_choice(prediction: str, truth: str, choices: Sequence[str] = ()) -> bool | None:
    """None unless both name options, by letter, text or both. A letter counts before its text, unless that is
    another option's.

    choices: the texts of options A, B, ...; without them letters go from A to H and texts are those that the truth gives.
    """
    several = letters(truth)
    if several and (len(plain(truth)) > len(several) or plain(truth) == "".join(sorted(several))) and not choices:
        named = letters(prediction)
        return named == several if named else None
    meant = _option(truth, choices)
    if meant is None or (not choices and meant[0] not in _LETTERS):
        return None
    said = _option(prediction, choices)
    if said is None:
        if letters(prediction):
            return False
        return same_text(prediction, meant[1]) or None if meant[1] else None
    if said[0] != meant[0]:
        return False
    if choices:
        return not said[1] or _letter_of(said[1], choices) in (None, said[0])
    # Two people may be called A., so that their names decide.
    return True if not said[1] or not meant[1] or same_text(said[1], meant[1]) else None


def _option(text: str, choices: Sequence[str]) -> tuple[str, str] | None:
    # An option's text first: "A dog" is not option A.
    if letter := _letter_of(text, choices):
        return letter, text
    option = split_option(text)
    if option is None or (choices and ord(option[0]) - ord("A") >= len(choices)):
        return None
    return option


def _letter_of(text: str, choices: Sequence[str]) -> str | None:
    """The one option with this text."""
    same = [chr(ord("A") + n) for n, choice in enumerate(choices) if same_text(text, choice)]
    return same[0] if len(same) == 1 else None


def same_text(prediction: str, truth: str) -> bool:
    """The same words or the same number; empty texts are the same as nothing."""
    if both := quantities(prediction, truth):
        return same_quantity(*both)
    said = wording(prediction)
    return bool(said) and said == wording(truth)
