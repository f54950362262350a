"""Whether an answer breaks off, seen from the answer itself."""

from __future__ import annotations

import re
import unicodedata

_OPENING = "([{“‘«「『【（,，、–—"
_CUT_WORDS = frozenset((
    "a", "an", "the", "of", "and", "or", "but", "with", "from", "into", "onto", "its", "their", "your", "my", "our",
    "his", "because", "which", "whose", "than", "as", "if", "while", "between", "among", "during", "toward", "towards",
    "very", "every", "each", "such", "der", "die", "das", "und", "oder", "mit", "von", "eine", "einen", "le", "les",
    "des", "du", "et", "el", "los", "las", "y", "con", "una",
))  # fmt: skip
"""Words that never end a sentence; a few of German, French and Spanish, too."""
_OFTEN_CUT_WORDS = frozenset((
    "to", "by", "for", "at", "in", "on", "is", "are", "was", "were", "be", "been", "has", "have", "will", "would", "can",
    "could", "should", "may", "might", "must", "this", "these", "those", "not", "also", "only", "when", "where", "who", "we",
    "they", "he",
))  # fmt: skip
"""Words that seldom end an answer of six words or more without a mark after them."""
_VERB = re.compile(
    r"\b(?:is|are|was|were|am|has|have|had|can|could|cannot|will|would|should|must|may|might|does|do|did|shows?|contains?|depicts?|"
    r"features?|appears?|seems?|wears?|sits?|stands?|lies|holds?|looks|means|makes|uses|provides?|returns?|becomes?|"
    r"goes|comes|gives|takes|there's|it's|isn't|aren't)\b",
    re.IGNORECASE,
)
_STARTER = re.compile(
    r"(?:The|This|That|These|It|In|If|For|So|To|We|There|As|When|With|At|By|However|Therefore|Since|Because|You|A|An)\b \S"
)
_SENTENCE_END = re.compile(r"[.!?…。！？](?:[\"'”’)\]*_」』]*(?=\s|$)|(?<=[。！？]))")
_ABBREVIATION = re.compile(r"(?:\b(?:[A-Z]|e\.g|i\.e|etc|vs|cf|Dr|Mr|Mrs|Ms|St|No|Fig|Eq|al|approx|[Ss]ee)|\d)\.$")
_LISTED = re.compile(r"\s*(?:[-*+•·–>|]|\d{1,3}[.):]|\(?[a-zA-Z][.)]|[A-Z][a-z]+ \d+[.:]|[\w.]+ : |:[\w *]+:)\s*")
_VALUE = re.compile(
    r"(?:\b(?:answer|option|choice|result|value|total|sum|conclusion|correct|code|label|is|are|equals?|be|chose|choose)\b"
    r"|[=≈:：→])\W*(?:the\s)?(?:[\w.,%°$/^-]+\s?){1,2}$", re.IGNORECASE
)  # fmt: skip
_TAIL = 2_000
"""How many characters from the end are looked at; habits are read from there, too."""


