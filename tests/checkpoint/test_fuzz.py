"""Damaged files of a model: each is an InputError of one line, or is read; none takes memory or the process.

`IVL_FUZZ=10000 python -m pytest tests/checkpoint/test_fuzz.py` tries as many mutations of each kind.
"""

from __future__ import annotations

import json
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from ivl.checkpoint import load_config, load_tokenizer, save_model, save_processor
from ivl.checkpoint.adapter import load_adapter, save_adapter
from ivl.checkpoint.compose import _gguf_part
from ivl.checkpoint.convert import convert
from ivl.checkpoint.model_dir import empty_model, open_weights
from ivl.checkpoint.weights import WEIGHTS, StoredWeights
from ivl.config import LoraConfig
from ivl.lora.layers import add_lora
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer, byte_letters, train_tokenizer
from tests.helpers.adapters import build
from tests.helpers.checkpoints import random_model, sentencepiece_model, tiny_like
from tests.helpers.fuzz import changed_bytes, changed_json, hammer


def words() -> Tokenizer:
    return train_tokenizer(["what is this", "a red circle"] * 5, 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer, config = words(), tiny_like("1B")
    config = replace(
        config, decoder=replace(config.decoder, vocab_size=len(tokenizer), width=64), bos_token_id=None, pad_token_id=None,
        image_token_id=tokenizer.id("<IMG_CONTEXT>"), eos_token_ids=(tokenizer.id("<|im_end|>"),),
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("fuzz") / "model"
    save_model(random_model(config), directory)
    save_processor(Processor(config, tokenizer), directory)
    return directory


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_config(model: Path, name: str) -> None:
    value = json.loads((model / name).read_text())
    read = lambda: open_weights(model, empty_model(load_config(model)), quantized=True)  # noqa: E731
    hammer(model / name, lambda rng: changed_json(rng, value), read)


def use(tokenizer: Tokenizer) -> None:
    tokenizer.decode(tokenizer.encode("What is <box>\n你 it's 12 </box><|im_end|>"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(model: Path, name: str) -> None:
    value = json.loads((model / name).read_text())

    def mutate(rng: random.Random) -> bytes:
        if name != "tokenizer.json" or rng.random() < 0.2:
            return changed_json(rng, value)
        rest = changed_json(rng, value | {"model": {**value["model"], "vocab": {}, "merges": []}})  # not among the words
        parts = [json.dumps(value["model"][key]).encode() for key in ("vocab", "merges")]
        return rest.replace(b'"vocab": {}', b'"vocab": ' + parts[0]).replace(b'"merges": []', b'"merges": ' + parts[1])

    hammer(model / name, mutate, lambda: use(load_tokenizer(model)))


def ranks(folder: Path) -> Path:
    import base64

    letters, vocab = byte_letters(), json.loads(words().backend.to_str())["model"]["vocab"]
    lines = [f"{base64.b64encode(bytes(letters[c] for c in t)).decode()} {i}" for t, i in vocab.items()]
    (folder / "qwen.tiktoken").write_text("\n".join(lines))
    return folder / "qwen.tiktoken"


@pytest.mark.parametrize("name", ["qwen.tiktoken", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"])
def test_older_tokenizer_files(tmp_path: Path, name: str) -> None:
    described = json.loads(words().backend.to_str())["model"]
    vocab, merges = described["vocab"], ["#version: 0.2", *map(" ".join, described["merges"])]
    added = {"<|im_end|>": len(vocab), "<box>": len(vocab) + 1}
    if name == "qwen.tiktoken":
        ranks(tmp_path)
    elif name == "tokenizer.model":
        sentencepiece_model(tmp_path, "identity")
    else:
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("\n".join(merges))
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    data = (tmp_path / name).read_bytes()
    value = json.loads(data) if name.endswith("json") else None
    mutate = lambda rng: changed_bytes(rng, data) if value is None else changed_json(rng, value)  # noqa: E731
    hammer(tmp_path / name, mutate, lambda: use(load_tokenizer(tmp_path)))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "ivl_base.json"])
def test_adapter(tmp_path: Path, name: str) -> None:
    adapted = build()
    add_lora(adapted, LoraConfig(rank=2, targets=("decoder.layers.0",)))
    save_adapter(adapted, tmp_path, trained=["projector.fc1.weight"])
    data = (tmp_path / name).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    read = lambda: load_adapter(build(), tmp_path)  # noqa: E731
    if name.endswith("json"):
        hammer(tmp_path / name, lambda rng: changed_json(rng, json.loads(data)), read)
    else:
        hammer(tmp_path / name, lambda rng: changed_header(rng, data, header), read)


def changed_header(rng: random.Random, data: bytes, end: int) -> bytes:
    """A safetensors file with a changed header, whose length is mostly right."""
    if rng.random() < 0.3:
        return changed_bytes(rng, data, 0, end)
    header = changed_json(rng, json.loads(data[8:end]))
    return struct.pack("<Q", len(header) + rng.choice((0, 0, 0, 1, -1))) + header + data[end:]


def test_safetensors_header(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    hammer(model / WEIGHTS, lambda rng: changed_header(rng, data, end), lambda: StoredWeights(model))


def test_gguf(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    convert(model, tmp_path / "out", to="gguf")
    path = tmp_path / "out" / "model.gguf"
    data = path.read_bytes()
    header = data.index(b"output_norm.weight") + 2000
    hammer(path, lambda rng: changed_bytes(rng, data, 0, header), lambda: _gguf_part(path))
