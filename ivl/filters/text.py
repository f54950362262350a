"""The texts that rules look at: the replies of a record, and prose without code and formulas."""

from __future__ import annotations

import re

from ivl.types import ImageRef, Message, Record, Text, VideoRef

_FENCED = re.compile(r"^[ \t>]*(`{3,}(?=[^`\n]*$)|~{3,}).*?(?:^[ \t>]*\1|\Z)", re.MULTILINE | re.DOTALL)
_NOT_PROSE = re.compile(
    r"`[^`\n]*`|\$\$[^$]*\$\$|\$[^$\n]*\$|\\\((?:[^\n\\]|\\[^()\n]){0,500}\\\)|https?://\S+|<box>[^<]*</box>|</?[A-Za-z][^<>\n]*>"
)
_CODE_LINE = re.compile(
    r"[ \t]*(?:(?:def|class|import|from|return|for|while|if|elif|else|try|except|with|print|var|let|const|function|public"
    r"|private|static|void|int|float|char|#include|using|SELECT|INSERT|UPDATE|CREATE)\b[^\n]*[:;{}()=]|@\w|//|/\*|>>>|\.\.\. "
    r"|[)\]}]+[,;]?[ \t]*$|[\w.\[\]'\"]+[ \t]*[-+*/|&]?=[ \t]*\S|[^\n]*[;{][ \t]*$|[ \t]*[\w.]+\([^\n]*\)[ \t]*$)"
)


def reply_texts(record: Record) -> list[str]:
    """Return the text of every assistant turn of all conversations."""
    return [message.text for conversation in record.conversations for message in conversation if message.role == "assistant"]


def shown_text(message: Message) -> str:
    """Return a turn with `[image]` and `[video]` in the place of its media."""
    marks = {ImageRef: "[image]", VideoRef: "[video]"}
    return "".join(part.text if isinstance(part, Text) else marks[type(part)] for part in message.content)


def prose(text: str) -> str:
    """Replace code, formulas, addresses, boxes and tags by spaces. A code fence that is left open reaches to the end."""
    return _NOT_PROSE.sub(" ", _FENCED.sub(" ", text))


def looks_like_code(text: str) -> bool:
    """Tell whether most lines are those of a program, for replies that are code without a fence around it."""
    lines = [line for line in text[:20_000].splitlines() if line.strip()]
    return len(lines) > 1 and 2 * sum(bool(_CODE_LINE.match(line)) for line in lines) > len(lines)
