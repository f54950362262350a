"""Guided replies are what their guide says, whatever the model is and whatever else is in the batch."""

from __future__ import annotations

import json
import random
import re
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance")
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ivl.errors import InputError
from ivl.inference import grammar as grammar_module
from ivl.inference.engine import Engine
from ivl.inference.grammar import GrammarCompiler
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer, train_tokenizer
from ivl.types import Grammar, SamplingParams
from ivl.utils.grammars import close_objects
from tests.conftest import tiny_config
from tests.helpers.engines import ask, assert_idle, enliven

CHOICES = (
    "red",
    "red and blue",
    "红色",
    "红",
    "🎉👍🏽",
    "🇨🇭",
    'say "no"',
    "a\\b",
    "two\nlines",
    "\x7f\x01",
    "/x/",
    "<|im_end|>",
    "<IMG_CONTEXT>",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        ['what colour is the shape? {"red": "green", "blue": [true, false, null, 12, -3.5]} 红色 🎉'] * 3, 320
    )


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    config = replace(
        tiny_config(),
        decoder=replace(tiny_config().decoder, vocab_size=len(tokenizer), max_positions=2000),
        image_token_id=tokenizer.id("<IMG_CONTEXT>"), eos_token_ids=(tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>")),
        system_message="",
    )  # fmt: skip
    torch.manual_seed(1)
    model = VLM(config).eval()
    model.init_weights()
    enliven(model)
    return Engine(model, Processor(config, tokenizer), max_cache_tokens=32768, block_size=16)


def schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A small schema of any of the common keywords; its texts are short, so that random ones end."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    if depth < 3:
        kinds += 3 * ["object", "array"] + ["anyOf", "ref"]
    kind = rng.choice(kinds)
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-f]{2,4}$", "^(红|绿)色$", "^\\d{4}-\\d{2}$"])}
    if kind == "integer":
        return {"type": "integer", "minimum": (low := rng.randint(-50, 50)), "maximum": low + rng.randint(0, 2000)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 10}
    if kind == "enum":
        return {"enum": rng.sample(["red", "红色", "🎉", 3, None, True, 'a"b'], 3)}
    if kind == "const":
        return {"const": rng.choice(["x", 7, {"a": [1]}])}
    if kind == "object":
        names = rng.sample(["name", "colour", "数", "b c"], rng.randint(0, 3))
        return {
            "type": "object", "properties": {name: schema(rng, depth + 1) for name in names},
            "required": [name for name in names if rng.random() < 0.7], "additionalProperties": False,
        }  # fmt: skip
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": schema(rng, depth + 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "ref":
        return {"$ref": "#/$defs/leaf"}
    return {"anyOf": [schema(rng, depth + 1), schema(rng, depth + 1)]}


def fits(value: Any, rule: dict[str, Any]) -> bool:
    """Whether a value follows a schema, by plain definitions."""
    if "$ref" in rule:
        return value in ("leaf", "叶")
    if "anyOf" in rule:
        return any(fits(value, each) for each in rule["anyOf"])
    if "enum" in rule or "const" in rule:
        return any(type(value) is type(each) and value == each for each in rule.get("enum", [rule.get("const")]))
    if rule["type"] == "object":
        known = rule["properties"]
        return (
            isinstance(value, dict) and set(rule["required"]) <= set(value) <= set(known)
            and all(fits(each, known[name]) for name, each in value.items())
        )  # fmt: skip
    if rule["type"] == "array":
        whole = isinstance(value, list) and rule["minItems"] <= len(value) <= rule["maxItems"]
        return whole and all(fits(each, rule["items"]) for each in value)
    if rule["type"] == "string":
        if not isinstance(value, str):
            return False
        return (
            bool(re.search(rule["pattern"], value))
            if "pattern" in rule
            else rule["minLength"] <= len(value) <= rule["maxLength"]
        )
    if rule["type"] in ("integer", "number"):
        kinds = (int,) if rule["type"] == "integer" else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and rule["minimum"] <= value <= rule["maximum"]
    return isinstance(value, bool) if rule["type"] == "boolean" else value is None


