"""Round trips, streams and vocabulary files, with small vocabularies made here."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl.checkpoint import load_tokenizer, save_tokenizer
from ivl.checkpoint.vocabulary import QWEN_ADDED
from ivl.config import SPECIAL_TOKENS
from ivl.errors import InputError
from ivl.processing.tokenizer import GROUNDING, byte_letters, train_tokenizer
from tests.helpers.processors import CORPUS

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS[:3])
plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))


def nfc(text: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", text)


def test_layout_of_a_trained_vocabulary(tokenizer):
    assert len(tokenizer) <= 400
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS)
    assert [tokenizer.id(name) for name in names] == list(range(len(tokenizer) - 12, len(tokenizer)))
    assert tokenizer.bos is None and tokenizer.add_special() == 0
    with pytest.raises(ValueError, match="256"):
        train_tokenizer(["a"], 200)
    with pytest.raises(InputError, match="no '<nothing>'"):
        tokenizer.id("<nothing>")
    with pytest.raises(InputError, match="100000"):
        tokenizer.decode([100000])


@given(plain)
def test_round_trip(text):
    tokenizer = _TRAINED
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == nfc(text)


@given(st.lists(st.one_of(plain, st.sampled_from(CONTROL))).map("".join))
def test_text_never_makes_control_tokens(text):
    controls = {_TRAINED.id(token) for token in CONTROL}
    assert controls.isdisjoint(_TRAINED.encode(text))
    assert _TRAINED.decode(_TRAINED.encode(text)) == nfc(text)


def test_grounding_markers_are_tokens(tokenizer):
    text = "<ref>a cat</ref><box>[[1, 2, 3, 4]]</box>"
    ids = tokenizer.encode(text)
    assert [i for i in ids if i in {tokenizer.id(t) for t in GROUNDING}] == [
        tokenizer.id(t) for t in ("<ref>", "</ref>", "<box>", "</box>")
    ]
    assert tokenizer.decode(ids) == text, "markers are part of what is said"
    ended = [*ids, tokenizer.id("<|im_end|>")]
    assert tokenizer.decode(ended) == text and tokenizer.decode(ended, skip_special=False) == text + "<|im_end|>"


@given(st.lists(st.integers(0, 270)))
def test_a_stream_is_the_text_in_whole_characters(ids):
    stream = _TRAINED.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.flush()]) == _TRAINED.decode(ids)


def test_a_stream_waits_for_the_whole_character(tokenizer):
    text = "a 🦜 b"
    stream, seen = tokenizer.stream(), []
    for i in tokenizer.encode(text):
        seen.append(stream.push(i))
    assert "".join(seen) == text and "\ufffd" not in "".join(seen) and stream.flush() == ""
    cut = tokenizer.stream()
    assert [cut.push(i) for i in tokenizer.encode("🦜")[:2]] == ["", ""] and cut.flush() == "\ufffd"


def test_saved_and_loaded(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, model_max_length=99)
    again = load_tokenizer(tmp_path)
    text = "<box> 你好 <|im_end|> colour"
    assert again.encode(text) == tokenizer.encode(text) and len(again) == len(tokenizer) and again.bos is None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["model_max_length"] == 99 and config["eos_token"] == "<|im_end|>"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no tokenizer here"):
        load_tokenizer(tmp_path / "elsewhere")


def test_control_tokens_stay_control_tokens_when_a_file_says_otherwise(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    for token in data["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(data), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.id("<|im_end|>") not in loaded.encode("x<|im_end|>y")


def test_vocab_and_merges(tokenizer, tmp_path):
    """A directory as Qwen2.5 ships it: vocab.json, merges.txt, added tokens by id in tokenizer_config.json."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    first = len(model["vocab"])
    config = {"added_tokens_decoder": {str(first + n): {"content": t, "special": True} for n, t in enumerate(QWEN_ADDED)}}
    _write_qwen(tmp_path, model, config)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    assert loaded.id("<|im_end|>") == first + 2 and loaded.add_special() == 9
    config["added_tokens_decoder"][str(first + 30)] = {"content": "<far>", "special": True}
    _write_qwen(tmp_path, model, config)
    with pytest.raises(InputError, match=f"'<far>' should have id {first + 30}"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(InputError, match=r"merges\.txt are no BPE vocabulary: .*line"):
        load_tokenizer(tmp_path)


def _write_qwen(directory: Path, model: dict, config: dict) -> None:
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_ranks(tokenizer, tmp_path):
    """A .tiktoken file has bytes and ranks only; the merges it implies are those of the trained vocabulary."""
    import base64

    letters = byte_letters()
    model = json.loads(tokenizer.backend.to_str())["model"]
    tokens = [t for t, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    singles = [t for t in tokens if len(t) == 1]
    merged = [left + right for left, right in model["merges"]]
    lines = [
        f"{base64.b64encode(bytes(letters[c] for c in token)).decode()} {rank}" for rank, token in enumerate(singles + merged)
    ]
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    loaded = load_tokenizer(tmp_path)
    for text in CORPUS:
        assert [loaded.token_bytes(i) for i in loaded.encode(text)] == [
            tokenizer.token_bytes(i) for i in tokenizer.encode(text)
        ]
    assert loaded.id("<|im_start|>") == len(lines) + 1 and loaded.bos is None
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\nIg== x\n")
    with pytest.raises(InputError, match=r"qwen\.tiktoken:2"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module", params=[True, False], ids=["dummy-prefix", "no-prefix"])
def pieces(request, tmp_path_factory) -> Path:
    """A directory with a SentencePiece model shaped like InternLM2.5's: BPE, byte fallback, reserved pieces at the end."""
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=request.param,
        character_coverage=0.99, user_defined_symbols=["<keep>"], minloglevel=2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("pieces")
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


TEXTS = ["What is it?", "  two  spaces ", "你好，世界", "🦜\n\nline", "", "naïve café", "\t\x01", "the the the"]


def test_sentencepiece(pieces):
    import sentencepiece as spm

    oracle = spm.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    loaded = load_tokenizer(pieces)
    assert len(loaded) == oracle.vocab_size() and loaded.bos == loaded.id("<s>") == oracle.bos_id()
    for text in [*TEXTS, *CORPUS]:
        assert loaded.encode(text) == oracle.encode(text), text
        assert loaded.decode(loaded.encode(text)) == text
        stream = loaded.stream()
        assert "".join([*map(stream.push, loaded.encode(text)), stream.flush()]) == text
    assert loaded.id("<keep>") in loaded.encode("a<keep>b")
    assert loaded.bos not in loaded.encode("<s>")


def test_sentencepiece_renames_reserved_pieces_and_appends(pieces, tmp_path):
    size = len(load_tokenizer(pieces))
    names = {size - 2: "<|im_end|>", size - 1: "<|im_start|>", **{size + n: t for n, t in enumerate(SPECIAL_TOKENS)}}
    config = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for i, t in names.items()},
    }
    (tmp_path / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert {i: loaded.backend.id_to_token(i) for i in names} == names and len(loaded) == size + 9
    save_tokenizer(loaded, tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    for text in [*TEXTS, "<ref>x</ref> <|im_end|>"]:
        assert again.encode(text) == loaded.encode(text)
    assert again.bos == loaded.bos == 1 and len(again) == len(loaded)


_TRAINED = train_tokenizer(CORPUS, 400)


def test_beginning_of_sequence_and_replies_with_pieces(pieces, tmp_path):
    """InternLM2.5: `<s>` once, and a reply after its header has no space put before it."""
    from ivl.processing.chat import render, user
    from ivl.types import Message, Text

    tokenizer = load_tokenizer(pieces)
    tokenizer.add_special(("<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS))
    asked, answer = user("What is it?"), Message("assistant", (Text("It is"),))
    prompt = render((asked,), [], tokenizer, reply=True).ids
    whole = render((asked, answer, asked, answer), [], tokenizer)
    assert whole.ids[: len(prompt)] == prompt and whole.ids.count(tokenizer.bos) == 1 and whole.ids[0] == tokenizer.bos
    said = [i for i, on in zip(whole.ids, whole.trained, strict=True) if on]
    assert said == 2 * [*tokenizer.encode("\nIt is")[-2:], tokenizer.id("<|im_end|>")] or not tokenizer._strip
    pieces_of = [tokenizer.backend.id_to_token(i) for i in said]
    assert not pieces_of[0].startswith("▁")
