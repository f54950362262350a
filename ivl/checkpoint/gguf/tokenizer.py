"""Vocabularies of GGUF files as tokenizers, and tokenizers as vocabularies of GGUF files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from ivl.checkpoint.tokenizer_json import LLAMA3_PATTERN
from ivl.checkpoint.vocabulary import append_tokens, sentencepiece_bpe
from ivl.errors import InputError
from ivl.processing.tokenizer import GROUNDING, QWEN_PATTERN, Tokenizer, set_bos, spelling_of, token_text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens."""
# Names that GGUF files give to the rule that splits text before merging.
_QWEN = ("qwen2", "deepseek-r1-qwen")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_GPT2 = ("gpt-2", "mpt", "olmo", "jais")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """The tokenizer as a GGUF file describes it; fields have the names of its keys."""

    model: str = ""
    """gpt2 (byte-level BPE with merges) or llama (SentencePiece pieces with scores)."""
    pre: str = "default"
    """Name of the rule that splits text before BPE, such as qwen2 or smollm."""
    tokens: list[str]
    token_type: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    padding_token_id: int | None = None
    unknown_token_id: int | None = None
    add_bos_token: bool = False
    add_space_prefix: bool = False


def tokenizer_from_gguf(vocabulary: GgufVocabulary) -> Tokenizer:
    """Build byte-level BPE (kind gpt2) or SentencePiece BPE (kind llama), without the unused tokens that pad the end.

    Raises:
        InputError: for another kind of vocabulary or an unknown splitting rule; a guess would encode text wrongly in silence.
    """
    size = len(vocabulary.tokens)
    while size and vocabulary.token_type[size - 1] == UNUSED:
        size -= 1
    tokens = vocabulary.tokens[:size]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < size:
        raise InputError(f"the GGUF vocabulary of {size} tokens has {size - len(ids)} of them twice")
    if vocabulary.model == "gpt2":
        pre = vocabulary.pre
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
        backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre in _LLAMA3))
        backend.normalizer = normalizers.NFC() if pre in _QWEN else None
        backend.pre_tokenizer, backend.decoder = _splitting(pre), decoders.ByteLevel()
    elif vocabulary.model == "llama":
        backend = _sentencepiece(vocabulary, ids)
    else:
        raise InputError(f"the GGUF vocabulary is of kind {vocabulary.model!r}; supported are 'gpt2' and 'llama'")
    kinds = enumerate(vocabulary.token_type[:size])
    named = {i: kind == CONTROL for i, kind in kinds if kind in (CONTROL, USER_DEFINED)}
    added = {i: AddedToken(tokens[i], special=special, normalized=False) for i, special in named.items()}
    append_tokens(backend, added, "the GGUF vocabulary")
    ends = {"bos": vocabulary.bos_token_id, "eos": vocabulary.eos_token_id, "pad": vocabulary.padding_token_id}
    config: dict[str, Any] = {f"{name}_token": tokens[i] for name, i in ends.items() if i is not None and i < size}
    add_bos = vocabulary.add_bos_token and "bos_token" in config
    if add_bos:
        set_bos(backend, vocabulary.bos_token_id)
    return Tokenizer(backend, config={**config, "add_bos_token": add_bos})