def schemas(count: int) -> list[dict[str, Any]]:
    return [{**schema(random.Random(seed)), "$defs": {"leaf": {"enum": ["leaf", "叶"]}}} for seed in range(count)]


def test_replies_follow_forty_schemas(engine: Engine) -> None:
    rules = schemas(40)
    params = [
        SamplingParams(max_new_tokens=1500, temperature=1.0, seed=n, guide=Grammar("json_schema", json.dumps(rule)))
        for n, rule in enumerate(rules)
    ]
    replies = engine.generate([ask("what colour?")] * len(rules), params)
    for rule, reply in zip(rules, replies, strict=True):
        assert reply.finish_reason == "stop", rule
        assert fits(json.loads(reply.text), rule), (rule, reply.text)
    assert_idle(engine)


def test_guides_of_every_kind_and_requests_without_do_not_disturb_each_other(engine: Engine) -> None:
    sampled = SamplingParams(max_new_tokens=300, temperature=1.0)
    grammar = 'start: pair ("," pair)*\npair: /[a-c]{1,3}/ "=" /[0-9]/'
    guides = [
        None, Grammar("json"), Grammar("choice", json.dumps(CHOICES)), None, Grammar("regex", "[a-f]{3}(红|🎉)?"),
        Grammar("grammar", grammar), Grammar("json_schema", '{"type": "integer"}'),
    ]  # fmt: skip
    params = [
        replace(sampled, seed=n, guide=guide, temperature=n % 2, presence_penalty=0.5 * (n % 3))
        for n in range(3)
        for guide in guides
    ]
    asked = [ask(f"question {n}") for n in range(len(params))]
    together = engine.generate(asked, params)
    alone = [engine.generate([question], each)[0] for question, each in zip(asked, params, strict=True)]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    checks = {
        "json": lambda text: isinstance(json.loads(text), dict), "choice": lambda text: text in CHOICES,
        "regex": lambda text: re.fullmatch("[a-f]{3}(红|🎉)?", text),
        "grammar": lambda text: re.fullmatch("[a-c]{1,3}=[0-9](,[a-c]{1,3}=[0-9])*", text),
        "json_schema": lambda text: isinstance(json.loads(text), int),
    }  # fmt: skip
    for each, reply in zip(params, together, strict=True):
        if each.guide is not None and reply.finish_reason == "stop":
            assert checks[each.guide.kind](reply.text), (each.guide, reply.text)
    whole = [reply.finish_reason == "stop" for each, reply in zip(params, together, strict=True) if each.guide]
    assert sum(whole) >= 0.7 * len(whole)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_single_choice_is_said_to_the_letter(engine: Engine, choice: str) -> None:
    params = SamplingParams(temperature=1.0, guide=Grammar("choice", json.dumps([choice])))
    (reply,) = engine.generate([ask("which?")], params)
    assert (reply.text, reply.finish_reason) == (choice, "stop")


def test_every_choice_can_be_said(engine: Engine) -> None:
    guide = Grammar("choice", json.dumps(CHOICES))
    params = [SamplingParams(temperature=30.0, seed=n, guide=guide) for n in range(150)]
    said = {reply.text for reply in engine.generate([ask("which?")] * len(params), params)}
    assert said <= set(CHOICES) and len(said) > 8


