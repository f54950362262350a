"""The system message that a directory's chat template writes by default. Templates are programs: they are read, never run."""

from __future__ import annotations

import re
from pathlib import Path

from ivl.checkpoint.sections import TEXT, open_section
from ivl.errors import InputError
from ivl.utils.files import regular

MAX_TEMPLATE = 1 << 18
_IN_A_TURN = re.compile(r"<\|im_start\|>system(?:\\n|\n)(?P<text>(?:(?!<\|im_|['\"]\s?[-+~}]).)*)<\|im_end\|>", re.DOTALL)
"""A whole system turn in one piece, not put together from a variable."""
_IN_A_VARIABLE = re.compile(
    r"\bset\s{1,9}\w{0,40}system\w{0,40}\s{0,9}=\s{0,9}(?P<q>['\"])(?P<text>(?:\\.|(?!(?P=q)).)*)(?P=q)", re.DOTALL
)


def default_system(directory: Path) -> str | None:
    """Return the system message that a directory's chat template writes for a conversation without one.

    Returns:
        The message, empty if the template writes none; None if the directory has no template.

    Raises:
        InputError: if a file that may hold the template is not readable, or the template is too long.
    """
    template = _template(directory)
    if template is None:
        return None
    if len(template) > MAX_TEMPLATE:
        raise InputError(f"{directory}: its chat template has more than {MAX_TEMPLATE:,} characters, which are not read")
    found = _IN_A_TURN.search(template) or _IN_A_VARIABLE.search(template)
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], found["text"]) if found else ""


def _template(directory: Path) -> str | None:
    """The template of a processor's files, else of the tokenizer's."""
    file = directory / "chat_template.jinja"
    if file.exists():
        try:
            if regular(file).st_size > 4 * MAX_TEMPLATE:
                raise InputError(f"{file}: more than {4 * MAX_TEMPLATE:,} bytes, which are not read")
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
            return value
    return None
