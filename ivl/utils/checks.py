"""Checks that configuration dataclasses share."""

from __future__ import annotations

import types
import typing
from typing import Any

from ivl.errors import InputError


def check_choices(config: Any, prefix: str = "") -> None:
    """Check every field whose type is a Literal, or a Literal or None.

    Args:
        config: a dataclass instance; call this from its `__post_init__`.
        prefix: stands before the field's name in the error, such as `data.`.

    Raises:
        InputError: naming the field, the choices and the value.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if not all(part is type(None) or typing.get_origin(part) is typing.Literal for part in parts):
            continue
        choices = [choice for part in parts for choice in typing.get_args(part) or (None,)]
        value = getattr(config, name)
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise InputError(f"{prefix}{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