def test_control_tokens_are_never_allowed_and_end_tokens_where_the_reply_may_end(tokenizer: Tokenizer) -> None:
    ends = frozenset([tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>")])
    compiler = GrammarCompiler(tokenizer, vocab_size=len(tokenizer) + 5, eos=ends)
    matcher = compiler.compile(Grammar("regex", "(?s:.{2,})"))
    for step in range(4):
        allowed = matcher.allowed()
        assert allowed.shape == (len(tokenizer) + 5,) and not allowed[len(tokenizer) :].any()
        control = {n for n in range(len(tokenizer)) if tokenizer.is_control(n)}
        assert {n for n in control if allowed[n]} == (ends if step >= 2 else set())
        assert allowed[tokenizer.id("<box>")]  # grounding markers are text
        assert matcher.advance(tokenizer.encode("x")[0]) is None
    assert matcher.advance(min(ends)) == "stop"


def test_a_reply_that_is_cut_says_so_and_ends_are_not_needed_where_nothing_can_follow(engine: Engine) -> None:
    long = SamplingParams(max_new_tokens=5, guide=Grammar("regex", "(ab){100}"))
    (reply,) = engine.generate([ask("go")], long)
    assert reply.finish_reason == "length" and ("ab" * 100).startswith(reply.text) and reply.text
    (reply,) = engine.generate([ask("go")], replace(long, max_new_tokens=500, ignore_eos=True))
    assert reply.finish_reason == "stop" and reply.text == "ab" * 100


def test_a_guide_that_becomes_too_complex_cuts_its_own_reply_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    hard = Grammar("regex", "(a|b)*a(a|b){30}c")
    plain = SamplingParams(max_new_tokens=12, temperature=1.0, seed=1)
    (expected,) = engine.generate([ask("go")], plain)
    with monkeypatch.context() as patch:

        def limited(vocabulary: LLTokenizer, source: str) -> LLMatcher:
            return LLMatcher(vocabulary, source, log_level=0, limits=LLParserLimits(max_lexer_states=20))

        patch.setattr(grammar_module, "compile_source", limited)
        params = [replace(plain, max_new_tokens=200, guide=hard), plain]
        cut, other = engine.generate([ask("go")] * 2, params)
    assert cut.finish_reason == "length" and re.fullmatch("[ab]*", cut.text) and len(cut.tokens) < 200
    assert other.text == expected.text
    assert_idle(engine)
    with pytest.raises(KeyError):  # copies share states that are counted: the next request compiles it anew
        engine.grammars._compiled[hard]


def test_a_grammar_whose_tokens_take_long_cuts_its_own_reply_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of this grammar takes longer than the one before: 195 took 53 s without a limit."""
    ambiguous = Grammar("grammar", 'start: s\ns: s s s | s s | "a" | ""')
    matcher, started, token = engine.grammars.compile(ambiguous), time.process_time(), engine.processor.tokenizer.encode("a")[0]
    count = 0
    while count < 1000:
        count += 1
        assert matcher.allowed()[token]
        if matcher.advance(token) == "length":
            break
    assert 10 < count < 500 and time.process_time() - started < 10
    plain = SamplingParams(max_new_tokens=12, temperature=1.0, seed=1)
    (expected,) = engine.generate([ask("go")], plain)
    monkeypatch.setattr(grammar_module, "EXTRA_SECONDS", -1.0)
    cut, other = engine.generate([ask("go")] * 2, [replace(plain, guide=Grammar("regex", "[ab]{9}")), plain])
    assert cut.finish_reason == "length" and len(cut.tokens) == 1 and other.text == expected.text
    assert_idle(engine)


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (Grammar("json_schema", "{"), "json_schema cannot be read"),
        (Grammar("json_schema", "[1]"), "json_schema cannot be read"),
        (Grammar("json_schema", '{"type": "text"}'), "Invalid type: text"),
        (Grammar("json_schema", '{"properties": {"a": {"anyOf": [{}, {"items": {"type": "text"}}]}}}'), "Invalid type: text"),
        (Grammar("json_schema", '{"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": 3}}}'), "type"),
        (Grammar("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'), "greater than maximum"),
        (Grammar("json_schema", '{"$ref": "#"}'), "no text that it allows"),
        *(
            (Grammar("json_schema", f'{{"properties": {value}}}'), "properties must be an object")
            for value in ("5", "true", '"a"')
        ),
        (Grammar("json_schema", '{"minimum": 1e999}'), "a number is finite, got '1e999'"),
        (Grammar("json_schema", '{"enum": [1, NaN]}'), "a number is finite, got 'NaN'"),
        (Grammar("json_schema", '{"const": -Infinity}'), "a number is finite, got '-Infinity'"),
        (Grammar("json_schema", f'{{"minimum": {10**60}}}'), "a whole number is in [-2^63, 2^64 - 1], got '1000"),
        (Grammar("json_schema", f'{{"enum": [-1{"0" * 9000}]}}'), "a whole number is in [-2^63, 2^64 - 1], got '-1000"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", r"[^\s\S]"), "no text that it allows"),
        (Grammar("grammar", "start: foo"), "unknown name"),
        (Grammar("choice", "red"), "choice cannot be read"),
        (Grammar("choice", "[]"), "JSON list of texts"),
        (Grammar("choice", '["a", 3]'), "JSON list of texts"),
    ],
)
def test_grammars_that_cannot_be_followed_are_refused_with_the_reason(engine: Engine, guide: Grammar, words: str) -> None:
    with pytest.raises(InputError, match=f"{guide.kind} cannot be .*") as caught:
        engine.prepare(ask("which?"), SamplingParams(guide=guide))
    assert words in str(caught.value) and len(str(caught.value)) < 600 and "<state>" not in str(caught.value)


def chain(count: int) -> dict[str, Any]:
    """A schema whose references lead from one to the next."""
    rules = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(count)} | {f"d{count}": {"type": "integer"}}
    return {"$ref": "#/$defs/d0", "$defs": rules}


def nested(levels: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(levels - 1)} if levels else {"type": "integer"}


RULES = "".join(f'r{n}: r{n + 1} | "x{n}"\n' for n in range(4000))
SCHEMAS = {
    "multiple": ({"type": "integer", "multipleOf": 999983}, "more than 1 s of processor time"),
    "multiples": ({"properties": {f"p{n}": {"multipleOf": 30011 + n} for n in range(200)}}, "more than 1 s of processor time"),
    "intersection": ({"allOf": [{"type": "string", "pattern": f"{n}"} for n in range(300)]}, "more than"),
    "references": (chain(1000), "1,001 references, the limit is 500"),
    "deep": (nested(300), "more than 100 levels"),
    "properties": ({"properties": {f"p{n}": {} for n in range(3000)}}, "3,000 properties, the limit is 1,000"),
    "enum": ({"enum": list(range(3000))}, "3,000 choices, the limit is 2,000"),
}
HUGE = {name: (Grammar("json_schema", json.dumps(schema)), words) for name, (schema, words) in SCHEMAS.items()} | {
    "deeper": (Grammar("json_schema", '{"items":' * 11_000 + "1"), "more than 100 levels"),
    "broken": (Grammar("choice", "[" * 90_000), "more than 100 levels"),
    "rules": (Grammar("grammar", f'start: r0\n{RULES}r4000: "y"'), "more levels than its stack holds"),
    "forced": (Grammar("regex", "((x{1000}){1000}){1000}"), "more than"),
    "choices": (Grammar("choice", json.dumps([f"{n}" for n in range(6_000)])), "6,000 choices, the limit is 2,000"),
    "long": (Grammar("regex", "a" * 100_001), "100,001 characters, the limit is 100,000"),
    "surrogate": (Grammar("grammar", 'start: "\ud800"'), "surrogates"),
}


@pytest.mark.parametrize("name", HUGE)
def test_grammars_that_would_take_the_process_are_refused_with_the_limit(engine: Engine, name: str) -> None:
    """A minute of compiling, a stack that overflows, and gigabytes end in another process; at once the second time."""
    guide, words = HUGE[name]
    started = time.process_time()
    for _ in range(2):
        with pytest.raises(InputError, match=f"{guide.kind} cannot be .*({words})") as caught:
            engine.prepare_all(ask("which?"), [SamplingParams(guide=guide)] * 3)
        assert len(str(caught.value)) < 600 and "panic" not in str(caught.value)
    assert time.process_time() - started < 2


def test_references_up_to_the_limit_are_followed(engine: Engine) -> None:
    guide = Grammar("json_schema", json.dumps(chain(499)))
    (reply,) = engine.generate([ask("how many?")], SamplingParams(guide=guide, max_new_tokens=50))
    assert reply.text[:1] in "-0123456789"


def test_a_grammar_is_compiled_once_for_all_replies_of_an_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    plain = grammar_module.compile_source
    monkeypatch.setattr(grammar_module, "compile_source", lambda *args: compiled.append(args[1]) or plain(*args))
    params = [SamplingParams(guide=Grammar("regex", "[a-d]{9}"), temperature=1.0, seed=n) for n in range(5)]
    first = engine.generate([ask("go")] * 5, params)
    assert [reply.text for reply in engine.generate([ask("go")] * 5, params)] == [reply.text for reply in first]
    assert len(compiled) == 1 and len({reply.text for reply in first}) > 1
    many = GrammarCompiler(engine.processor.tokenizer, vocab_size=engine.model.config.decoder.vocab_size, eos=engine.eos)
    for n in range(70):
        many.compile(Grammar("regex", f"a{{{n + 1}}}"))
    assert len(many._compiled) == grammar_module.MAX_REMEMBERED // grammar_module.MIN_COUNTED == 66
    for text in ("a" * 200_000, "a" * 90_000):  # the first is too long to be compiled
        with suppress(InputError):
            many.compile(Grammar("choice", json.dumps([text])))
    assert [len(known.value) for known in many._compiled] == [90_004]


def test_json_has_no_white_space_between_its_parts(engine: Engine) -> None:
    rule: dict[str, Any] = {
        "type": "object", "properties": {"a": {"const": [1, 2]}, "b": {"const": {"c": "d e"}}}, "required": ["a", "b"],
        "x-guidance": {"whitespace_flexible": True},
    }  # fmt: skip
    close_objects(rule)
    params = SamplingParams(guide=Grammar("json_schema", json.dumps(rule)), max_new_tokens=60, temperature=1.0, seed=1)
    assert engine.generate([ask("go")], params)[0].text == '{"a":[1,2],"b":{"c":"d e"}}'


def test_objects_that_are_open_are_closed_where_their_schema_does_not_say() -> None:
    def item(**more: Any) -> dict[str, Any]:
        return {"properties": {"x": {}}, **more}

    def schema(**more: Any) -> dict[str, Any]:
        return {
            "properties": {"a": item(**more), "b": {"items": item(**more)}, "c": {"type": "object"}}, "enum": [item()], **more,
            "anyOf": [item(**more), item(additionalProperties=True), {"$ref": "#/$defs/d"}], "$defs": {"d": item(**more)},
        }  # fmt: skip

    given, combined = schema(), {"allOf": [item(), {"$ref": "#/$defs/d"}], "$defs": {"d": item()}}
    close_objects(given)
    close_objects(combined)
    assert given == schema(additionalProperties=False)
    assert combined == {"allOf": [item(), {"$ref": "#/$defs/d"}], "$defs": {"d": item()}}


def test_a_huge_schema_at_fault_is_refused_in_short_time(tokenizer: Tokenizer) -> None:
    wide = {"properties": {f"p{n}": {"type": "string"} for n in range(500)} | {"last": {"type": "text"}}}
    compiler = GrammarCompiler(tokenizer, vocab_size=len(tokenizer), eos=frozenset([tokenizer.id("<|im_end|>")]))
    with pytest.raises(InputError, match="cannot be followed: Invalid type"):
        compiler.compile(Grammar("json_schema", json.dumps(wide)))


def test_a_property_may_be_named_properties_and_numbers_may_have_sixty_four_bits(engine: Engine) -> None:
    for schema in ({"properties": {"properties": True}}, {"enum": [2**64 - 1, -(2**62), 1.5]}):
        engine.prepare(ask("which?"), SamplingParams(guide=Grammar("json_schema", json.dumps(schema))))
