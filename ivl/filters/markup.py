"""What is broken in the markup of a text: grounding marks, LaTeX, HTML. Each function says what, or nothing."""

from __future__ import annotations

import re

from ivl.processing.boxes import parse_boxes

_REFS = re.compile("</?(?:ref|quad)>")


def broken_grounding(text: str) -> str:
    if "<box>" in text or "</box>" in text:
        problems = parse_boxes(text).problems
        if problems:
            return "broken or impossible box"
    opened = ""
    for match in _REFS.finditer(text):
        name = match[0].strip("</>")
        if match[0][1] != "/":
            if opened:
                return f"unbalanced <{opened}>"
            opened = name
        elif opened != name:
            return f"unbalanced <{name}>"
        else:
            opened = ""
    return f"unbalanced <{opened}>" if opened else ""


_ENVIRONMENT = re.compile(r"\\(begin|end)\{([A-Za-z]{1,30}\*?)\}")


def broken_latex(text: str) -> str:
    if "$$" in text and text.count("$$") % 2:
        return "unbalanced $$"
    if "\\" not in text:
        return ""
    stack: list[str] = []
    for match in _ENVIRONMENT.finditer(text):
        if match[1] == "begin":
            stack.append(match[2])
        elif not stack or stack.pop() != match[2]:
            return "unbalanced LaTeX environment"
    if stack:
        return "unbalanced LaTeX environment"
    for left, right in (
        (r"\\left(?![A-Za-z])", r"\\right(?![A-Za-z])"),
        (r"(?<!\\)\\\(", r"(?<!\\)\\\)"),
        (r"(?<!\\)\\\[", r"(?<!\\)\\\]"),
    ):
        if len(re.findall(left, text)) != len(re.findall(right, text)):
            return "unbalanced LaTeX brackets"
    if re.search(r"\\[A-Za-z]+\{", text):
        plain = re.sub(r"\\[\\{}]", "", text)
        if plain.count("{") != plain.count("}"):
            return "unbalanced LaTeX braces"
    return ""


_TAG = re.compile(
    r"<(/?)(table|thead|tbody|tr|td|th|div|span|ul|ol|b|i|u|em|strong|sub|sup|a|pre|code|h[1-6]|svg)\b[^<>]{0,500}(?<!/)>", re.I
)


def broken_html(text: str) -> str:
    """An element that is both opened and closed, but not equally often; a table must also be closed at all."""
    counts: dict[str, list[int]] = {}
    for match in _TAG.finditer(text):
        counts.setdefault(match[2].lower(), [0, 0])[bool(match[1])] += 1
    for name, (opened, closed) in counts.items():
        if opened != closed and ((opened and closed) or (name == "table" and "tr" in counts)):
            return "unbalanced HTML"
    return ""
