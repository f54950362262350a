"""The system message that a directory's chat template writes by default. Templates are programs: they are read, never run."""

from __future__ import annotations

import re
from pathlib import Path

from ivl.checkpoint.sections import TEXT, open_section
from ivl.errors import InputError
from ivl.utils.files import regular

MAX_TEMPLATE_BYTES = 1 << 20
_IN_A_TURN = re.compile(r"<\|im_start\|>system(?:\\n|\n)(?P<text>(?:(?!<\|im_|['\"]\s*[-+~}]).)*)<\|im_end\|>", re.DOTALL)
"""A whole system turn in one piece, not put together from a variable."""
_IN_A_VARIABLE = re.compile(
    r"\bset\s+\w*system\w*\s*=\s*(?P<quote>['\"])(?P<text>(?:\\.|(?!(?P=quote)).)*)(?P=quote)", re.DOTALL
)


def default_system(directory: Path) -> str | None:
    """Return the system message that a directory's chat template writes for a conversation without one.

    Returns:
        The message, empty if the template writes none; None if the directory has no template.

    Raises:
        InputError: if a file that may hold the template is not readable.
    """
    template = _template(directory)
    if template is None:
        return None
    found = _IN_A_TURN.search(template) or _IN_A_VARIABLE.search(template)
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], found["text"]) if found else ""


def _template(directory: Path) -> str | None:
    """The template of a processor's files, else of the tokenizer's."""
    file = directory / "chat_template.jinja"
    if file.exists():
        try:
            if regular(file).st_size > MAX_TEMPLATE_BYTES:
                raise InputError(f"{file}: more than {MAX_TEMPLATE_BYTES:,} bytes, which are not read")
            return file.read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise InputError(f"{file}: cannot be read: {error}") from None
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        section = open_section(directory / name, optional=True)
        value = section.values.get("chat_template")
        if isinstance(value, list):  # several, by name
            named = {item.values.get("name"): item.read("template", TEXT) for item in section.sections("chat_template")}
            value = named.get("default")
        if isinstance(value, str):
            return value[:MAX_TEMPLATE_BYTES]
    return None
