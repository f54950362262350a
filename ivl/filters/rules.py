"""Heuristic rules (InternVL2.5, arXiv:2412.05271, section 4: abnormal lengths, runs of zeros, repeated lines), leaked marks
and cut-off replies.

A rule is a frozen dataclass of thresholds that maps a Record to a verdict. It is pure and linear in the length of the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ivl.config import SPECIAL_TOKENS
from ivl.filters.text import looks_like_code, prose, reply_texts
from ivl.types import Record


@dataclass(frozen=True, slots=True)
class FilterVerdict:
    """Whether a stage keeps a row, and why not."""

    keep: bool
    reason: str = ""
    """A few words that the report counts."""
    score: float | None = None
    """The number that was compared with the limit, if there is one."""


Rule = Callable[[Record], FilterVerdict]
KEEP = FilterVerdict(True)


@dataclass(frozen=True, kw_only=True)
class Length:
    """Abnormal lengths of replies, sentences and words, in characters. The score is the longest reply."""

    min_answer: int = 1
    """Shortest reply without surrounding white space; VQA answers of one letter are fine."""
    max_answer: int = 50_000
    """Longest reply; a longer one would hardly fit into 16k tokens."""
    max_sentence: int = 3_000
    """Longest stretch of prose without an end mark or a line break."""
    max_word: int = 400
    """Longest stretch without white space, outside of code, formulas and addresses; scripts without spaces are exempt."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_answer <= self.max_answer:
            raise ValueError(f"need 0 <= min_answer <= max_answer, got {self.min_answer} and {self.max_answer}")

    def __call__(self, record: Record) -> FilterVerdict:
        replies = [reply.strip() for reply in reply_texts(record)]
        longest = float(max(map(len, replies), default=0))
        for reply in replies:
            if len(reply) < self.min_answer:
                return FilterVerdict(False, "answer too short", float(len(reply)))
            if len(reply) > self.max_answer:
                return FilterVerdict(False, "answer too long", longest)
            if len(reply) > min(self.max_sentence, self.max_word):
                text = prose(reply)
                if _longest(r"[^\n.!?。！？;；|]+", text) > self.max_sentence and not looks_like_code(reply):
                    return FilterVerdict(False, "sentence too long", longest)
                if _longest(r"[^\s\u0e00-\u0eff\u3000-\u9fff\uac00-\ud7ff\uff00-\uffef]+", text) > self.max_word:
                    return FilterVerdict(False, "word too long", longest)
        return FilterVerdict(True, score=longest)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Long runs of zeros, and of any one character. The score is the longest run, in characters."""

    max_zeros: int = 20
    """Zeros in a row."""
    max_spaced_zeros: int = 32
    """Zeros in a row when everything but letters and digits is left out."""
    max_zero_share: float = 0.9
    """Largest share of zeros among 64 neighboring letters and digits, so that a few other digits hide no run."""
    max_letters: int = 15
    """Same letter or digit in a row."""
    max_others: int = 40
    """Same other character in a row, except white space and the characters that draw lines."""
    max_ruler: int = 120
    """Same white space or line-drawing character in a row."""

    def __call__(self, record: Record) -> FilterVerdict:
        longest = 1.0
        for reply in reply_texts(record):
            for run in re.finditer(r"(.)\1+", reply, re.DOTALL):
                length = float(len(run[0]))
                longest = max(longest, length)
                if length > self._limit(run[1]):
                    return FilterVerdict(False, "run of zeros" if run[1] in "0０" else "run of one character", length)
            if reply.count("0") + reply.count("０") > self.max_spaced_zeros:
                kept = re.sub(r"0x|\\x|[\W_]+", "", reply).replace("０", "0")
                spaced = _longest("0+", kept)
                if spaced > self.max_spaced_zeros or _densest(kept, "0", 64) > self.max_zero_share:
                    return FilterVerdict(False, "run of zeros", float(spaced))
        return FilterVerdict(True, score=longest)

    def _limit(self, char: str) -> int:
        if char in "0０":
            return self.max_zeros
        if char.isalnum():
            return self.max_letters
        return self.max_ruler if char.isspace() or char in "-=_*~#.+^|·─━═…<>\"'`/" else self.max_others


@dataclass(frozen=True, kw_only=True)
class RepeatedLines:
    """The same line again and again. The score is the share of characters in lines that came before in the same reply."""

    max_share: float = 0.3
    min_times: int = 3
    """A line must come this often to count, so that a refrain does not."""
    min_letters: int = 8
    """Shorter lines (brackets, rulers, `else:`) do not count."""

    def __call__(self, record: Record) -> FilterVerdict:
        worst = 0.0
        for reply in reply_texts(record):
            lines = [" ".join(line.split()).casefold() for line in reply.splitlines()]
            times = Counter(line for line in lines if sum(map(str.isalpha, line)) >= self.min_letters)
            again = sum((n - 1) * len(line) for line, n in times.items() if n >= self.min_times)
            worst = max(worst, again / max(1, sum(n * len(line) for line, n in times.items())))
        return FilterVerdict(True, score=worst) if worst <= self.max_share else FilterVerdict(False, "repeated lines", worst)


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """Replies whose last paragraph stops in mid-sentence: after a comma or an opening bracket, or after a lower-case letter
    although the reply ends its other sentences or is too long for a caption. Code is not judged; a list or an indented
    paragraph is, if it ends a sentence itself."""

    min_words: int = 5
    """A last paragraph of fewer words is not judged."""
    min_lone_words: int = 12
    """From this number of words on, even a lone sentence needs a final mark."""

    def __call__(self, record: Record) -> FilterVerdict:
        return FilterVerdict(False, "no final mark") if any(map(self._stops, reply_texts(record))) else KEEP

    def _stops(self, reply: str) -> bool:
        reply = reply.rstrip()
        paragraph = re.split(r"\n[ \t]*\n", reply)[-1]
        words = paragraph.split()
        if not words or "://" in words[-1] or _CODE_PROMPT.search(paragraph) or any(map(looks_like_code, (reply, paragraph))):
            return False
        last = words[-1][-1]
        if last in ",，、([{（":
            return len(reply.split()) >= self.min_words
        # A capital letter may be the option that was asked for, and an answer may end in a number.
        if len(words) < self.min_words or not last.isalpha() or last.isupper():
            return False
        if _STRUCTURED.search(paragraph):
            return _SENTENCE_END.search(paragraph) is not None
        return len(words) >= self.min_lone_words or _SENTENCE_END.search(reply) is not None


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """Image tags, special tokens and marks of chat templates in the text of a turn; only the chat renderer may write them."""

    roles: bool = True
    """Whether replies with role headings such as `### Human:` are dropped, too."""

    def __call__(self, record: Record) -> FilterVerdict:
        for message in (message for conversation in record.conversations for message in conversation):
            if match := _LEAKED.search(message.text):
                return FilterVerdict(False, f"{match[0]} in the text of a turn")
            if message.role == "assistant" and message.text.rstrip().endswith("</s>") and "<s>" not in message.text:
                return FilterVerdict(False, "</s> in the text of a turn")
            if self.roles and message.role == "assistant" and _ROLE.search(message.text):
                return FilterVerdict(False, "role heading in an answer")
        return KEEP


_CODE_PROMPT = re.compile(r"^[ \t]*(?:>>>|\.\. )", re.MULTILINE)
_STRUCTURED = re.compile(
    r"^(?: {4}|\t|[ \t>]*(?:[-*+•·‣–—]|\(?\w{1,3}[.):]|#{1,6}|\||\w+ \d+[.:])[ \t]|[-=~]{3,}$)", re.MULTILINE
)
"""An indented line, an item of a list, a heading, a row of a table or a ruler."""
_SENTENCE_END = re.compile(r"[^\W\d_]{2}[.!?][\"')\]*_”’]*\s|[。！？]")
_LEAKED = re.compile(
    "<image>|<video>|" + "|".join(re.escape(t) for t in SPECIAL_TOKENS if not re.search("ref|box|quad", t))
    + r"|<\|[A-Za-z_]{2,30}\|>|<pad>|<unk>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|\[UNUSED_TOKEN_\d+\]"
)  # fmt: skip
_ROLE = re.compile(
    r"^[ \t]*(?:#{2,3} ?(?:Human|Assistant|User|Instruction|Response)|(?:USER|ASSISTANT|Human|Assistant)) ?:", re.MULTILINE
)


def _longest(pattern: str, text: str) -> int:
    return max((len(match[0]) for match in re.finditer(pattern, text)), default=0)


def _densest(text: str, char: str, width: int) -> float:
    """The largest share of a character among `width` neighbors; 0 for a shorter text."""
    total = np.cumsum([0] + [each == char for each in text])
    return float((total[width:] - total[:-width]).max()) / width if len(text) >= width else 0.0
