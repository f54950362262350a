"""Grammars as strangers write them: their form for llguidance, limits of their size, and a trial that can be ended.

A schema of thirty characters may take llguidance a minute, and a long chain of references overflows its stack.
"""

from __future__ import annotations

import json
import math
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ivl.errors import short
from ivl.types import Grammar
from ivl.utils.killable import Killable

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CHARS, MAX_LEVELS = 100_000, 100
MAX_COUNTS = {"references": 500, "properties": 1_000, "choices": 2_000}
"""Of a whole schema: uses of $ref, properties, and items of enum, anyOf and the like."""
CPU_SECONDS, WALL_SECONDS, MEGABYTES, STACK_BYTES = 1.0, 30.0, 256, 4 << 20
"""Limits of a trial. A thread that compiles has twice this stack."""
MAX_ITEMS = 20_000
"""Items of llguidance's parser in one step. With its limits on regular expressions a token mask takes some tenths of a second
at most."""
COMPACT: Any = {"whitespace_flexible": False}
"""JSON without white space between its parts, which costs tokens: a model may write nothing else."""


class TokenTable(NamedTuple):
    """The tokens of a model by id, empty where an id has none."""

    tokens: Sequence[bytes]
    special: Sequence[int]
    eos: Sequence[int]


def build_vocabulary(table: TokenTable, encode: Callable[[str], Sequence[int]], slices: list[str] | None = None) -> LLTokenizer:
    """Return a vocabulary for llguidance.

    Args:
        encode: Gives the tokens of a text that the grammar allows no alternative to.
        slices: llguidance's: an empty list makes the vocabulary faster to build and slower to use.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    class Wrapped:
        eos_token_id, bos_token_id, tokens, special_token_ids = table.eos[0], None, table.tokens, table.special

        def __call__(self, text: str | bytes) -> Sequence[int]:
            return encode(text.decode(errors="replace") if isinstance(text, bytes) else text)

    return LLTokenizer(TokenizerWrapper(Wrapped()), n_vocab=len(table.tokens), eos_token=list(table.eos), slices=slices)


def compile_source(vocabulary: LLTokenizer, source: str) -> LLMatcher:
    """Compile a grammar and compute its first token mask; the matcher is in its error state if that fails."""
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(vocabulary, source, log_level=0, limits=LLParserLimits(step_max_items=MAX_ITEMS))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def killable_trial(table: TokenTable) -> Killable:
    """Return a function that compiles a source in another process, and raises CallStopped if that meets a limit."""
    limits = {"cpu_seconds": CPU_SECONDS, "wall_seconds": WALL_SECONDS, "megabytes": MEGABYTES}
    return Killable("ivl.utils.grammars:make_trial", table, **limits)


def make_trial(table: TokenTable) -> Callable[[str], None]:
    """Return the function that `killable_trial` calls in its worker."""
    bytes_of = {token: number for number, token in enumerate(table.tokens) if len(token) == 1}
    vocabulary = build_vocabulary(table, lambda text: [bytes_of.get(bytes([byte]), 0) for byte in text.encode()], slices=[])
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))

    def trial(source: str) -> None:
        compile_source(vocabulary, source)

    return trial


def read_source(grammar: Grammar) -> str:
    """Return a grammar in the form that llguidance compiles.

    Raises:
        ValueError: if it cannot be read, or is larger than the limits of this module.
    """
    from llguidance import LLMatcher

    grammar.value.encode()  # UnicodeEncodeError, a ValueError, for lone surrogates
    if len(grammar.value) > MAX_CHARS:
        raise ValueError(f"it has {len(grammar.value):,} characters, the limit is {MAX_CHARS:,}")
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.value)
    if grammar.kind == "grammar":
        return LLMatcher.grammar_from_lark(_from_gbnf(grammar.value) if "::=" in grammar.value else grammar.value)
    try:
        text = grammar.value or '{"type":"object"}'
        value = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError(f"it has more than {MAX_LEVELS} levels") from None
    if grammar.kind == "choice":
        return _choice(value)
    if not isinstance(value, dict):
        raise ValueError("a schema is a JSON object")
    _check_size(value)
    value.pop("x-guidance", None)  # llguidance's options for white space
    return LLMatcher.grammar_from_json_schema(value, overrides=COMPACT)


def _from_gbnf(text: str) -> str:
    """Return a grammar of llama.cpp's form (GBNF) in Lark's."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except Exception as error:  # its own kind, which has no base, and RecursionError
        raise ValueError(f"not GBNF: {str(error)[:200]}") from error


def _whole(number: str) -> int:
    """Read a whole number of JSON that llguidance can take."""
    if len(number) > 20 or not -(2**63) <= int(number) < 2**64:
        raise ValueError(f"a whole number is in [-2^63, 2^64 - 1], got {short(number)}")
    return int(number)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"a number is finite, got {short(number)}")
    return value


def _choice(choices: Any) -> str:
    """Return a grammar in Lark's form that allows these texts."""
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("choices are a JSON list of texts, none of them empty")
    if len(choices) > (limit := MAX_COUNTS["choices"]):
        raise ValueError(f"there are {len(choices):,} choices, the limit is {limit:,}")
    # Lark does not take DEL, which JSON leaves unescaped.
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in choices)


def schema_counts(schema: dict[str, Any]) -> Counter[str]:
    """Count the levels of a schema, and its references, properties and choices in all."""
    counts: Counter[str] = Counter()
    level: list[Any] = [schema]
    while level:
        counts["levels"] += 1
        inside: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                counts["references"] += "$ref" in part
                properties = part.get("properties")  # a property of this name may have the schema true
                counts["properties"] += len(properties) if isinstance(properties, dict) else 0
                counts["choices"] += sum(len(value) for value in part.values() if isinstance(value, list))
                inside += part.values()
            elif isinstance(part, list):
                inside += part
        level = inside
    return counts


def _check_size(schema: dict[str, Any]) -> None:
    """Raise ValueError if a schema has more of something than its limit."""
    counts = schema_counts(schema)
    if counts["levels"] > MAX_LEVELS:
        raise ValueError(f"it has more than {MAX_LEVELS} levels")
    for name, limit in MAX_COUNTS.items():
        if counts[name] > limit:
            raise ValueError(f"it has {counts[name]:,} {name}, the limit is {limit:,}")


def close_objects(schema: dict[str, Any]) -> None:
    """Forbid other properties, in place, in every object of a schema that lists its properties and leaves this open.

    A schema with allOf stays as it is: its parts describe one object, and closing each could allow nothing at all.
    """
    todo: list[Any] = [] if '"allOf"' in json.dumps(schema) else [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        if not isinstance(part, dict):
            continue
        if "properties" in part and not part.keys() & {"additionalProperties", "patternProperties", "$ref"}:
            part["additionalProperties"] = False
        todo += [part[key] for key in ("items", "prefixItems", "anyOf", "oneOf") if key in part]
        for key in ("properties", "$defs", "definitions"):
            todo += part[key].values() if isinstance(part.get(key), dict) else ()
