"""Mutations of files, and the law for what reads them: an InputError of one line or a success, in bounded memory."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ivl.errors import InputError

MUTATIONS = int(os.environ.get("IVL_FUZZ", "100"))
VALUES = [
    None, True, False, 0, 1, -1, 2, 3.5, -1.0, 1e-300, 1e30, 1e300, 2**31, 2**63, 10**30, "", "x", "false", "\ud800",
    "a" * 5000, "//////8=", "(x+x+)+y", "##", "internvl_chat", [], [[]], [1], ["x"], [None] * 3, {}, {"a": {}},
    {"type": "Precompiled"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100},
]  # fmt: skip


def changed_bytes(rng: random.Random, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """Bits flipped, bytes overwritten with extremes, cut, or inserted between two places."""
    whole = bytearray(data)
    last = len(whole) if last is None else last
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(first, max(last, first + 1))
        match rng.randrange(5):
            case 0:
                whole[at : at + 1] = bytes([whole[at] ^ 1 << rng.randrange(8)]) if at < len(whole) else b""
            case 1:
                size = rng.choice((1, 2, 4, 8))
                whole[at : at + size] = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * size
            case 2:
                del whole[at : at + rng.choice((1, 7, 100))]
            case 3:
                whole[at:at] = rng.choice((b"\xff" * 8, b"[" * 200, b"\n", b'"', b"\x00" * 4))
            case _:
                whole = whole[: max(at, 1)] if rng.random() < 0.2 else whole
    return bytes(whole)


def changed_json(rng: random.Random, value: Any) -> bytes:
    """One or two values, keys or items anywhere in an object replaced, removed or doubled; or the text damaged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        node = value
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            if rng.random() < 0.4 or not isinstance(node[key], dict | list) or not node[key]:
                match rng.randrange(8):
                    case 0:
                        del node[key]
                    case 1 if isinstance(node, dict):
                        node[rng.choice(("1e3", "-1", "", "type", "x" * 300, "99999999999"))] = node.pop(key)
                    case 2 if isinstance(node, list):
                        node.extend(copy.deepcopy([node[key]]) * rng.choice((1, 500)))
                    case _:
                        node[key] = copy.deepcopy(rng.choice(VALUES))
                break
            node = node[key]
    data = json.dumps(value).encode()
    return changed_bytes(rng, data) if rng.random() < 0.15 else data


def hammer(path: Path, mutate: Callable[[random.Random], bytes], read: Callable[[], object]) -> None:
    good = path.read_bytes()
    read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    escaped, refused = [], 0
    for seed in range(MUTATIONS):
        path.write_bytes(mutate(random.Random(f"{path.name} {seed}")))
        try:
            read()
        except InputError as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) > 3000:
                escaped.append(f"{seed}: long message {str(error)[:300]!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            escaped.append(f"{seed}: {type(error).__name__}: {str(error)[:200]}")
    path.write_bytes(good)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{path.name}: {MUTATIONS} mutations, {refused} refused, {len(escaped)} escaped, {grown >> 10} MB more")
    assert not escaped, "\n".join(escaped[:20])
    assert refused and grown < 200 << 10
