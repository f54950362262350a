"""Reads the answer of a reply in one of the agreed styles (arXiv:2411.10442), or names the fault of the reply's form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ivl.errors import InputError

AnswerStyle = Literal["direct", "final_answer", "boxed", "think"]
FormatProblem = Literal[
    "no answer", "too many answers", "empty answer", "answer of several lines", "too few lines", "no reasoning",
    "unclosed box", "broken think tags", "broken answer tags", "text outside the tags",
]  # fmt: skip

_MARKER = re.compile(
    r"(?:final answer(?: is)?|(?:最终|最后|正确|^[ \t*_]{0,4})答案(?:是|为)?)\s{0,3}(?:\*\*|__)?\s{0,3}[:：]",
    re.IGNORECASE | re.MULTILINE,
)
_FIRST_MARK = re.compile(r"(?:Final answer:|Answer:)\s*(.*)", re.IGNORECASE)
BOX = "\\boxed{"
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """An answer or a problem; exactly one of the two is set."""

    answer: str | None = None
    problem: FormatProblem | None = None


def extract(reply: str, style: AnswerStyle) -> Extracted:
    """Return the answer of a reply. In the style `direct` it is the whole reply; functions below read the other styles.

    Raises:
        InputError: for an unknown style.
    """
    if style not in get_args(AnswerStyle):
        raise InputError(f"style {style!r} is not one of {', '.join(get_args(AnswerStyle))}")
    if style == "direct":
        return _extracted(reply)
    return {"final_answer": final_answer, "boxed": boxed, "think": think}[style](reply)


def final_answer(reply: str) -> Extracted:
    """Return the text after the last "Final answer:", "最终答案：", "正确答案：" or line that begins with "答案：": one line.

    A reply is malformed with no marker or more than two of them, without reasoning before the first, or with fewer than two
    line breaks in all.
    """
    markers = list(_MARKER.finditer(reply))
    if not markers:
        return Extracted(problem="no answer")
    if len(markers) > 2:
        return Extracted(problem="too many answers")
    if not re.search(r"\w", reply[: markers[0].start()]):
        return Extracted(problem="no reasoning")
    if reply.count("\n") < 2:
        return Extracted(problem="too few lines")
    return _extracted(reply[markers[-1].end() :], one_line=True)


def boxed(reply: str) -> Extracted:
    r"""Return the content of the last `\boxed{...}` whose braces are balanced."""
    box = last_box(reply)
    if box is None:
        return Extracted(problem="unclosed box" if "\\boxed{" in reply else "no answer")
    return _extracted(box)


def last_box(text: str) -> str | None:
    """Return the content of the box that opens last among those that close, found in one pass, whatever the nesting."""
    opened: list[tuple[int, bool]] = []
    last, content = -1, None
    for match in re.finditer(r"\\boxed\s{0,3}\{|\\[^\W\d_]+|\\.|[{}]", text, re.DOTALL):
        token = match[0]
        is_box = token.startswith("\\boxed") and token.endswith("{")
        if token == "{" or is_box:
            opened.append((match.end(), is_box))
        elif token == "}" and opened:
            start, closes_box = opened.pop()
            if closes_box and start > last:
                last, content = start, text[start : match.start()]
    return content


def marked_answer(reply: str) -> str:
    """Return the rest of the line behind the first "Final answer:" or "Answer:", else the whole reply."""
    match = _FIRST_MARK.search(reply)
    return match[1].strip() if match else reply


def last_box_or_text(reply: str) -> str:
    """Return the content of the last box, or the reply if it has none or does not close it, as VLMEvalKit does."""
    _, box, tail = reply.rpartition(BOX)
    content = up_to_brace(tail) if box else None
    return reply if content is None else content


def up_to_brace(tail: str) -> str | None:
    """Return what stands before the brace that closes a box; None if none does. VLMEvalKit counts escaped braces, too."""
    depth = 1
    for brace in re.finditer("[{}]", tail):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return tail[: brace.start()]
    return None


def think(reply: str) -> Extracted:
    """Return the answer of `<think>reasoning</think><answer>answer</answer>`, out of its box if there is one.

    Each tag must occur once, with nothing around them. Without answer tags, the box or the text behind the marker of a final
    answer counts that follows the reasoning.
    """
    places, counts = [reply.find(tag) for tag in _TAGS], [reply.count(tag) for tag in _TAGS]
    if counts[:2] != [1, 1] or places[1] < places[0]:
        return Extracted(problem="broken think tags")
    if counts[2:] == [0, 0]:
        return _behind(reply) if reply[places[0] + 7 : places[1]].strip() else Extracted(problem="no reasoning")
    if counts[2:] != [1, 1] or places != sorted(places):
        return Extracted(problem="broken answer tags")
    before, reasoning, between, answer, after = re.split("|".join(_TAGS), reply)
    if (before + between + after).strip():
        return Extracted(problem="text outside the tags")
    if not reasoning.strip():
        return Extracted(problem="no reasoning")
    box = last_box(answer)
    return _extracted(answer if box is None else box)


def _behind(reply: str) -> Extracted:
    """Read the box or the marked answer that stands behind the reasoning."""
    tail = reply.partition(_TAGS[1])[2]
    if (box := last_box(tail)) is not None:
        return _extracted(box)
    markers = list(_MARKER.finditer(tail))
    return _extracted(tail[markers[-1].end() :], one_line=True) if markers else Extracted(problem="no answer")


def _extracted(answer: str, *, one_line: bool = False) -> Extracted:
    answer = answer.strip()
    for mark in ("**", "__"):
        # Markdown that began before the marker ends after the answer.
        if answer.count(mark) == 1:
            answer = answer.removeprefix(mark).removesuffix(mark).strip()
    if not answer:
        return Extracted(problem="empty answer")
    if one_line and "\n" in answer:
        return Extracted(problem="answer of several lines")
    return Extracted(answer=answer)


def fix_answer(reply: str, answer: str, truth: str) -> str:
    """Write the answer of a right reply in the form of the truth, where it contains that: `5 cm` becomes `5`.

    Args:
        answer: As `extract` gave it. Its last place in the reply is rewritten.
    """
    at = reply.rfind(answer) if answer else -1
    if at < 0 or not truth or answer == truth or not _contains(answer, truth):
        return reply
    return reply[:at] + truth + reply[at + len(answer) :]


def _contains(answer: str, truth: str) -> bool:
    """Look for the truth as whole words and numbers: neither 1 in 12 or 1.5, nor 5 in -5."""
    left = r"(?<![\w.,+\-/])" if truth[0].isalnum() and truth[0] < "\u2e80" else ""
    right = r"(?!\w|[.,/]\d)" if truth[-1].isalnum() and truth[-1] < "\u2e80" else ""
    return bool(re.search(left + re.escape(truth) + right, answer, re.IGNORECASE))
