"""tokenizer.json as a program of a stranger: what may stand in it is checked before the tokenizers library builds anything.

That library aborts the process, or takes gigabytes, for some descriptions, and for others later, at a text.
"""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Any

from ivl.checkpoint.sections import FLAG, TEXT, TOKEN_ID, Section, Values
from ivl.errors import InputError, short
from ivl.processing.tokenizer import QWEN_PATTERN

LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {
    QWEN_PATTERN, LLAMA3_PATTERN, GPT2_PATTERN, r"\p{N}", r"\p{N}{1,3}", r"\d", r"\d{1,3}", r"[0-9]", r"[0-9][0-9][0-9]",
    QWEN_PATTERN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),
    " {2,}",
}  # fmt: skip
"""Regular expressions of published tokenizers (Qwen, Llama 3, GPT-2 and their kin), which are known to end on any text; of
another one, nobody can tell."""
MAX_STEPS, MAX_STEP_CHARS, MAX_GROWTH, MAX_ADDED_CHARS, MAX_MAPPED_BYTES = 32, 4096, 8, 1 << 18, 64
_INSIDE = {
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors", "decoder": "decoders",
}  # fmt: skip
_STEPS = {
    "normalizer": ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Prepend", "Replace", "Strip", "Precompiled"),
    "pre_tokenizer": ("ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"),
    "post_processor": ("ByteLevel", "TemplateProcessing"),
    "decoder": ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"),
}
_SHORT = Values(str, high=16)
_BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_KEYS = {
    **dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex", "invert", "individual_digits", "split"), FLAG),
    **dict.fromkeys(("strip_left", "strip_right"), FLAG),
    **dict.fromkeys(("prepend", "content", "str_rep"), _SHORT),
    "replacement": Values(str, high=1),
    "behavior": Values(str, choices=_BEHAVIORS),
    "prepend_scheme": Values(str, choices=("first", "never", "always")),
    **dict.fromkeys(("start", "stop"), Values(int, 0, 64)),
}
_MODEL_FLAGS = ("fuse_unk", "byte_fallback", "ignore_merges")


def check_tokenizer(tokenizer: Section) -> None:
    """Check a description of a tokenizer, part by part.

    Raises:
        InputError: if it is no BPE, or one of its steps is not known to be harmless or has parameters that are too large.
    """
    check_model(tokenizer.section("model"))
    for part in _STEPS:
        growth, steps = 1.0, _steps(tokenizer, part)
        if len(steps) > MAX_STEPS:
            raise InputError(f"{tokenizer.place}: its {part} has {len(steps)} steps, at most {MAX_STEPS} are read")
        for step in steps:
            if step.values.get("type") != "Precompiled" and len(json.dumps(step.values)) > MAX_STEP_CHARS:
                raise InputError(f"{step.place}: is longer than {MAX_STEP_CHARS} characters")
            growth *= _check_step(step, part)
        if growth > MAX_GROWTH:
            raise InputError(f"{tokenizer.place}: its {part} can make a text {growth:g} times longer, at most {MAX_GROWTH}")
    for part in ("truncation", "padding"):
        tokenizer.section(part, {})
    check_added(tokenizer.sections("added_tokens"), tokenizer.place)


def check_model(model: Section) -> None:
    """Check the model part: a BPE that encodes alike each time."""
    model.read("type", Values(str, choices=("BPE",)), "BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if value := model.values.get(key):
            raise model.refusal(key, value, "null")
    model.read("unk_token", TEXT, None)
    for key in _MODEL_FLAGS:
        model.read(key, FLAG, False)
    check_vocabulary(model.section("vocab"))


def check_vocabulary(vocab: Section) -> None:
    """Check that tokens have ids, and no two the same."""
    bad = next((token for token, i in vocab.values.items() if not TOKEN_ID.fit(i)), None)
    if bad is not None:
        raise vocab.refusal(short(bad), vocab.values[bad], str(TOKEN_ID))
    if len(set(vocab.values.values())) < len(vocab.values):
        raise InputError(f"{vocab.place}: {len(vocab.values)} tokens have only {len(set(vocab.values.values()))} ids")


def check_added(tokens: list[Section], place: object) -> None:
    """Check added tokens, which an automaton finds in every text."""
    for token in tokens:
        token.read("content", TEXT)
        for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"):
            token.read(flag, FLAG, False)
    if (total := sum(len(token.values["content"]) for token in tokens)) > MAX_ADDED_CHARS:
        raise InputError(f"{place}: added tokens have {total:,} characters, at most {MAX_ADDED_CHARS:,} are read")


def _steps(parent: Section, key: str, inside: str = "") -> list[Section]:
    """The steps of a part, with those of sequences in their place."""
    steps = parent.sections(inside) if inside else [parent.section(key, {})]
    steps = [step for step in steps if step.values]
    return [s for step in steps for s in (_steps(step, key, _INSIDE[key]) if step.values.get("type") == "Sequence" else [step])]


def _check_step(step: Section, part: str) -> float:
    """Check a step; returns how many times longer it can make a text."""
    kind = step.read("type", Values(str, choices=_STEPS[part]))
    if kind == "TemplateProcessing":
        return 1
    for key, value in step.values.items():
        if key in _KEYS:
            step.read(key, _KEYS[key], None)
        elif key == "pattern":
            _check_pattern(step, value)
        elif key == "precompiled_charsmap":
            check_charsmap(step, step.read(key, Values(str, high=1 << 20)))
        elif key != "type":
            raise step.refusal(key, value, "no such key")
    if (kind, part) == ("ByteLevel", "pre_tokenizer"):
        return 2  # each byte above 127 becomes two, and the next such step doubles them again
    if kind != "Replace":
        return MAX_GROWTH if kind == "Precompiled" else 1  # two of them could do what two replacements can
    pattern = step.section("pattern").values.get("String", " ")
    return max(1, len(step.read("content", _SHORT)) / len(pattern))


def check_charsmap(step: Section, text: str) -> None:
    """Check SentencePiece's table of characters and what stands for them: a trie's size, the trie, and short texts.

    The library reserves as much memory as the size says, and panics or aborts for one beyond the table.
    """
    data = b64decode(text)
    size = int.from_bytes(data[:4], "little")
    texts = data[4 + size :]
    texts.decode()
    if not size or size % 4 or size + 4 >= len(data) or max(map(len, texts.split(b"\0"))) > MAX_MAPPED_BYTES:
        raise step.refusal("precompiled_charsmap", text, "a table of SentencePiece")


def _check_pattern(step: Section, value: Any) -> None:
    pattern = step.section("pattern")
    if list(pattern.values) == ["String"] and pattern.read("String", _SHORT):
        return
    if list(pattern.values) != ["Regex"] or pattern.read("Regex", TEXT) not in PATTERNS:
        raise step.refusal("pattern", value, "a string, or the regular expression of a published tokenizer")
