"""Checkpoints are untrusted: what is wrong is refused by name, before memory is taken, and no code ever runs."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivl.checkpoint import load_config, load_model, model_dir, save_model
from ivl.checkpoint.weights import INDEX, WEIGHTS
from ivl.errors import InputError
from tests.helpers.checkpoints import random_model, tiny_like


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_model(random_model(tiny_like("1B")), tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("memory was taken for a model that must be refused")

    monkeypatch.setattr(model_dir, "allocate", refuse)


def test_missing_unexpected_and_misshapen_are_listed_together(good: Path, no_allocation: None) -> None:
    tensors = load_file(good / WEIGHTS)
    del tensors["mlp1.0.weight"], tensors["mlp1.0.bias"]
    tensors["language_model.lm_head.weight"] = torch.zeros(5, 64)
    tensors["vision_model.head.weight"] = torch.zeros(3)
    save_file(tensors, good / WEIGHTS)
    with pytest.raises(InputError) as caught:
        load_model(good)
    message = str(caught.value)
    assert str(good) in message
    assert "2 missing: mlp1.0.weight, mlp1.0.bias" in message
    assert "1 unexpected: vision_model.head.weight" in message
    assert "1 misshapen: language_model.lm_head.weight [5, 64] instead of [96, 64]" in message


def test_long_lists_are_capped_and_counted(good: Path) -> None:
    save_file({"x": torch.zeros(1)}, good / WEIGHTS)
    with pytest.raises(InputError, match=r"missing: .* and \d+ more; 1 unexpected: x") as caught:
        load_model(good)
    assert len(str(caught.value)) < 1200


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.pt", "consolidated.00.pth"))
def test_pickles_are_refused_unopened(good: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(good)
    (good / WEIGHTS).unlink()
    (good / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=f"{name} may run code .* convert it to safetensors"):
        load_model(good)
    assert not (good / "exploded").exists()


def test_code_beside_the_weights_is_never_imported(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(good)
    (good / "evil.py").write_text("open('exploded', 'w')\nclass Config: pass\n")

    def change(values: dict[str, Any]) -> None:
        values["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Config"}
        values["llm_config"] |= {"auto_map": values["auto_map"], "_attn_implementation_internal": "evil/kernel"}

    edit(good / "config.json", change)
    load_model(good)
    assert not (good / "exploded").exists()


@pytest.mark.parametrize(
    "shard", ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "x.bin", 3, "")
)
def test_shard_names_stay_in_the_directory(good: Path, shard: Any) -> None:
    (good / INDEX).write_text(json.dumps({"weight_map": {"mlp1.0.weight": shard}}))
    with pytest.raises(InputError, match=r"no plain .safetensors file name; refused"):
        load_model(good)


def test_an_index_that_lies_is_refused(good: Path) -> None:
    names = list(load_file(good / WEIGHTS))
    index = {"weight_map": {**dict.fromkeys(names[1:], WEIGHTS), "ghost": WEIGHTS}}
    (good / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"does not agree with the shards about .*ghost"):
        load_model(good)
    index["weight_map"]["ghost"] = "model-00002-of-00002.safetensors"
    (good / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors: no such weights file"):
        load_model(good)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: struct.pack("<Q", 1 << 60) + data[8:],  # a header longer than the file
        lambda data: struct.pack("<Q", 200_000_000) + b" " * 100,
        lambda data: data[:1000],
        lambda data: data[:-1000],
        lambda data: b"",
        lambda data: pickle.dumps(Bomb()),
    ],
)
def test_damaged_weights_are_refused(good: Path, damage: Callable[[bytes], bytes]) -> None:
    file = good / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"not a readable safetensors file"):
        load_model(good)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("llm_config", "hidden_size", 10**9, "hidden_size is 1000000000, expected a whole number from 1 to 65536"),
        ("llm_config", "num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
        ("llm_config", "vocab_size", 10**400, "vocab_size is 1000"),
        ("llm_config", "vocab_size", -1, "vocab_size is -1"),
        ("llm_config", "vocab_size", 3.5, "vocab_size is 3.5, expected a whole number"),
        ("llm_config", "rms_norm_eps", float("nan"), "NaN is no finite number"),
        ("llm_config", "hidden_size", None, "hidden_size is missing"),
        ("llm_config", "architectures", ["GemmaForCausalLM"], "is not one of Qwen2ForCausalLM"),
        ("llm_config", "hidden_act", "relu", "hidden_act is 'relu'; only 'silu'"),
        ("llm_config", "rope_scaling", {"type": "yarn", "factor": 4}, "rope scaling 'yarn' is not supported"),
        ("llm_config", "use_sliding_window", True, "use_sliding_window is True"),
        ("llm_config", "num_key_value_heads", 3, "8 query heads cannot share 3"),
        ("vision_config", "image_size", [28, 56], r"image_size is \[28, 56\]"),
        ("vision_config", "num_attention_heads", 5, "vision width 32 is not a multiple of its 5 heads"),
        ("vision_config", "norm_type", "batch_norm", "norm_type is 'batch_norm'"),
        (None, "vision_config", [], "vision_config is .*, expected an object"),
        (None, "model_type", "llava", "model_type is 'llava', expected internvl_chat"),
        (None, "quantization_config", {"bits": 4}, "quant_method is None"),
        (None, "downsample_ratio", 0.25, "downsample_ratio is 0.25; only 0.5"),
        (None, "use_llm_lora", 16, "use_llm_lora is 16"),
        (None, "force_image_size", 448, "force_image_size is 448; only 28"),
        (None, "image_token_id", 96, "image_token_id 96 is outside the vocabulary of 96"),
        (None, "select_layer", 9, "select_layer 9"),
        (None, "ps_version", "v3", "ps_version is 'v3'"),
    ],
)
def test_configurations_are_checked_before_anything_is_built(
    good: Path, no_allocation: None, part: str | None, key: str, value: Any, message: str
) -> None:
    edit(good / "config.json", lambda values: (values[part] if part else values).update({key: value}))
    with pytest.raises(InputError, match=message) as caught:
        load_model(good)
    assert "config.json" in str(caught.value)


def test_plausible_sizes_that_the_weights_do_not_have_take_no_memory(good: Path, no_allocation: None) -> None:
    edit(good / "config.json", lambda values: values["llm_config"].update(vocab_size=1 << 22, intermediate_size=1 << 20))
    with pytest.raises(InputError, match=r"misshapen: .* instead of \[4194304, 64\]"):
        load_model(good)


@pytest.mark.parametrize("text", ("", "[]", "{", "[" * 100_000, "\xff\xfe"))
def test_config_json_must_be_json(good: Path, text: str) -> None:
    (good / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config.json"):
        load_config(good)


def test_quantized_tensors_are_refused(good: Path) -> None:
    tensors = load_file(good / WEIGHTS)
    tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"].to(torch.int8)
    save_file(tensors, good / WEIGHTS)
    with pytest.raises(InputError, match=r"'mlp1.1.weight' is I8; expected one of F64, F32"):
        load_model(good)
