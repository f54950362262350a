"""Damaged files of a model directory: special files, huge headers, programs in a tokenizer, wrong types, partial adapters."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from ivl.checkpoint import load_config, load_model, load_tokenizer, save_model, save_processor, save_tokenizer
from ivl.checkpoint.adapter import load_adapter, merge, save_adapter
from ivl.checkpoint.compose import compose
from ivl.checkpoint.convert import convert
from ivl.checkpoint.files import fingerprint
from ivl.checkpoint.model_dir import empty_model, open_rows
from ivl.checkpoint.weights import INDEX, WEIGHTS
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.lora.layers import add_lora
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import byte_letters, train_tokenizer
from ivl.quant.layers import QuantConfig, QuantPlan
from ivl.train.config import Stage
from ivl.train.stage import apply_stage, trainable
from tests.checkpoint.test_compose import image_logits
from tests.helpers.adapters import build, logits, stir
from tests.helpers.checkpoints import random_model, same_weights, sentencepiece_model, tiny_like

EXPLODING = "(x+x+)+y"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    words = train_tokenizer(["what is this", "a red circle"] * 5, 300)
    config = tiny_like("1B")
    config = replace(
        config, decoder=replace(config.decoder, vocab_size=len(words)), bos_token_id=None, pad_token_id=None,
        image_token_id=words.id("<IMG_CONTEXT>"), eos_token_ids=(words.id("<|im_end|>"),),
    )  # fmt: skip
    save_model(random_model(config), tmp_path / "model")
    save_processor(Processor(config, words), tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# -- numbers


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("mlp1.1.weight", float("nan")),
        ("vision_model.encoder.layers.0.attn.qkv.bias", float("inf")),
        ("language_model.model.layers.1.mlp.up_proj.weight", -float("inf")),
    ],
)
def test_weights_that_are_not_finite_are_named(model: Path, tmp_path: Path, name: str, number: float) -> None:
    save_model(load_model(model), model, max_shard_bytes=40_000)
    shard = model / json.loads((model / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name].view(-1)[-1] = number
    save_file(tensors, shard)
    out, int8 = tmp_path / "out", QuantPlan(language=QuantConfig(bits=8, group=16), vision=QuantConfig(bits=8, group=16))
    rows = open_rows(model, empty_model(load_config(model)))
    ways: list[Callable[[], object]] = [
        lambda: load_model(model), lambda: convert(model, out), lambda: convert(model, out, to="gguf"),
        lambda: convert(model, out, schemes=int8), lambda: compose(model, model, model, out),
        lambda: [rows.get(ours) for ours in rows.shapes],
        lambda: [rows.rows(ours, 0, size) for ours, (size, *_) in rows.shapes.items()],
    ]  # fmt: skip
    for way in ways:
        with pytest.raises(InputError, match=rf"{shard.name}: tensor '{re.escape(name)}' holds NaN or infinite numbers"):
            way()
    assert not out.exists()


def test_large_numbers_are_fine_and_named_where_a_type_cannot_hold_them(model: Path, tmp_path: Path) -> None:
    """Their sum overflows, though none of them does."""
    changed = load_model(model)
    changed.projector.fc1.weight.data[0, :2] = 3e38
    save_model(changed, tmp_path / "large")
    assert same_weights(load_model(tmp_path / "large"), changed)
    with pytest.raises(InputError, match=r"tensor 'mlp1\.1\.weight' holds numbers that torch\.float16 cannot express"):
        load_model(tmp_path / "large", dtype=torch.float16)
    with pytest.raises(InputError, match=r"tensor 'mlp1\.1\.weight' holds 3e\+38, which float16 cannot express; take bfloat16"):
        convert(tmp_path / "large", tmp_path / "out", dtype="float16", weights_only=True)


def test_a_damaged_table_that_stays_in_its_file_is_named_by_convert(model: Path, tmp_path: Path) -> None:
    name = "language_model.model.embed_tokens.weight"
    tensors = load_file(model / WEIGHTS)
    tensors[name][5] = float("nan")
    save_file(tensors, model / WEIGHTS)
    load_model(model, map_embeddings=True)  # rows that no prompt uses are never read
    with pytest.raises(InputError, match=rf"tensor '{re.escape(name)}' holds NaN"):
        convert(model, tmp_path / "out")


# -- special files, headers, shards


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_special_files_are_refused_at_once(model: Path, name: str, kind: str) -> None:
    (model / name).unlink()
    if kind == "fifo":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=name):
        load_model(model)
        load_tokenizer(model)


def test_files_that_no_index_names_are_never_opened(model: Path) -> None:
    os.mkfifo(model / "zz.safetensors")
    (model / "model-00007-of-00009.safetensors").symlink_to("/dev/zero")
    load_model(model)


def test_metadata_of_any_words_is_read(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt", "dtype": "bfloat16", "data_offsets": "x", "shape": "[]"})
    assert load_model(model)


def header(path: Path, change: Callable[[dict[str, Any]], object], pad: int = 0) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    values = json.loads(data[8:end])
    change(values)
    text = json.dumps(values).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(__metadata__={"a": 1}),
        lambda h: h.update(__metadata__=[1]),
        lambda h: h["mlp1.0.weight"].update(data_offsets=[0, 1 << 60]),
        lambda h: h["mlp1.0.weight"].update(data_offsets=h["mlp1.0.bias"]["data_offsets"]),
        lambda h: h["mlp1.0.weight"].update(shape=[1 << 40, 1 << 40]),
        lambda h: h["mlp1.0.weight"].update(shape=[-1]),
        lambda h: h["mlp1.0.weight"].update(dtype="F4"),
        lambda h: h.pop("mlp1.0.weight"),
    ],
)
def test_headers_that_lie_are_refused(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header(model / WEIGHTS, change)
    with pytest.raises(InputError, match=WEIGHTS):
        load_model(model)


def test_a_huge_header_is_not_parsed(model: Path) -> None:
    header(model / WEIGHTS, lambda h: None, pad=20 << 20)
    with pytest.raises(InputError, match=r"its header has 20,\d+,\d+ bytes, at most 16,777,216 are read"):
        load_model(model)


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        {},
        {"a": None},
        {"a": ["model.safetensors"]},
        {"a": "/dev/zero.safetensors"},
        {"a": "n" * 300 + ".safetensors"},
    ],
)
def test_an_index_of_wrong_types_is_refused(model: Path, weight_map: Any) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=INDEX):
        load_model(model)


# -- config.json


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *[(None, "template", value) for value in ([], {}, 5, True)],
        *[(None, "system_message", value) for value in (5, True, [], "\ud800")],
        *[(None, "select_layer", value) for value in (2.5, -1.0, "1", True)],
        *[(None, "eos_token_id", value) for value in (-1, 300, 2**63, 1e30, "x", [None], [True])],
        *[(None, key, -1) for key in ("bos_token_id", "pad_token_id", "image_token_id")],
        (None, "use_thumbnail", "false"), (None, "dynamic_image_size", 1), (None, "min_dynamic_patch", 0),
        ("llm_config", "architectures", ["xQwen2ForCausalLMx"]), ("llm_config", "architectures", "Qwen2ForCausalLM"),
        ("llm_config", "rope_scaling", [1]), ("llm_config", "rope_scaling", {"type": "dynamic", "factor": -2}),
        ("llm_config", "rope_theta", 0), ("llm_config", "tie_word_embeddings", "no"), ("llm_config", "head_dim", 0),
        ("vision_config", "qkv_bias", "yes"), ("vision_config", "norm_type", ["rms_norm"]),
        ("vision_config", "layer_norm_eps", 2), ("vision_config", "initializer_factor", True),
    ],
)  # fmt: skip
def test_values_of_wrong_types_are_refused_by_key(model: Path, part: str | None, key: str, value: Any) -> None:
    if key == "eos_token_id":
        edit(model / "generation_config.json", lambda values: values.pop(key))
    edit(model / "config.json", lambda values: (values[part] if part else values).update({key: value}))
    with pytest.raises(InputError) as caught:
        load_model(model)
    assert "config.json" in str(caught.value) and (key in str(caught.value) or value == "\ud800" or key == "architectures")


# -- tokenizer.json


def put(part: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update({part: value})


def with_step(part: str, inside: str, step: dict[str, Any], times: int = 1) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update(
        {part: {"type": "Sequence", inside: [*[step] * times, *([data[part]] if data[part] else [])]}}
    )


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
TEMPLATE = {
    "type": "TemplateProcessing", "pair": [], "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 30_000,
    "special_tokens": {"x": {"id": "x", "ids": [1] * 3000, "tokens": ["a"] * 3000}},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        put("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        with_step("normalizer", "normalizers", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        put("post_processor", TEMPLATE),
        with_step("normalizer", "normalizers", REPLACE, 4),
        with_step("normalizer", "normalizers", REPLACE | {"content": "aaaa"}, 4),
        with_step("normalizer", "normalizers", REPLACE | {"pattern": {"String": ""}}),
        with_step("normalizer", "normalizers", REPLACE | {"pattern": {"Regex": EXPLODING}, "content": ""}),
        with_step("decoder", "decoders", REPLACE | {"content": "a" * 16}, 3),
        with_step("decoder", "decoders", {"type": "Strip", "content": " ", "start": 2**40, "stop": 0}),
        put("pre_tokenizer", {"type": "Split", "pattern": {"Regex": EXPLODING}, "behavior": "Isolated", "invert": False}),
        put("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        with_step("pre_tokenizer", "pretokenizers", {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, 4),
        with_step("normalizer", "normalizers", {"type": "NFC"}, 40),
        put("decoder", {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}),
        lambda data: data["model"].update(continuing_subword_prefix="##"),
        lambda data: data["model"].update(dropout=0.5),
        lambda data: data["model"].update(type="Unigram"),
        lambda data: data["model"]["vocab"].update({"twice": 1}),
        lambda data: data["model"]["vocab"].update({"你": 299}),
        lambda data: data["model"]["vocab"].pop("Ġ") and data["model"].update(merges=[]),
        lambda data: data["model"].update(vocab=[["a", 0]]),
        lambda data: data["model"]["merges"].append(["no", "such"]),
        lambda data: data["added_tokens"].append({"id": 5, "content": "<far>", "special": True}),
        lambda data: data["added_tokens"].extend({"id": 400 + n, "content": "x" * 60_000 + str(n)} for n in range(5)),
        lambda data: data.update(added_tokens=[5]),
        put("padding", [1]),
    ],
)
def test_programs_in_a_tokenizer_are_refused_before_they_are_built(
    model: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(model / "tokenizer.json", change)
    start = time.process_time()
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(model)
    assert time.process_time() - start < 2


def test_a_panic_of_the_library_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ivl.checkpoint import vocabulary

    panic = type("PanicException", (BaseException,), {})

    def fail(described: object) -> None:
        raise panic("index out of bounds\n<backtrace>")

    monkeypatch.setattr(vocabulary, "check_tokenizer", fail)
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer of this kind \(index out of bounds <backtrace>\)"):
        load_tokenizer(model)


def bpe(pre: Any, decoder: Any, normalizer: Any = None, post: Any = None, **options: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    backend.pre_tokenizer, backend.decoder, backend.normalizer = pre, decoder, normalizer
    if post:
        backend.post_processor = post
    return backend


def test_published_kinds_of_tokenizers_load(tmp_path: Path) -> None:
    """As Llama 3, GPT-2, SmolLM2 and LLaMA 2 (InternLM2 alike) describe theirs."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors

    from ivl.checkpoint.tokenizer_json import LLAMA3_PATTERN

    letters = {letter: n for n, letter in enumerate(byte_letters())}
    pieces = {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    template = processors.TemplateProcessing(single="! $A", pair="! $A ! $B", special_tokens=[("!", 0)])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_level = {"vocab": letters, "merges": []}
    post = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    gpt2, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)
    kinds = [
        bpe(pre_tokenizers.Sequence([split, plain]), decoders.ByteLevel(), post=post, ignore_merges=True, **byte_level),
        bpe(gpt2, decoders.ByteLevel(), post=processors.ByteLevel(trim_offsets=False), **byte_level),
        bpe(pre_tokenizers.Sequence([digits, gpt2]), decoders.ByteLevel(), **byte_level),
        bpe(
            None, decoders.Sequence(undo), spaces, vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        ),
    ]
    for backend in kinds:
        backend.save(str(tmp_path / "tokenizer.json"))
        words = load_tokenizer(tmp_path)
        assert words.decode(words.encode("it's 12 你")) == "it's 12 你"


