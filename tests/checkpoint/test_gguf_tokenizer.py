"""A GGUF vocabulary encodes as the tokenizer it was made from."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from ivl.checkpoint import load_tokenizer, save_tokenizer
from ivl.checkpoint.gguf.tokenizer import GgufVocabulary, gguf_vocabulary, tokenizer_from_gguf
from ivl.errors import InputError
from ivl.processing.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "A red square stands beside a blue circle.", "12 of 345 are green; isn't that 6789?", "  two  spaces\n\n\tand tabs ",
    "naïve café, 北京 and 🙂", "<|im_end|> is only text here", "",
]  # fmt: skip
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def described(kind: str, tokens: list[str], types: list[int], **more: object) -> GgufVocabulary:
    return GgufVocabulary(model=kind, tokens=tokens, token_type=types, **more)  # type: ignore[arg-type]


def byte_level(pre: str = "qwen2") -> tuple[Tokenizer, GgufVocabulary]:
    """A trained vocabulary, and how a converter of Qwen2 would describe it: padded with unused entries at the end."""
    backend = train_tokenizer(TEXTS * 3, 330, special=()).backend
    original = Tokenizer(backend, config={"eos_token": "<|im_end|>", "add_bos_token": False})
    original.add_special(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    data = json.loads(original.backend.to_str())
    size = len(original)
    tokens = [original.backend.id_to_token(i) for i in range(size)]
    types = [NORMAL] * (size - 3) + [CONTROL] * 3
    padding = [f"[PAD{i}]" for i in range(size, size + 7)]
    merges = [" ".join(pair) for pair in data["model"]["merges"]]
    vocabulary = described(
        "gpt2", tokens + padding, types + [UNUSED] * 7, pre=pre, merges=merges, eos_token_id=size - 1, padding_token_id=size - 3
    )
    return original, vocabulary


def test_byte_level_bpe() -> None:
    original, vocabulary = byte_level()
    words = tokenizer_from_gguf(vocabulary)
    assert len(words) == len(original)
    assert words.bos is None
    assert (words.config["eos_token"], words.config["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert words.id("<|im_end|>") == original.id("<|im_end|>")
    for text in TEXTS:
        assert words.encode(text) == original.encode(text)
        assert words.decode(words.encode(text)) == text


def sentencepiece_model(folder: Path, *, prefix: bool) -> bytes:
    """Trained and written as tokenizer.model; prefix puts a space before the first word."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, model_type="bpe", vocab_size=330, byte_fallback=True,
        add_dummy_prefix=prefix, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return model.getvalue()


def test_sentencepiece(tmp_path: Path) -> None:
    """As InternLM2 and LLaMA 2: pieces with scores, byte fallback, a space before the first word or none."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    for prefix in (True, False):
        model = sentencepiece_model(tmp_path, prefix=prefix)
        original = load_tokenizer(tmp_path)
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
        vocabulary = described(
            "llama",
            [piece.piece for piece in proto.pieces],
            [piece.type for piece in proto.pieces],
            scores=[piece.score for piece in proto.pieces],
            bos_token_id=1, eos_token_id=2, unknown_token_id=0, add_bos_token=True, add_space_prefix=prefix,
        )  # fmt: skip
        words = tokenizer_from_gguf(vocabulary)
        assert words.bos == 1
        oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
        for text in TEXTS:
            assert words.encode(text) == original.encode(text) == oracle.encode(text)
            assert words.decode(words.encode(text)) == text


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2", "smollm"])
def test_a_byte_level_tokenizer_is_described_and_comes_back(pre: str) -> None:
    words = tokenizer_from_gguf(byte_level(pre)[1])
    words.add_special()
    found = gguf_vocabulary(words, eos=words.id("<|im_end|>"))
    assert found.pre == pre
    kinds = {token: kind for token, kind in zip(found.tokens, found.token_type, strict=True) if kind != NORMAL}
    assert kinds["<|im_end|>"] == kinds["<IMG_CONTEXT>"] == CONTROL and kinds["<box>"] == USER_DEFINED
    again = tokenizer_from_gguf(found)
    for text in [*TEXTS, "<ref>it</ref><box>[[1, 2, 3, 4]]</box> <IMG_CONTEXT>"]:
        assert again.encode(text) == words.encode(text)


def test_a_sentencepiece_tokenizer_is_described_and_comes_back(tmp_path: Path) -> None:

    for prefix in (True, False):
        sentencepiece_model(tmp_path, prefix=prefix)
        words = load_tokenizer(tmp_path)
        words.add_special(("<|im_start|>", "<|im_end|>"))
        words.add_special()
        found = gguf_vocabulary(words, eos=words.id("<|im_end|>"))
        assert (found.model, found.bos_token_id, found.add_bos_token, found.add_space_prefix) == ("llama", 1, True, prefix)
        assert found.token_type[0] == UNKNOWN and found.token_type[3:259] == [BYTE] * 256
        again = tokenizer_from_gguf(found)
        assert again.bos == words.bos
        for text in TEXTS:
            assert again.encode(text) == words.encode(text)


def test_what_gguf_cannot_say_is_refused() -> None:
    def changed(path: str, value: object) -> Tokenizer:
        data = json.loads(tokenizer_from_gguf(byte_level()[1]).backend.to_str())
        part, _, key = path.rpartition(".")
        (data[part] if part else data)[key] = value
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)))

    for tokenizer, message in (
        (changed("normalizer", {"type": "Lowercase"}), "does not normalize"),
        (changed("pre_tokenizer.pretokenizers", []), "no name"),
        (changed("model.ignore_merges", True), "no name"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            gguf_vocabulary(tokenizer, eos=0)


def test_a_saved_one_is_the_same(tmp_path: Path) -> None:
    words = tokenizer_from_gguf(byte_level()[1])
    save_tokenizer(words, tmp_path)
    again = load_tokenizer(tmp_path)
    assert [again.encode(text) for text in TEXTS] == [words.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("qwen2", "in 2024 it's", ["in", "Ġ", "2", "0", "2", "4", "Ġit", "'s"]),
        ("llama-bpe", "in 20245 it's", ["in", "Ġ", "202", "45", "Ġit", "'s"]),
        ("gpt-2", "in 20245 it's", ["in", "Ġ20245", "Ġit", "'s"]),
        ("smollm", "in 2024 it's", ["in", "Ġ", "2", "0", "2", "4", "Ġit", "'s"]),
    ],
)
def test_cutting_rules(pre: str, text: str, words: list[str]) -> None:
    cut = tokenizer_from_gguf(byte_level(pre)[1]).backend.pre_tokenizer
    assert [word for word, _ in cut.pre_tokenize_str(text)] == words  # type: ignore[union-attr]


def test_a_guess_is_refused() -> None:
    vocabulary = byte_level()[1]
    for change, message in (
        ({"pre": "default"}, "'default'; known are qwen2"),
        ({"model": "bert"}, "'bert'"),
        ({"model": "llama"}, "no scores"),
        ({"tokens": [*vocabulary.tokens[:-7], *["twice"] * 2], "token_type": [1] * (len(vocabulary.tokens) - 5)}, "twice"),
    ):
        with pytest.raises(InputError, match=message):
            tokenizer_from_gguf(replace(vocabulary, **change))
