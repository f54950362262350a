"""The option that a reply names, or its yes or no, by the rules of the tools that published figures come from.

None stands for undecided. Where a tool draws a letter at random, nothing is drawn here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from ivl.evaluation.scoring.metrics import without_punctuation

Profile = Literal["2024-12", "2026-08"]
"""VLMEvalKit's rule for options of that month: the one behind the published figures of InternVL2.5, and the newest."""
Options = Mapping[str, str]
"""Option texts by letter."""
REFUSED = "Z"
"""The letter of a reply that refuses to answer; no option has it."""

_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip
_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer is\s*\**\s*([A-D])", re.IGNORECASE)
_LEAD_INS = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:", "Answer:", "Option:",
)  # fmt: skip
_TRANSLATED = (("\n", ""), ("不是", "No"), ("是", "Yes"), ("否", "No"))
_JOINED = ("The best option is", "The correct option is", "Best answer:", "Best option:")


def infer_option(reply: str, options: Options, profile: Profile = "2024-12") -> str | None:
    """Return the one letter that stands alone in a reply, else the one whose text occurs in it: VLMEvalKit's `can_infer`.

    The profile 2026-08 takes a letter among the last four words only, then the first letter behind "answer is" even inside a
    word ("the answer is blue" is B), and looks for texts only in replies of at most twice their length.

    Returns:
        A letter, or `REFUSED`.
    """
    if _FAILED in reply:
        return None
    if any(words in reply for words in _REFUSALS):
        return REFUSED
    newest, words = profile == "2026-08", reply.translate(_SPACES).split()
    alone = [letter for letter in options if letter in words]
    if len(alone) == 1 and not (newest and words.index(alone[0]) <= len(words) - 5):
        return alone[0]
    if not alone and REFUSED in words:
        return REFUSED
    if newest and (match := _ANSWER_IS.search(reply)):
        return match[1].upper()
    text = reply.lower()
    if newest and len(text) > 2 * sum(map(len, options.values())):
        return None
    inside = [letter for letter, option in options.items() if option.lower() in text]
    return inside[0] if len(inside) == 1 else None


def last_option(reply: str, options: Options, forms: Sequence[str] = (" {} ",)) -> str | None:
    """Return the last of the letters in parentheses, else in the first form that occurs, else the last text.

    That is the rule of arXiv:2311.16502's own code, which draws a letter where None is returned.

    Args:
        forms: How a letter may stand without parentheses.
    """
    for sign in ",.!?;:'":
        reply = reply.strip(sign)
    text = f" {reply} "
    for form in ("({})", *forms):
        if found := [letter for letter in options if form.format(letter) in text]:
            place = form if form == "({})" else " {} "
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) <= 5:
        return None
    text = text.lower()
    inside = [letter for letter, option in options.items() if option.lower() in text]
    return max(inside, key=lambda letter: text.rfind(options[letter].lower()), default=None)


def option_behind(reply: str, mark: str, options: Options) -> str | None:
    """Return the only letter, inside words too, that occurs behind the last mark, such as "Answer:"."""
    _, found, tail = reply.rpartition(mark)
    letters = [letter for letter in options if letter in tail] if found else []
    return letters[0] if len(letters) == 1 else None


def leading_option(reply: str, options: Options) -> str:
    """Return the letter that a reply begins with, else that of the first text in it, else the reply: InternVL's own rule."""
    reply = reply.strip()
    if len(reply) == 1 or reply[:1] in options:
        return reply[:1]
    return next((letter for letter, option in options.items() if option in reply), reply)


def first_capital(reply: str, letters: str = "ABCD", *, lead_ins_stay: bool = False) -> str | None:
    """Return the first of the letters in a reply without its lead-ins, inside words too, as for videos in VLMEvalKit.

    Args:
        lead_ins_stay: Keep "Best option:" and three others, as the tool does for want of two commas; they begin with a B.
    """
    for words in _LEAD_INS:
        if not (lead_ins_stay and words in _JOINED):
            reply = reply.replace(words, "")
    match = re.search(f"[{letters}]", reply)
    return match and match[0]


def shares_option(reply: str, truth: str, *, empty_is_right: bool = False, reference: bool = False) -> bool:
    """Return whether the first word of a reply is a part of `(x)`, the first word of the truth, or contains it.

    Args:
        empty_is_right: Accept a word without any letter, which is a part of everything, as the tools do.
        reference: As InternVL's own code, which takes out "Answer: " and keeps white space before the first word.
    """
    reply = reply.replace("Answer: ", "") if reference else reply.strip()
    said, meant = reply.lower().split(" ")[0], truth.lower().split(" ")[0]
    if not empty_is_right and not re.search(r"\w", said):
        return False
    return said.replace(".", "") in meant or meant in said


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