# -- older tokenizer files


def lines(ranks: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!!! 5\n", "expected base64 bytes and a rank"), (lines(BYTES[:200]), "has no token for 56 bytes"),
        (lines([*BYTES, b"ab"]).replace("YWI= 256", "YWI= 300"), "are not 0 to 256"), (lines([*BYTES, b"a"]), "a rank already"),
        (lines([*BYTES, b"abc"]), "cannot be made from shorter"), (lines([*BYTES, b"x" * 2000]), "longer than 1024"),
        ("\xff 0", "qwen.tiktoken"),
    ],
)  # fmt: skip
def test_ranks_that_would_lose_text_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_long_tokens_take_no_time(tmp_path: Path) -> None:
    """A chain of 1,000 tokens, each one byte longer."""
    (tmp_path / "qwen.tiktoken").write_text(lines([*BYTES, *(b"a" * n for n in range(2, 1002))]))
    start = time.process_time()
    words = load_tokenizer(tmp_path)
    assert time.process_time() - start < 20 and words.decode(words.encode("hello <box>")) == "hello <box>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", [1]), ("vocab.json", {"a": "x"}), ("vocab.json", {"a": -1}), ("vocab.json", {"a": 0}),
        ("merges.txt", "#version: 0.2\nno such\n"), ("merges.txt", "\udcff"), ("merges.txt", "a b c"),
        ("added_tokens.json", []), ("added_tokens.json", {"a": "x"}), ("tokenizer_config.json", {"added_tokens_decoder": []}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1e3": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": 5}}),
        ("tokenizer_config.json", {"bos_token": 5}), ("tokenizer_config.json", {"add_bos_token": "yes"}),
    ],
)  # fmt: skip
def test_older_files_of_wrong_types_are_one_line(tmp_path: Path, name: str, content: Any) -> None:
    described = json.loads(train_tokenizer(["what is this"] * 5, 280).backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(described["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, described["merges"])]))
    assert load_tokenizer(tmp_path)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_table_of_sentencepiece_travels(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path, "nmt_nfkc")
    oracle = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(model))
    words = load_tokenizer(tmp_path)
    save_tokenizer(words, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for text in ("what is this", "ｗｈａｔ　ｉｓ ①", "ﷺ ﬁ 你"):
        assert words.encode(text) == again.encode(text) == oracle.encode(text)


@pytest.mark.parametrize("data", [b"", b"x", b"\n\xff\xff\xff\x0f", bytes(range(256))])
def test_a_sentencepiece_model_of_any_bytes_is_one_line(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


# -- GGUF, packed weights


@pytest.fixture
def gguf_file(model: Path, tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    convert(model, tmp_path / "gguf", to="gguf")
    return tmp_path / "gguf" / "model.gguf"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen2.block_count", struct.pack("<I", 1 << 31)), ("qwen2.attention.head_count", struct.pack("<I", 0)),
        ("qwen2.attention.layer_norm_rms_epsilon", struct.pack("<f", float("nan"))),
        ("qwen2.rope.freq_base", struct.pack("<f", float("nan"))), ("qwen2.context_length", struct.pack("<I", 0)),
    ],
)  # fmt: skip
def test_gguf_fields_out_of_bounds_are_refused_before_tensors(
    model: Path, gguf_file: Path, tmp_path: Path, key: str, value: bytes
) -> None:
    data = gguf_file.read_bytes()
    at = data.index(key.encode()) + len(key) + 4
    gguf_file.write_bytes(data[:at] + value + data[at + 4 :])
    with pytest.raises(InputError, match=rf"model\.gguf: qwen2: {key.removeprefix('qwen2.')} is"):
        compose(model, gguf_file, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_composing_a_gguf_file_gives_a_model_that_loads(model: Path, gguf_file: Path, tmp_path: Path) -> None:
    compose(model, gguf_file, model, tmp_path / "out")
    assert load_config(tmp_path / "out") == load_model(tmp_path / "out").config


def test_a_configuration_that_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    wrong = random_model(tiny_like("1B"))
    wrong.config = replace(wrong.config, eos_token_ids=(96,))
    with pytest.raises(InputError, match="configuration to be written: eos_token_id"):
        save_model(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_packed_weights_of_another_type_are_refused(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    convert(model, tmp_path / "q", schemes=QuantPlan(language=QuantConfig(bits=8)))
    tensors = load_file(tmp_path / "q" / WEIGHTS)
    name = next(name for name in tensors if name.endswith("o_proj.weight_packed"))
    save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / "q" / WEIGHTS)
    with pytest.raises(InputError, match=rf"{name}' is {dtype}, expected torch\.int32"):
        load_model(tmp_path / "q")


# -- adapters


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 1_000_000), ("r", 4096), ("r", "4"), ("r", True), ("r", None), ("lora_alpha", 1e20), ("lora_alpha", []),
        ("lora_dropout", 2), ("rank_pattern", {"x": "2"}), ("alpha_pattern", [1]), ("modules_to_save", "x"),
        ("use_rslora", "no"), ("bias", "some"), ("peft_type", ["LORA"]),
    ],
)  # fmt: skip
def test_adapter_configurations_are_checked_before_memory_is_taken(tmp_path: Path, key: str, value: Any) -> None:
    adapted = build()
    add_lora(adapted, LoraConfig(rank=2))
    save_adapter(adapted, tmp_path)
    edit(tmp_path / "adapter_config.json", lambda values: values.update({key: value}))
    with pytest.raises(InputError, match=r"adapter_config\.json|should be"):
        load_adapter(build(), tmp_path)


def staged(model: VLM) -> VLM:
    """As in docs/training.md: adapters on decoder and ViT, and the projector whole."""
    add_lora(model, LoraConfig(rank=2, dropout=0.0, targets=("decoder.layers", "vision.layers")))
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name]
    apply_stage(model, Stage(trainable=("projector",)), adapters=adapters)
    stir(model)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if name.startswith("projector."):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.3)
    return model.eval()


