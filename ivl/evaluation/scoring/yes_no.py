"""Yes or no in a reply, by the rules of the tools that published figures come from."""

from __future__ import annotations

import re
from typing import Literal

from ivl.evaluation.scoring.vqa import without_punctuation

_TRANSLATED = (("\n", ""), ("不是", "No"), ("是", "Yes"), ("否", "No"))


def yes_or_no(reply: str) -> Literal["Yes", "No"] | None:
    """Return the one of the two words that a reply contains, None for both or neither: VLMEvalKit's rule."""
    words = without_punctuation(reply.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "Yes" if "yes" in words else "No"


def yes_unless_denied(reply: str) -> Literal["yes", "no"]:
    """Return no for the words No, no and not before the first full stop, otherwise yes: InternVL's rule."""
    words = reply.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def in_english(reply: str) -> str:
    """Write the Chinese and logical words for yes and no in English, in lower case, and drop other Chinese characters."""
    for word, english in _TRANSLATED:
        reply = reply.replace(word, english)
    return re.sub("[\u4e00-\u9fa5]", "", reply.lower().replace("true", "yes").replace("false", "no"))


def leading_yes_or_no(reply: str) -> str:
    """Return what the first four characters contain, yes before no, or else "other"."""
    return next((word for word in ("yes", "no") if word in reply[:4]), "other")
