"""Lists of short answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ivl.evaluation.scoring.quantities import quantity
from ivl.evaluation.scoring.spelling import bare, without_left_side
from ivl.evaluation.scoring.units import measure

_PAIRS = {"(": ")", "[": "]", "{": "}"}
_COMMA = re.compile(r" ?[,;] ?")
_WORD = re.compile(r",? (?:and|or|&) |(?<=[\u2e80-\u9fff])[和与及或](?=[\u2e80-\u9fff])| & ")
_MOST_ITEMS = 50


@dataclass(frozen=True, kw_only=True)
class Items:
    texts: tuple[str, ...]
    bracket: str
    """The opening one; empty if none."""
    any_order: bool
    """A set, a list joined by words, or solutions of an equation."""


def items(text: str) -> Items | None:
    """The items of a list of two or more, None for what is none (a number such as 1,234, a formula, a sentence)."""
    text = bare(text).replace("\\{", "{").replace("\\}", "}")
    bracket = ""
    left, rest = without_left_side(text)
    if left and rest[:1] in _PAIRS:
        text = rest
    if text[:1] in _PAIRS and text.endswith(_PAIRS[text[0]]) and not re.search(r"[()\[\]]", text[1:-1]):
        bracket, text = text[0], text[1:-1].strip()
    if len(text) > 1000 or quantity(text):
        return None
    joined = bool(_WORD.search(text))
    texts = [each for part in _WORD.split(text) for each in _COMMA.split(part)]
    sides = [without_left_side(each) for each in texts]
    solutions = bool(sides[0][0]) and all(side in ("", sides[0][0]) for side, _ in sides)
    if solutions:
        texts = [rest for _, rest in sides]
    texts = [each.strip(" '\"") for each in texts]
    if not 2 <= len(texts) <= _MOST_ITEMS or not all(texts):
        return None
    if any(re.search(r"[\\^=<>{}|√π∞±]", each) and not quantity(each) for each in texts) or max(map(len, texts)) > 60:
        return None
    return Items(texts=tuple(texts), bracket=bracket, any_order=bracket == "{" or joined or solutions)


def same_items(prediction: str, truth: str, same: Callable[[str, str], bool]) -> bool | None:
    """None unless both are lists, or one is a list and the other a number, which are different.

    Names may come in any order, numbers only in sets, in lists joined by words and as solutions (`x = 1, x = 2`).
    """
    said, meant = items(prediction), items(truth)
    if said is None or meant is None:
        single = truth if said else prediction
        return False if (said or meant) and quantity(single) else None
    if said.bracket and meant.bracket and said.bracket != meant.bracket:
        interval = len(meant.texts) == 2 and "{" not in (said.bracket, meant.bracket)
        if interval or "{" in (said.bracket, meant.bracket):
            return False
    if len(said.texts) != len(meant.texts):
        return False
    if any(_is_number(text) for text in meant.texts) and not (said.any_order or meant.any_order):
        return all(same(a, b) for a, b in zip(said.texts, meant.texts, strict=True))
    left = list(meant.texts)
    for text in said.texts:
        match = next((other for other in left if same(text, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _is_number(text: str) -> bool:
    """With or without a unit of measure; `3 cats` is rather a name."""
    found = quantity(text)
    return found is not None and (not found.unit or measure(found.unit) is not None)
