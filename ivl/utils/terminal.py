"""What strangers have named, on a terminal: names must neither rule it nor forge a line."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """Return a text on one line: control characters, line breaks and marks of the direction of writing as escapes."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], str(text))