def cut_off(answer: str, others: tuple[str, ...] = (), *, min_words: int = 5, lone_sentences: bool = True) -> str:
    """Why the answer looks cut off, or nothing. others: more answers of the same record, for the habit of its writer.

    lone_sentences: whether an answer that is one sentence (a capital, a finite verb, `min_words` words or more) must have a
    full stop when nothing else tells how the writer ends.
    """
    text = answer.rstrip()[-_TAIL:]
    if not text or text.endswith("```"):
        return ""
    if ">>> " in text[text.rfind("\n\n") + 1 :]:  # an interactive session
        return ""
    lines = text.split("\n")
    first = _last_block(lines)
    block = " ".join(line.strip() for line in lines[first:])
    if block.lstrip().startswith(("..", ">>>", "#")) or "://" in block.split()[-1]:
        return ""
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", block)
    last = text[-1]
    if len(text.split()) >= 3 or len(text) >= 12:
        if last in _OPENING or (last in "-:" and len(words) > 1 and not block.endswith("::")):
            return "ends where something opens"
        cut_words = _CUT_WORDS | _OFTEN_CUT_WORDS if len(words) >= 6 else _CUT_WORDS
        if len(words) >= 3 and words[-1] in cut_words and words[-1] == block.split()[-1]:
            return "ends in a word that needs another"
    if not _is_open(last) or not words:
        return ""
    if "," in block and all(len(part.split()) <= 2 for part in block.split(",")):  # an enumeration, not a sentence
        return ""
    label = _LISTED.match(block)
    if _unclosed(block[label.end() :] if label else block) and len(words) >= 4:
        return "bracket or quotation left open"
    before = [line for line in lines[:-1] if line.strip()]
    if (
        not label
        and len(before) >= 3
        and not any(map(_is_open, (line.rstrip()[-1] for line in before)))
        and (len(words) >= 3 or block[0].islower())
    ):
        return "last line without the end that the others have"
    ends = [end for end in _SENTENCE_END.finditer(block) if not _ABBREVIATION.search(block[: end.end()])]
    rest = block[ends[-1].end() :] if ends else block[label.end() :] if label else block
    if label and not ends and (items := _items(lines)):
        return "item without the end that the others have" if _items_end(items) and not last.isdigit() else ""
    if last.isdigit() and (not _VERB.search(rest) or re.search(r"\W\d+$", rest)):
        return ""
    if _VALUE.search(rest) and (last.isupper() or len(words) < min_words):
        return ""
    if ends:
        return "last sentence without an end"
    paragraphs = [line for line in lines[:-1] if _counts(line, min_words)]
    above = "\n".join(lines[:first]).rstrip(" ")
    after_end = above.endswith("\n") and above.rstrip()[-1:] in (".", "!", "?")
    enough = _STARTER.match(block) or len(words) >= (6 if label else 3 if after_end and block[0].isupper() else 4)
    if enough and (after_end or (paragraphs and _ends(paragraphs[-1]))):
        return "last paragraph without an end"
    if first < len(lines) - 1 and rest.lstrip()[:1].isupper():  # wrapped, as captions and labels are not
        return "last paragraph without an end"
    habit = [_ends(other) for other in others if _counts(other, 4)]
    if len(words) >= 4 and habit:
        return "no end, unlike the other answers" if sum(habit) >= 2 / 3 * len(habit) else ""
    if any("\u3040" <= c <= "\u9fff" for c in block):
        return ""
    if (
        lone_sentences
        and len(words) >= min_words
        and rest.lstrip()[:1].isupper()
        and _VERB.search(rest.lstrip().partition(" ")[2])
    ):
        return "sentence without an end"
    return ""


def _last_block(lines: list[str]) -> int:
    """Where the last line's sentence may begin: long lines before it, of the same paragraph or item, go on in it."""
    first = len(lines) - 1
    while first and not _LISTED.match(lines[first]) and len(lines[first - 1].rstrip()) >= 50:
        first -= 1
    return first


def _is_open(char: str) -> bool:
    return unicodedata.category(char)[0] in "LNM"


def _unclosed(line: str) -> bool:
    return any(line.count(a) > line.count(b) for a, b in ("()", "[]", "“”", "（）", "「」")) or any(
        line.count(c) % 2 for c in '"`'
    )


def _counts(text: str, min_words: int) -> bool:
    return len(text[-_TAIL:].split()) >= min_words and not _LISTED.match(text)


def _ends(text: str) -> bool:
    return not _is_open(text.rstrip()[-1])


def _items(lines: list[str]) -> list[str]:
    """The items of the list that the last one belongs to, without the last, each with the lines that go on from it."""
    items: list[str] = []
    for line in lines:
        if _LISTED.match(line):
            items.append(line.rstrip())
        elif items and line.strip():
            items[-1] += " " + line.strip()
    return [item for item in items[:-1] if len(item.split()) >= 3]


def _items_end(items: list[str]) -> bool:
    """Whether nearly all end like sentences or rows of a table."""
    return sum(item[-1] in ".!?。！？|)" for item in items) >= 0.8 * len(items)