def _splitting(pre: str) -> pre_tokenizers.PreTokenizer:
    """The rule of that name, by which text is split before merging."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _QWEN + _LLAMA3:
        pattern = tokenizers.Regex(QWEN_PATTERN if pre in _QWEN else LLAMA3_PATTERN)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), plain])
    if pre in _GPT2:
        return pre_tokenizers.Sequence([gpt2])
    if pre in _SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    known = ", ".join(_QWEN + _LLAMA3 + _GPT2 + _SINGLE_DIGITS)
    raise InputError(f"the GGUF tokenizer splits text by the rule {pre!r}; known are {known}")


def _sentencepiece(vocabulary: GgufVocabulary, ids: dict[str, int]) -> tokenizers.Tokenizer:
    if not vocabulary.scores:
        raise InputError("the GGUF vocabulary is SentencePiece but has no scores (tokenizer.ggml.scores)")
    rows = zip(vocabulary.tokens, vocabulary.token_type, vocabulary.scores, strict=True)
    scores = {token: score for token, kind, score in rows if kind == NORMAL}
    unknown = None if vocabulary.unknown_token_id is None else vocabulary.tokens[vocabulary.unknown_token_id]
    return sentencepiece_bpe(ids, scores, unknown, prefix=vocabulary.add_space_prefix)


def gguf_vocabulary(tokenizer: Tokenizer, *, eos: int, pad: int | None = None) -> GgufVocabulary:
    """Describe a tokenizer for a GGUF file, so that llama.cpp encodes as it does.

    As with our tokenizer, no text can spell control tokens, and text can spell the grounding markers. llama.cpp does not
    normalize: text for it should be in NFC where our tokenizer composes it.

    Raises:
        InputError: if GGUF cannot describe the tokenizer; a guess would encode text wrongly in silence.
    """
    data = json.loads(tokenizer.backend.to_str())
    if data["model"]["type"] != "BPE":
        raise InputError(f"GGUF files hold BPE vocabularies, this one is {data['model']['type']}")
    ids: dict[str, int] = {**data["model"]["vocab"], **{token["content"]: token["id"] for token in data["added_tokens"]}}
    tokens = [f"[UNUSED{i}]" for i in range(max(ids.values()) + 1)]
    types = [UNUSED] * len(tokens)
    for token, i in ids.items():
        tokens[i], types[i] = token, NORMAL
    style, space_prefix = spelling_of(tokenizer.backend)
    byte_level = style == "bytes"
    unknown = None if byte_level else ids.get(data["model"]["unk_token"] or "")
    if not byte_level:
        types = [BYTE if re.fullmatch("<0x..>", token) else kind for token, kind in zip(tokens, types, strict=True)]
    for token in data["added_tokens"]:
        control = token["special"] and token["content"] not in GROUNDING
        if not control and (token["lstrip"] or token["rstrip"] or token["single_word"]):
            raise InputError(f"GGUF cannot say that {token['content']!r} takes the spaces beside it or is a whole word")
        types[token["id"]] = CONTROL if control else USER_DEFINED
    if unknown is not None:
        types[unknown] = UNKNOWN
    merges = [tuple(pair) for pair in data["model"]["merges"]]
    bos = token_text(tokenizer.config.get("bos_token"))
    return GgufVocabulary(
        model="gpt2" if byte_level else "llama",
        pre=_splitting_name(data) if byte_level else "default",
        tokens=tokens,
        token_type=types,
        scores=[] if byte_level else _scores(data, merges, tokens),
        merges=[" ".join(pair) for pair in merges] if byte_level else [],
        bos_token_id=tokenizer.bos if bos is None else ids.get(bos),
        eos_token_id=eos,
        padding_token_id=pad,
        unknown_token_id=unknown,
        add_bos_token=tokenizer.bos is not None,
        add_space_prefix=space_prefix,
    )


def _splitting_name(data: dict[str, Any]) -> str:
    """The name of the rule by which a byte-level tokenizer splits text."""
    normal = data["normalizer"]
    if normal is not None and _steps(normal, "normalizers") not in ([], [{"type": "NFC"}]):
        raise InputError(f"llama.cpp does not normalize text as this tokenizer does: {json.dumps(normal)[:200]}")
    steps = _steps(data["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}, "pretokenizers")
    for pre in (_QWEN[0], _LLAMA3[0], _GPT2[0], _SINGLE_DIGITS[0]):
        empty = tokenizers.Tokenizer(models.BPE())
        empty.pre_tokenizer = _splitting(pre)
        known = _steps(json.loads(empty.to_str())["pre_tokenizer"], "pretokenizers")
        if steps == known and bool(data["model"].get("ignore_merges")) == (pre in _LLAMA3):
            return pre
    raise InputError(f"llama.cpp has no name for the rule by which this tokenizer splits text: {json.dumps(steps)[:300]}")


def _steps(part: dict[str, Any], inside: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, without what changes no id."""
    if part["type"] == "Sequence":
        return [step for inner in part[inside] for step in _steps(inner, inside)]
    return [{key: value for key, value in part.items() if key != "trim_offsets"}]


def _scores(data: dict[str, Any], merges: list[tuple[str, ...]], tokens: list[str]) -> list[float]:
    """SentencePiece scores in the order of the merges: the sooner a piece is merged, the higher its score."""
    normal = _steps(data["normalizer"], "normalizers") if data["normalizer"] else []
    strange = [step for step in normal if step["type"] not in ("Prepend", "Replace")] or data["pre_tokenizer"]
    if strange:
        raise InputError(f"GGUF cannot describe how this tokenizer prepares text: {json.dumps(strange)[:300]}")
    ranks: dict[str, int] = {}
    last = None
    for left, right in merges:
        piece = left + right
        if piece in ranks and piece != last:
            raise InputError(f"the merges into {piece!r} do not follow one another, which no score of the piece can say")
        ranks.setdefault(piece, len(ranks))
        last = piece
    return [-float(ranks.get(token, len(ranks))) for token in tokens]
