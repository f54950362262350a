"""What the rules look at: the answers of a record, and what of a text is prose."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ivl.types import Conversation, Record

FENCE = re.compile(r"^[ \t]*(?:>[ \t]*)*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(`{3,}|~{3}(?!~))([^\n]*)$", re.MULTILINE)
_NOT_PROSE = re.compile(
    r"`[^`\n]*`|\$\$[^$]*\$\$|\$[^$\n]*\$|\\\((?:[^\n\\]|\\[^()\n]){0,500}\\\)|https?://\S+|<box>[^<]*</box>|</?[A-Za-z][^<>\n]*>",
    re.DOTALL,
)
_SESSION = re.compile(r"^[ \t]*>>> [^\n]*(?:\n[ \t]*[^\s][^\n]*)*", re.MULTILINE)
"""A prompt, and the lines up to the next empty one."""
_CODE_LINE = re.compile(
    r"[ \t]*(?:(?:def|class|import|from|return|for|while|if|elif|else|try|except|with|print|var|let|const|function|public"
    r"|private|static|void|int|float|char|#include|using|SELECT|INSERT|UPDATE|CREATE)\b[^\n]*[:;{}()=]|@\w|//|/\*|>>>|\.\.\. "
    r"|[)\]}]+[,;]?[ \t]*$|[\w.\[\]'\"]+[ \t]*[-+*/|&]?=[ \t]*\S|[^\n]*[;{][ \t]*$|[ \t]*[\w.]+\([^\n]*\)[ \t]*$)"
)


def answers_text(record: Record) -> tuple[str, ...]:
    """What the assistant says, turn by turn, through all conversations."""
    return tuple(message.text for message, _ in turns(record) if message.role == "assistant")


def turns(record: Record) -> Iterator[tuple]:
    """Every message with its conversation."""
    for conversation in record.conversations:
        for message in conversation:
            yield message, conversation


def answers_by_conversation(record: Record) -> tuple[tuple[str, ...], ...]:
    return tuple(_answers(conversation) for conversation in record.conversations)


def _answers(conversation: Conversation) -> tuple[str, ...]:
    return tuple(message.text for message in conversation if message.role == "assistant")


def split_fences(text: str) -> tuple[str, bool]:
    """The text without its fenced code, and whether the last fence was left open (its code is then taken out, too)."""
    kept, at, opened = [], 0, None
    for match in FENCE.finditer(text):
        mark, info = match[1], match[2]
        if opened is None:
            if "`" in info and mark[0] == "`":  # inline code, not a fence
                continue
            kept.append(text[at : match.start()])
            opened = mark
        elif mark[0] == opened[0] and len(mark) >= len(opened) and not info.strip():
            opened, at = None, match.end()
    if opened is None:
        kept.append(text[at:])
    return "".join(kept), opened is not None


def without_code(text: str) -> str:
    """The text without fenced code and without interactive Python sessions."""
    text = split_fences(text)[0]
    return _SESSION.sub("", text) if ">>> " in text else text


def prose(text: str) -> str:
    """The text without code, formulas, addresses, boxes and tags."""
    return _NOT_PROSE.sub(" ", without_code(text))


def looks_like_code(text: str) -> bool:
    """Whether most lines are those of a program. For answers that are code without a fence around it."""
    lines = [line for line in text[:20_000].splitlines() if line.strip()]
    return len(lines) > 1 and 2 * sum(bool(_CODE_LINE.match(line)) for line in lines) > len(lines)
