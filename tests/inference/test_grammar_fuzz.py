"""Any schema, pattern or grammar is compiled, or refused in one line; none takes the process, its memory or its time.

`IVL_FUZZ=500 python -m pytest tests/inference/test_grammar_fuzz.py` tries as many of each kind.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

import psutil
import pytest

pytest.importorskip("llguidance")

from ivl.errors import InputError
from ivl.inference.grammar import GrammarCompiler
from ivl.processing.tokenizer import train_tokenizer
from ivl.types import Grammar
from tests.helpers.fuzz import MUTATIONS, changed_bytes, changed_json

COUNT = min(MUTATIONS, 500) if MUTATIONS > 100 else 25
SECONDS = 60.0
"""Longest compilation on a busy machine: the limits of the trial, and a worker that starts anew."""
PARTS: list[Any] = [
    {"type": "string", "maxLength": 2**31}, {"type": "string", "minLength": 10**9}, {"enum": [[]] * 3000}, {"not": {}},
    {"type": "string", "pattern": "(a{1,900}){1,900}"}, {"type": "string", "pattern": "(a|aa|aaa)*b{2,}(?=c)"},
    {"type": "string", "pattern": "[\\w\\W]{0,5000}x"}, {"type": "array", "items": {}, "minItems": 10**7}, {"$ref": "#"},
    {"type": "integer", "minimum": -(10**300), "maximum": 10**300}, {"type": "number", "multipleOf": 1e-300},
    {"enum": ["x" * 3000] * 50}, {"$ref": "#/$defs/none"}, {"allOf": [{"$ref": "#"}, {"type": "object"}]},
    {"const": {"a": [[[[]]]]}}, {"format": "date-time", "type": "string"}, {"oneOf": [{"type": "string"}] * 60},
    {"patternProperties": {".*": {"$ref": "#"}}, "type": "object"},
    {"type": "object", "properties": {f"p{n}": {"$ref": "#"} for n in range(150)}},
]  # fmt: skip
RULES = ["a", '"x"', "/[a-z]+/", "/(a|b)*c{1,800}/", "b b", "(a|b)+", "a{1,2000}", '"\\u0000"', "start", "/(x+x+)+y/"]
PATTERNS = [
    "(a|b)", "x{1,500}", "(y{0,50}){0,50}", "[^\\n]*", "\\d", ".", "(?i:z)", "(?!q)", "\\b", "(", "]", "é", "\\p{L}", "*", "|",
]  # fmt: skip


def schema(rng: random.Random) -> str:
    """Nested parts, and one or two of their values replaced by something else."""
    value: Any = rng.choice(PARTS)
    for _ in range(rng.choice((0, 1, 2, 40))):
        match rng.randrange(4):
            case 0:
                value = {"type": "array", "items": value}
            case 1:
                value = {"type": "object", "properties": {"a": value, "b": rng.choice(PARTS)}, "required": ["a"]}
            case 2:
                value = {"anyOf": [value, rng.choice(PARTS)]}
            case _:
                value = {"$defs": {"d": value}, "$ref": "#/$defs/d"}
    return changed_json(rng, value).decode("utf-8", "replace") if rng.random() < 0.7 else json.dumps(value)


def pattern(rng: random.Random) -> str:
    parts = [
        "(a|b)",
        "x{1,500}",
        "(y{0,50}){0,50}",
        "[^\\n]*",
        "\\d",
        ".",
        "(?i:z)",
        "(?!q)",
        "\\b",
        "(",
        "]",
        "é",
        "\\p{L}",
        "*",
        "|",
    ]
    return "".join(rng.choices(parts, k=rng.choice((1, 3, 8, 200))))


def grammar(rng: random.Random) -> str:
    names = ["start", "a", "b", "c"]
    text = "\n".join(f"{name}: {' | '.join(rng.choices(RULES, k=rng.randint(1, 4)))}" for name in names[: rng.randint(1, 4)])
    return changed_bytes(rng, text.encode()).decode("utf-8", "replace") if rng.random() < 0.3 else text


@pytest.mark.parametrize(("kind", "make"), [("json_schema", schema), ("regex", pattern), ("grammar", grammar)])
def test_anything_is_compiled_or_one_line(kind: Any, make: Any) -> None:
    tokenizer = train_tokenizer(['what is {"red": [true, null, 12]}? 红色'] * 3, 320)
    end = frozenset({tokenizer.id("<|im_end|>")})
    compiler = GrammarCompiler(tokenizer, vocab_size=len(tokenizer), eos=end)
    compiler.compile(Grammar("json"))
    before = psutil.Process().memory_info().rss
    compiled, refused, slowest = 0, 0, 0.0
    for seed in range(COUNT):
        source, started = make(random.Random(f"{kind} {seed}")), time.perf_counter()
        try:
            compiler.compile(Grammar(kind, source)).allowed()
            compiled += 1
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 3000, (seed, source[:300])
        slowest = max(slowest, time.perf_counter() - started)
    grown = (psutil.Process().memory_info().rss - before) >> 20
    print(f"{kind}: {compiled} compiled, {refused} refused, slowest {slowest:.2f} s, {grown} MB more")
    assert compiled and refused and slowest < SECONDS and grown < 200
