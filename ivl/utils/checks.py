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


def check_ranges(config: Any, **intervals: str) -> None:
    """Check numbers, tuples of numbers included; None passes.

    Args:
        config: a dataclass instance; call this from its `__post_init__`.
        intervals: by the field's name its interval, such as `[0, 1)`; a bracket includes the end, `inf` is none.

    Raises:
        InputError: naming the field, the interval and the value.
    """
    for name, interval in intervals.items():
        low, high = map(float, interval[1:-1].split(","))
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            above = number is None or (low <= number if interval[0] == "[" else low < number)
            if not (above and (number is None or (number <= high if interval[-1] == "]" else number < high))):
                raise InputError(f"{name} must be in {interval}, got {value}")
