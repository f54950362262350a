"""The tokenizer that a GGUF file carries, as a Tokenizer."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ivl.errors import InputError
from ivl.model.checkpoint.gguf import GgufVocabulary
from ivl.processing.tokenizer import Tokenizer
from ivl.processing.vocabulary import QWEN_PATTERN, merges_from_scores

LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# Names that GGUF files give to the rule that cuts text before merging.
_QWEN = ("qwen2", "deepseek-r1-qwen")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_GPT2 = ("gpt-2", "mpt", "olmo", "jais")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def tokenizer_from_gguf(vocabulary: GgufVocabulary) -> Tokenizer:
    """Byte-level BPE (kind gpt2) or SentencePiece BPE (kind llama). Unused entries that pad the end are left out.

    Raises:
        InputError: for another kind of vocabulary or an unknown cutting rule; a guess would encode text wrongly in silence.
    """
    size = len(vocabulary.tokens)
    while size and vocabulary.types[size - 1] == UNUSED:
        size -= 1
    tokens = vocabulary.tokens[:size]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < size:
        raise InputError(f"the GGUF vocabulary of {size} tokens has {size - len(ids)} of them twice")
    if vocabulary.kind == "gpt2":
        backend = _byte_level(vocabulary, ids)
    elif vocabulary.kind == "llama":
        backend = _sentencepiece(vocabulary, ids)
    else:
        raise InputError(f"the GGUF vocabulary is of kind {vocabulary.kind!r}; supported are 'gpt2' and 'llama'")
    for token, kind in zip(tokens, vocabulary.types, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            add = backend.add_special_tokens if special else backend.add_tokens
            add([AddedToken(token, special=special, normalized=False)])
    special_ids = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos, "pad_token": vocabulary.pad}
    config = {key: tokens[i] for key, i in special_ids.items() if i is not None and i < size}
    add_bos = vocabulary.add_bos and "bos_token" in config
    if add_bos:
        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
        )
    return Tokenizer(backend, config={**config, "add_bos_token": add_bos})


def _byte_level(vocabulary: GgufVocabulary, ids: dict[str, int]) -> tokenizers.Tokenizer:
    pre = vocabulary.pre
    merges = []
    for merge in vocabulary.merges:
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre in _LLAMA3))
    if pre in _QWEN:
        backend.normalizer = normalizers.NFC()
    if pre in _QWEN + _LLAMA3:
        cut = pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN if pre in _QWEN else LLAMA3_PATTERN), "isolated")
        steps = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif pre in _GPT2:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    elif pre in _SINGLE_DIGITS:
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    else:
        known = ", ".join(_QWEN + _LLAMA3 + _GPT2 + _SINGLE_DIGITS)
        raise InputError(f"the GGUF tokenizer cuts text by the rule {pre!r}; known are {known}")
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: GgufVocabulary, ids: dict[str, int]) -> tokenizers.Tokenizer:
    if not vocabulary.scores:
        raise InputError("the GGUF vocabulary is SentencePiece but has no scores (tokenizer.ggml.scores)")
    rows = zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True)
    scores = {token: score for token, kind, score in rows if kind == NORMAL}
    unknown = None if vocabulary.unknown is None else vocabulary.tokens[vocabulary.unknown]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges_from_scores(scores, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    undo: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        undo.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(undo)
    return backend
