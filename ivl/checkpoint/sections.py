"""Checked reading of objects that strangers wrote: JSON files of a model directory, and the fields of a GGUF file.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ivl.errors import InputError, short
from ivl.utils.strict_json import read_json

REQUIRED: Any = object()
"""Default of a key that must be there."""


class Values(NamedTuple):
    """The values that a key may have: those of a type, within bounds (both included) or among choices.

    The upper bound of a text is that of its length.
    """

    type: type
    low: float = -1e30
    high: float = 1e30
    choices: tuple[str, ...] = ()

    def fit(self, value: Any) -> bool:
        """Return whether a value is one of these; NaN never is, and a truth value is no number."""
        if self.type in (int, float):
            number = isinstance(value, int | float if self.type is float else int) and not isinstance(value, bool)
            return number and self.low <= value <= self.high
        if self.choices or not isinstance(value, self.type):
            return isinstance(value, str) and value in self.choices
        return self.type is not str or len(value) <= self.high

    def __str__(self) -> str:
        if self.choices:
            return " or ".join(map(repr, self.choices))
        if self.type in (int, float):
            return f"a {'whole ' if self.type is int else ''}number from {self.low:g} to {self.high:.12g}"
        if self.type is str and self.high < 1e30:
            return f"a text of at most {self.high:g} characters"
        return {bool: "true or false", str: "a text", dict: "an object"}[self.type]


FLAG, TEXT, OBJECT = Values(bool), Values(str), Values(dict)
TOKEN_ID = Values(int, 0, (1 << 22) - 1)


@dataclass(frozen=True)
class Section:
    """An object of a file, with errors that name the place."""

    values: Mapping[str, Any]
    place: str

    def read(self, key: str, kind: Values, default: Any = REQUIRED) -> Any:
        """Return a value that is checked to be of its kind, or the default if it is absent or null.

        A list of equal numbers counts as one: transformers writes the side of a square twice.
        """
        value = self.values.get(key)
        if value is None and default is not REQUIRED:
            return default
        if isinstance(value, list) and kind.type in (int, float) and value and all(v == value[0] for v in value):
            value = value[0]
        if value is None:
            raise InputError(f"{self.place}: {key} is missing; expected {kind}")
        if not kind.fit(value):
            raise self.refusal(key, value, str(kind))
        return value

    def items(self, key: str, kind: Values, default: Any = REQUIRED) -> list[Any]:
        """Return a list whose items are checked to be of a kind, or the default if it is absent or null."""
        value = self.values.get(key)
        if value is None and default is not REQUIRED:
            return default
        if not isinstance(value, list):
            raise self.refusal(key, value, "a list")
        for number, item in enumerate(value):
            if not kind.fit(item):
                raise self.refusal(f"{key}[{number}]", item, str(kind))
        return value

    def section(self, key: str, default: Any = REQUIRED) -> Section:
        """Return an object inside this one, or the default as one if it is absent or null."""
        return Section(self.read(key, OBJECT, default), f"{self.place}: {key}")

    def sections(self, key: str) -> list[Section]:
        """Return a list of objects inside this one, empty if it is absent."""
        return [Section(item, f"{self.place}: {key}[{n}]") for n, item in enumerate(self.items(key, OBJECT, []))]

    def require(self, constants: Mapping[str, Any]) -> None:
        """Refuse another value of a key that is there."""
        for key, expected in constants.items():
            value = self.values.get(key)
            if value is not None and value != expected:
                raise InputError(f"{self.place}: {key} is {short(value)}; only {expected!r} is supported")

    def refusal(self, key: str, value: Any, expected: str) -> InputError:
        """Return the error for a value."""
        return InputError(f"{self.place}: {key} is {short(value)}, expected {expected}")


def open_section(path: Path, *, optional: bool = False) -> Section:
    """Read a JSON file as a section; an optional one that is not there is empty.

    Raises:
        InputError: if the file is no JSON object of at most 64 MB.
    """
    if optional and not path.exists() and not path.is_symlink():
        return Section({}, str(path))
    value = read_json(path, surrogates=False)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return Section(value, str(path))


def added_tokens(directory: Path, *files: str) -> dict[int, Section]:
    """Return added tokens by id, in order, each with its `content` and flags, from the tokenizer files that list them.

    Args:
        files: added_tokens.json, tokenizer_config.json or tokenizer.json; a later one counts more.
    """
    tokens: dict[int, Section] = {}
    for name in files:
        section = open_section(directory / name, optional=True)
        if name == "added_tokens.json":
            for text in section.values:
                tokens[section.read(text, TOKEN_ID)] = Section({"content": text, "special": True}, section.place)
        elif name == "tokenizer.json":
            tokens |= {token.read("id", TOKEN_ID): token for token in section.sections("added_tokens")}
        else:
            rows = section.section("added_tokens_decoder", {})
            for key in rows.values:
                if not (key.isascii() and key.isdigit() and len(key) < 8):
                    raise InputError(f"{rows.place}: key {short(key)} is no token id")
                tokens[int(key)] = rows.section(key)
    for token in tokens.values():
        token.read("content", TEXT)
    return dict(sorted(tokens.items()))
