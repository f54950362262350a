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
_VERB = re.compile(
    r"\b(?:is|are|was|were|am|has|have|had|can|could|will|would|should|must|may|might|does|do|did|shows?|contains?|depicts?|"
    r"features?|appears?|seems?|wears?|sits?|stands?|lies|holds?|looks?|means?|makes?|uses?|provides?|returns?|becomes?|"
    r"goes|comes|gives?|takes?|see|there's|it's|isn't|aren't)\b"
)
_SENTENCE_END = re.compile(r"[.!?…。！？](?:[\"'”’)\]*_」』]*(?=\s|$)|(?<=[。！？]))")
_ABBREVIATION = re.compile(r"(?:\b(?:[A-Z]|e\.g|i\.e|etc|vs|cf|Dr|Mr|Mrs|Ms|St|No|Fig|Eq|al|approx|[Ss]ee)|\d)\.$")
_LISTED = re.compile(r"\s*(?:[-*+•·–>#|]|\d{1,3}[.):]|\(?[a-zA-Z][.)])\s*")
_VALUE = re.compile(
    r"(?:\b(?:answer|option|choice|result|value|total|sum|conclusion|correct|code|label|is|are|equals?|be|chose|choose)\b"
    r"|[=≈:：→])\W*(?:the\s)?(?:[\w.,%°$/^-]+\s?){1,2}$", re.IGNORECASE
)  # fmt: skip
_TAIL = 2_000
"""How many characters from the end are looked at; habits are read from there, too."""


def cut_off(answer: str, others: tuple[str, ...] = (), *, min_words: int = 6, lone_sentences: bool = True) -> str:
    """Why the answer looks cut off, or nothing. others: more answers of the same record, for the habit of its writer.

    lone_sentences: whether an answer that is one sentence (a capital, a finite verb, `min_words` words or more) must have a
    full stop when nothing else tells how the writer ends.
    """
    text = answer.rstrip()[-_TAIL:]
    if not text or text.endswith("```"):
        return ""
    last_line = text.rsplit("\n", 1)[-1]
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", last_line)
    last = text[-1]
    if len(text.split()) >= 3 or len(text) >= 12:
        if last in _OPENING or (last in "-:" and len(words) > 1 and not _is_label(last_line)):
            return "ends where something opens"
        if words and last.isalpha() and words[-1] in _CUT_WORDS and len(words) >= 3:
            return "ends in a word that needs another"
    if not _is_open(last) or not words:
        return ""
    listed = bool(_LISTED.match(last_line))
    if listed:
        return "item without the end that the others have" if _items_end(text, last_line) else ""
    if _unclosed(last_line) and len(words) >= 4:
        return "bracket or quotation left open"
    ends = [end for end in _SENTENCE_END.finditer(last_line) if not _ABBREVIATION.search(last_line[: end.end()])]
    rest = last_line[ends[-1].end() :] if ends else last_line
    if _VALUE.search(rest) and (last.isdigit() or last.isupper() or len(words) < min_words):
        return ""
    if ends:
        return "last sentence without an end"
    if last.isdigit() and not _VERB.search(last_line):
        return ""
    paragraphs = [line for line in text.split("\n")[:-1] if _counts(line, min_words)]
    if len(words) >= min_words and paragraphs and all(_ends(line) for line in paragraphs):
        return "last paragraph without an end"
    habit = [_ends(other) for other in others if _counts(other, 4)]
    if len(words) >= 4 and habit:
        return "no end, unlike the other answers" if sum(habit) >= 2 / 3 * len(habit) else ""
    if any("\u3040" <= c <= "\u9fff" for c in last_line):
        return ""
    alone = lone_sentences and "\n" not in text and text == answer.strip() and len(words) >= min_words
    if alone and words[0][0].isupper() and _VERB.search(last_line):
        return "sentence without an end"
    return ""


def _is_open(char: str) -> bool:
    return unicodedata.category(char)[0] in "LNM"


def _is_label(line: str) -> bool:
    return line.rstrip().endswith("::") or line.lstrip().startswith(("#", "|"))


def _unclosed(line: str) -> bool:
    return any(line.count(a) > line.count(b) for a, b in ("()", "[]", "“”", "（）", "「」")) or line.count('"') % 2 == 1


def _counts(text: str, min_words: int) -> bool:
    return len(text[-_TAIL:].split()) >= min_words and not _LISTED.match(text)


def _ends(text: str) -> bool:
    return not _is_open(text.rstrip()[-1])


def _items_end(text: str, last_line: str) -> bool:
    """Whether two or more other items all end like sentences, and this one is as long as a sentence."""
    items = [line for line in text.split("\n")[1:-1] if _LISTED.match(line) and len(line.split()) >= 4]
    return len(items) >= 2 and len(last_line.split()) >= 3 and all(item.rstrip()[-1] in ".!?。！？" for item in items)
