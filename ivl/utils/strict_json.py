"""Strict reading of JSON: files, and dataclasses whose keys and types are checked by name."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ivl.errors import InputError, nearest, short
from ivl.utils.files import not_itself, regular

T = TypeVar("T")
MAX_JSON_BYTES = 64 << 20
"""Parsing a larger file would take minutes, and gigabytes."""
MAX_JSON_ITEMS = 5_000_000
"""Commas and opening brackets, which bound the values; one of two bytes takes up to 70 in memory. A tokenizer of 256,000 words
has 2,000,000."""
MAX_JSON_DEPTH = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES, surrogates: bool = True) -> Any:
    """Read the value in a JSON file; the file is untrusted.

    Args:
        path: a regular file; a pipe, a socket or a device is refused, for reading it might never end.
        limit: most bytes that are read.
        surrogates: whether strings may hold lone surrogates, which stand for bytes of file names that are not UTF-8.

    Raises:
        InputError: naming the file and the reason: it is missing, special, larger than the limit, not UTF-8 or not JSON; it
            has NaN or an infinite number, the same key twice in one object, or more than 100 levels.
    """
    try:
        size = regular(path).st_size
        with path.open("rb") as file:
            data = file.read(limit + 1) if size <= limit else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except InputError:
        raise
    except ValueError as error:  # a name that no file can have
        raise InputError(f"{short(str(path))}: cannot be read ({error})") from None
    if max(size, len(data)) > limit:
        raise InputError(f"{path}: more than {limit:,} bytes of JSON, which are not read")
    if problem := not_itself(data[:512]):
        raise InputError(f"{path}: is {problem}")
    if (count := sum(map(data.count, (b"[", b"{", b",")))) > MAX_JSON_ITEMS:
        raise InputError(f"{path}: up to {count:,} values of JSON, of which {MAX_JSON_ITEMS:,} are read")
    try:
        return _parse(data.decode("utf-8-sig"), surrogates=surrogates)
    except RecursionError:
        raise InputError(f"{path}: not valid JSON (nested too deep)") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({str(error)[:200]})") from None


def _parse(text: str, *, surrogates: bool) -> Any:
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    level, depth = [value], 0
    while level := [item for each in level if isinstance(each, dict | list) for item in _items(each)]:
        if (depth := depth + 1) > MAX_JSON_DEPTH:
            raise ValueError(f"more than {MAX_JSON_DEPTH} levels")
    if not surrogates and _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {key!r} twice")
    return value


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:20]} is no finite number")
    return value


def from_json(kind: type[T], values: Any, where: str, extra: Iterable[str] = ()) -> T:
    """A dataclass from a JSON object, the inverse of dataclasses.asdict; fields may be dataclasses themselves.

    Args:
        where: the place, such as `chain.json: stage 2`; every error starts with it.
        extra: further keys that the object may have, which are left to the caller.

    Raises:
        InputError: for an unknown key (with the nearest known one), a missing key, a value of another type, or one that the
            dataclass refuses.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    extra = tuple(extra)
    if not isinstance(values, dict):
        raise InputError(f"{where}: must be an object, got {short(values)}")
    for key in values:
        if key not in fields and key not in extra:
            raise InputError(f"{where}: unknown key {short(key)}; {nearest(key, [*fields, *extra], 'keys')}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{where}: {name} is missing")
    arguments = {}
    for name, value in values.items():
        try:
            arguments |= {name: _value(hints[name], value, f"{where}: {name}")} if name in fields else {}
        except _Misfit:
            raise InputError(f"{where}: {name} must be {_describe(hints[name])}, got {short(value)}") from None
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:  # the dataclass's own checks, which do not know the place
        raise InputError(f"{where}: {error}") from error


class _Misfit(Exception):
    """Raised for a value of another type than its hint."""


def _value(hint: Any, value: Any, where: str) -> Any:
    """The value as its field holds it: lists as tuples, objects as dataclasses where the hint names one."""
    origin, inner, kind = typing.get_origin(hint), typing.get_args(hint), int | float if hint is float else hint
    if _is_union(hint):
        for choice in inner:
            with suppress(_Misfit):
                return _value(choice, value, where)
    elif hint is Any or (origin is typing.Literal and value in inner):
        return value
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        kinds = inner if origin is tuple and inner[-1] is not ... else inner[:1] * len(value)
        if len(kinds) == len(value):
            return origin(_value(kind, each, f"{where}[{n}]") for n, (kind, each) in enumerate(zip(kinds, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {key: _value(inner[1], each, f"{where}[{key!r}]") for key, each in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_json(typing.cast(type, hint), value, where)
    elif origin is None and isinstance(value, kind) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _Misfit


def _describe(hint: Any) -> str:
    """A type in the words of JSON."""
    if _is_union(hint):
        return " or ".join(map(_describe, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    names: dict[Any, str] = {type(None): "null", bool: "true or false", str: "a string", int: "an integer", float: "a number"}
    return names.get(hint) or (hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", ""))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
