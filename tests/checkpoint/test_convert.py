"""`ivl convert`: a model directory in the other dialect, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ivl.checkpoint import load_config, load_model, load_processor, save_model, save_processor
from ivl.checkpoint.adapter import save_adapter
from ivl.checkpoint.convert import convert
from ivl.checkpoint.files import new_directory
from ivl.cli.convert import compose as compose_command
from ivl.cli.convert import convert as command
from ivl.cli.convert import merge as merge_command
from ivl.config import SIZES, LoraConfig
from ivl.errors import InputError
from ivl.lora.layers import add_lora, lora_parameters
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import train_tokenizer
from ivl.types import ImageRef, Layout, Message, Text
from tests.helpers.checkpoints import random_model, same_weights, tiny_like


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model directory, born InternLM2, with a tokenizer of its own."""
    tokenizer = train_tokenizer(["what is this", "a red circle"] * 5, 300)
    config = tiny_like("8B")
    config = replace(
        config,
        decoder=replace(config.decoder, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        eos_token_ids=(tokenizer.id("<|im_end|>"),),
        bos_token_id=None,
        pad_token_id=None,
    )
    directory = tmp_path_factory.mktemp("source") / "model"
    save_model(random_model(config), directory)
    save_processor(Processor(config, tokenizer), directory)
    return directory


@torch.no_grad()
def logits(model: VLM, processor: Processor) -> torch.Tensor:
    prompt = processor.prompt((question(),))
    vision = model.encode_tiles(prompt.tiles_GSSC)[prompt.tile_ids_R]
    return model.head(model(prompt.tokens_T, Layout.packed((len(prompt.tokens_T),)), vision))


def question() -> Message:
    return Message("user", (ImageRef(picture()), Text("what is this")))


def picture() -> Image.Image:
    return Image.new("RGB", (100, 50), (200, 30, 30))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_returns_bit_for_bit(size: str, tmp_path: Path) -> None:
    model = random_model(tiny_like(size))
    save_model(model, tmp_path / "chat")
    convert(tmp_path / "chat", tmp_path / "hf", to="transformers", weights_only=True, max_shard_bytes=50_000)
    convert(tmp_path / "hf", tmp_path / "back", to="internvl_chat", weights_only=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "chat" / name).read_bytes(), name
    assert load_config(tmp_path / "hf") == model.config
    assert same_weights(load_model(tmp_path / "hf"), model)
    convert(tmp_path / "back", tmp_path / "hf2", to="transformers", weights_only=True, max_shard_bytes=50_000)
    for file in (tmp_path / "hf").iterdir():
        assert (tmp_path / "hf2" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_converted_directory_is_complete(source: Path, tmp_path: Path) -> None:
    command([str(source), str(tmp_path / "out"), "--to", "transformers"])
    assert {file.name for file in source.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    before = logits(load_model(source), load_processor(source))
    assert torch.equal(before, logits(load_model(tmp_path / "out"), load_processor(tmp_path / "out")))


def test_the_tokenizer_opens_in_transformers(source: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(source, tmp_path / "out", to="transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>user\nwhat is <img><IMG_CONTEXT></img> this 你<|im_end|>\n"
    ours = load_processor(source).tokenizer
    controls = {"<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"}
    ids = theirs(text)["input_ids"]
    assert controls <= set(theirs.convert_ids_to_tokens(ids))
    assert ours.decode(ids, skip_special=False) == text
    assert theirs.context_image_token_id == ours.id("<IMG_CONTEXT>") == load_config(source).image_token_id
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id == ours.id("<|im_end|>")


def test_a_whole_conversation_runs_in_transformers(source: Path, tmp_path: Path) -> None:
    """AutoProcessor and AutoModel on the written directory: the same tokens, and the same logits from the same picture."""
    pytest.importorskip("torchvision", reason="transformers' InternVL processor needs it", exc_type=ImportError)
    transformers = pytest.importorskip("transformers")
    convert(source, tmp_path / "out", to="transformers")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "what is this"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = load_processor(source)
    assert inputs["input_ids"][0].tolist() == ours.prompt((question(),)).tokens_T.tolist()
    with torch.no_grad():
        theirs = model(**inputs).logits[0]
    assert (logits(load_model(source), ours) - theirs).abs().max() <= 1e-4


def test_dtype_converts_the_weights(source: Path, tmp_path: Path) -> None:
    command([str(source), str(tmp_path / "out"), "--to", "internvl_chat", "--dtype", "bfloat16"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert same_weights(load_model(tmp_path / "out"), load_model(source).to(torch.bfloat16))


def test_an_existing_directory_is_replaced_only_on_request(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, to="internvl_chat")
    (out / "leftover").touch()
    with pytest.raises(InputError, match=r"out: exists; .*--force"):
        convert(source, out, to="transformers")
    assert (out / "leftover").exists()
    with pytest.raises(InputError, match=r"out: holds leftover, which ivl did not write"):
        convert(source, out, to="transformers", force=True)
    (out / "leftover").unlink()
    command([str(source), str(out), "--to", "transformers", "--force"])
    assert json.loads((out / "config.json").read_text())["model_type"] == "internvl"
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"has no config\.json with weights, so it is no model directory"):
        convert(source, notes, to="transformers", force=True)
    assert [file.name for file in notes.iterdir()] == ["thesis.txt"]


def test_a_model_can_replace_itself(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "m", to="transformers")
    convert(tmp_path / "m", tmp_path / "m", to="internvl_chat", force=True)
    assert same_weights(load_model(tmp_path / "m"), load_model(source))


def test_what_fails_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError), new_directory(tmp_path / "out") as part:
        (part / "half").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
    convert(source, tmp_path / "out", to="transformers")
    broken = tmp_path / "out" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        convert(tmp_path / "out", tmp_path / "next", to="internvl_chat")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_without_tokenizer_is_refused_unless_asked_for(tmp_path: Path) -> None:
    save_model(random_model(tiny_like("1B")), tmp_path / "bare")
    with pytest.raises(InputError, match="no tokenizer"):
        convert(tmp_path / "bare", tmp_path / "out", to="transformers")
    command([str(tmp_path / "bare"), str(tmp_path / "out"), "--to", "transformers", "--weights-only"])
    assert load_config(tmp_path / "out") == load_config(tmp_path / "bare")


def test_compose_of_one_models_parts_is_that_model(source: Path, tmp_path: Path) -> None:
    parts = ["--vit", str(source), "--llm", str(source), "--projector", str(source)]
    compose_command([*parts, str(tmp_path / "out"), "--to", "transformers"])
    assert same_weights(load_model(tmp_path / "out"), load_model(source))
    with pytest.raises(InputError, match=r"exists; .*--force"):
        compose_command([*parts, str(tmp_path / "out")])


def test_merge_writes_what_the_adapted_model_computes(source: Path, tmp_path: Path) -> None:
    model = load_model(source)
    add_lora(model, LoraConfig(rank=2))
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "adapter")
    merge_command([str(source), str(tmp_path / "adapter"), str(tmp_path / "out")])
    adapted = logits(model, load_processor(source))
    assert (adapted - logits(load_model(source), load_processor(source))).abs().max() > 0.1
    assert (adapted - logits(load_model(tmp_path / "out"), load_processor(tmp_path / "out"))).abs().max() <= 1e-4


def test_the_command_line_reports_bad_input_in_one_line(tmp_path: Path) -> None:
    code = "from ivl.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, "convert", str(tmp_path / "nowhere"), "out", "--to", "transformers"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("ivl convert: ") and "neither a model directory nor a hub id" in run.stderr
    assert "Traceback" not in run.stderr