def test_merge_takes_along_what_trained_whole(model: Path, tmp_path: Path) -> None:
    run = staged(load_model(model))
    save_adapter(run, tmp_path / "adapter", base=str(model), trained=trainable(run))
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["modules_to_save"] == ["model.multi_modal_projector"]
    merge(model, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(image_logits(load_model(tmp_path / "merged")), image_logits(run), atol=1e-4, rtol=1e-4)
    plain = load_model(model)
    add_lora(plain, LoraConfig(rank=2))
    save_adapter(plain, tmp_path / "plain")
    merge(model, tmp_path / "plain", tmp_path / "same")
    assert same_weights(load_model(tmp_path / "same"), load_model(model))


def test_peft_loads_what_trained_whole(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from tests.checkpoint.test_adapter import their_logits, theirs

    model = random_model(tiny_like("1B"))
    save_model(model, tmp_path / "model", dialect="transformers")
    run = staged(model)
    save_adapter(run, tmp_path / "adapter", trained=trainable(run))
    wrapped = peft.PeftModel.from_pretrained(theirs(tmp_path / "model"), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(their_logits(wrapped), logits(run), atol=1e-4, rtol=1e-5)


def test_a_base_that_was_not_trained_from_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = staged(load_model(model))
    save_adapter(run, tmp_path / "adapter", base="runs/quickstart/model", trained=trainable(run))
    other = load_model(model)
    with torch.no_grad():
        other.decoder.layers[0].qkv.weight.add_(0.01)
    save_model(other, tmp_path / "other")
    save_processor(Processor(other.config, load_tokenizer(model)), tmp_path / "other")
    with pytest.raises(InputError, match=r"was trained from 'runs/quickstart/model', not from this model; name that one; `ivl"):
        merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged", allow_base=True)
    convert(model, tmp_path / "half", to="transformers", dtype="bfloat16")  # the same base, stored otherwise
    merge(tmp_path / "half", tmp_path / "adapter", tmp_path / "merged-half")
    assert not capsys.readouterr().err
    (tmp_path / "adapter" / "ivl_base.json").unlink()  # as PEFT writes it
    merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged-2")
    assert "whether it was trained from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options"),
    [("convert", ["--max-shard-gb", "nan"]), ("convert", ["--max-shard-gb", "inf"]), ("compose", ["--seed", str(1 << 70)])],
)
def test_numbers_of_the_command_line_have_limits(model: Path, tmp_path: Path, command: str, options: list[str]) -> None:
    from ivl.cli import convert as commands

    parts = [str(model)] if command == "convert" else ["--vit", str(model), "--llm", str(model)]
    with pytest.raises(InputError, match=options[0].strip("-")):
        getattr(commands, command)([*parts, str(tmp_path / "out"), *options])


def test_a_fingerprint_ignores_links_to_nothing(model: Path) -> None:
    before = fingerprint(model)
    (model / "zz.safetensors").symlink_to("nowhere")
    assert fingerprint(model) == before
