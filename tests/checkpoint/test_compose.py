"""Laws of composing: parts arrive unchanged, to the bit; only the rows of new tokens are new."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivl.checkpoint import load_config, load_model, load_processor, load_tokenizer, save_model, save_processor, save_tokenizer
from ivl.checkpoint.adapter import merge, save_adapter
from ivl.checkpoint.compose import compose
from ivl.checkpoint.keymaps import decoder_map, vision_map
from ivl.config import SPECIAL_TOKENS, LoraConfig
from ivl.errors import InputError
from ivl.lora.layers import add_lora, lora_parameters, merge_lora
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import Tokenizer, train_tokenizer
from ivl.types import ImageRef, Layout, Message, Text
from tests.helpers.checkpoints import random_model, same_weights, tiny_like

TEXTS = ("A red square stands beside a blue circle. 12 of 34 are green.",) * 3


def tokenizer(*special: str, size: int = 280) -> Tokenizer:
    words = Tokenizer(
        train_tokenizer(TEXTS, size, special=()).backend, config={"eos_token": "<|im_end|>", "add_bos_token": False}
    )
    words.add_special(special)
    return words


CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def vlm(directory: Path, size: str = "1B", dialect="internvl_chat", seed: int = 0) -> VLM:
    """A random InternVL directory with a tokenizer of its own."""
    words = tokenizer(*CHAT, *SPECIAL_TOKENS)
    config = tiny_like(size)
    config = replace(
        config,
        decoder=replace(config.decoder, vocab_size=len(words)),
        tiling=replace(config.tiling, max_tiles=7),
        image_token_id=words.id("<IMG_CONTEXT>"),
        eos_token_ids=(words.id("<|endoftext|>"), words.id("<|im_end|>")),
        bos_token_id=None,
        system_message="You see.",
    )
    model = random_model(config, seed)
    save_model(model, directory, dialect=dialect)
    save_processor(Processor(config, words), directory)
    return model


def language_model(directory: Path, size: str = "1B", *, padding: int = 20, special=CHAT, tied: bool = False) -> VLM:
    """A directory as language models are published: alone, own names, without our tokens, rows padded."""
    words = tokenizer(*special)
    config = tiny_like(size)
    config = replace(config, decoder=replace(config.decoder, vocab_size=len(words) + padding, width=48, num_heads=6))
    model = random_model(config, seed=5)
    family = config.decoder.family
    tensors = {}
    for entry in decoder_map(model.decoder, internlm2=family == "internlm2"):
        parts = entry.split(dict(model.named_parameters())[entry.ours].detach())
        tensors |= {name: part.clone() for name, part in zip(entry.theirs, parts, strict=True)}
    directory.mkdir()
    save_model(model, directory / "whole")
    if tied:
        model.decoder.head.weight = model.decoder.embeddings.weight
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    described = json.loads((directory / "whole" / "config.json").read_text())["llm_config"]
    described |= {"tie_word_embeddings": tied, "eos_token_id": [words.id(special[0])]}
    (directory / "config.json").write_text(json.dumps(described))
    save_tokenizer(words, directory)
    return model


@torch.no_grad()
def image_logits(model: VLM) -> torch.Tensor:
    """Of a prompt of one tile, whose pixels follow from a seed."""
    mark = model.config.image_token_id
    tokens_T = torch.tensor([5, *[mark] * model.config.tokens_per_tile, 7, 9])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    return model.head(model(tokens_T, Layout.packed((len(tokens_T),)), model.encode_pixels(pixels)))


@torch.no_grad()
def text_logits(model: VLM, ids: list[int]) -> torch.Tensor:
    return model.head(model(torch.tensor(ids), Layout.packed((len(ids),))))


def vision_equal(a: VLM, b: VLM) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.vision.parameters(), b.vision.parameters(), strict=True))


@pytest.mark.parametrize("size", ["1B", "2B", "llama", "3.5-8B", "3-9B"])
def test_a_trained_vit_moves_to_another_language_model(tmp_path: Path, size: str) -> None:
    """Progressive scaling: the ViT bit-equal, the language model's text untouched, only the nine new rows new."""
    small = vlm(tmp_path / "small")
    large = language_model(tmp_path / "large", "2B" if size == "llama" else size)
    if size == "llama":
        as_llama(tmp_path / "large", large)
    config = compose(tmp_path / "small", tmp_path / "large", None, tmp_path / "out", seed=3)
    model = load_model(tmp_path / "out")
    assert model.config == config == load_config(tmp_path / "out")
    assert vision_equal(model, small)
    words = load_tokenizer(tmp_path / "out")
    known = len(words) - 9
    assert config.decoder.vocab_size == len(words) == known + 9
    assert [words.id(token) for token in SPECIAL_TOKENS] == list(range(known, known + 9))
    assert config.eos_token_ids == (words.id("<|im_end|>"), words.id("<|endoftext|>"))

    ids = words.encode("a blue circle of 34")
    assert torch.equal(text_logits(model, ids)[:, :known], text_logits(large, ids)[:, :known])
    # Nine of the twenty padding rows become the new tokens' input rows; the output rows start as the mean.
    assert torch.equal(model.decoder.embeddings.weight, large.decoder.embeddings.weight[: len(words)])
    head = model.decoder.head.weight
    assert torch.equal(head[:known], large.decoder.head.weight[:known])
    torch.testing.assert_close(head[known:], head[:known].mean(0).expand(9, -1))


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Qwen3"])
def test_a_language_model_written_by_transformers(tmp_path: Path, kind: str) -> None:
    import transformers

    words = tokenizer(*CHAT)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(words) + 5, hidden_size=48, num_hidden_layers=2, intermediate_size=80, num_attention_heads=6,
        num_key_value_heads=2, rope_theta=5e5, max_position_embeddings=512, tie_word_embeddings=kind == "Qwen2",
        eos_token_id=words.id("<|im_end|>"), initializer_range=0.3,
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path / "large")
    save_tokenizer(words, tmp_path / "large")
    vlm(tmp_path / "small")
    compose(tmp_path / "small", tmp_path / "large", None, tmp_path / "out")
    model = load_model(tmp_path / "out")
    ids = words.encode("a blue circle of 34")
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(text_logits(model, ids)[:, : len(words)], expected[:, : len(words)], atol=1e-4, rtol=1e-4)
    assert (model.config.decoder.rope_theta, model.config.decoder.max_positions) == (5e5, 512)


def as_llama(directory: Path, model: VLM) -> None:
    """Rewrite an InternLM2 directory with LLaMA's names."""
    from ivl.model.decoder import Decoder

    config = replace(model.config.decoder, family="llama", rope_dynamic_factor=None)
    model.config = replace(model.config, decoder=config)
    with torch.device("meta"):
        entries = decoder_map(Decoder(config), internlm2=False)
    ours = dict(model.named_parameters())
    pairs = [zip(e.theirs, e.split(ours[e.ours].detach()), strict=True) for e in entries]
    save_file({name: part.clone() for pair in pairs for name, part in pair}, directory / "model.safetensors")
    described = json.loads((directory / "config.json").read_text())
    described |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": None}
    (directory / "config.json").write_text(json.dumps(described))


def test_rows_that_no_checkpoint_has_are_drawn(tmp_path: Path) -> None:
    """InternLM2 has no padding: its vocabulary grows. A base model without ChatML gets those two tokens as well."""
    vlm(tmp_path / "small")
    base = language_model(tmp_path / "base", padding=0, special=("<|endoftext|>",), tied=True)
    for seed in (0, 0, 1):
        compose(tmp_path / "small", tmp_path / "base", None, tmp_path / "out", seed=seed, force=True)
        model = load_model(tmp_path / "out")
        rows = model.decoder.embeddings.weight.detach().clone()
        fresh = model.projector.fc1.weight.detach().clone()
        if seed == 0:
            first, first_projector = rows, fresh
            assert model.config.decoder.vocab_size == base.config.decoder.vocab_size + 11
            new = rows[-11:]
            assert 0.015 < new.std() < 0.025 and new.abs().max() < 0.1
            assert torch.equal(model.decoder.head.weight[:-11], base.decoder.embeddings.weight)  # untied now
        else:
            assert not torch.equal(rows, first) and torch.equal(rows[:-11], first[:-11])
            assert not torch.equal(fresh, first_projector)


def test_parts_of_one_model_make_that_model(tmp_path: Path) -> None:
    for dialect in ("internvl_chat", "transformers"):
        for size in ("1B", "26B"):
            whole = tmp_path / f"{dialect}-{size}"
            model = vlm(whole, size, dialect)
            out = tmp_path / f"{whole.name}-again"
            compose(whole, whole, whole, out, to=dialect)
            again = load_model(out)
            assert same_weights(again, model)
            assert again.config == load_config(whole)
            assert load_tokenizer(out).encode("red 12") == load_tokenizer(whole).encode("red 12")


@pytest.mark.parametrize("dialect", ["internvl_chat", "transformers"])
@pytest.mark.parametrize("size", ["1B", "26B"])
def test_a_vit_alone(tmp_path: Path, dialect, size: str) -> None:
    """InternViT as published: its own config.json, names without a prefix."""
    model = vlm(tmp_path / "whole", size, dialect)
    alone = tmp_path / "vit"
    alone.mkdir()
    ours = dict(model.named_parameters())
    pairs = [zip(e.theirs, e.split(ours[e.ours].detach()), strict=True) for e in vision_map(model.vision, dialect)]
    tensors = {name: part.clone() for pair in pairs for name, part in pair}
    save_file(tensors, alone / "model.safetensors")
    described = json.loads((tmp_path / "whole" / "config.json").read_text())["vision_config"]
    (alone / "config.json").write_text(json.dumps(described))
    compose(alone, tmp_path / "whole", tmp_path / "whole", tmp_path / "out")
    assert same_weights(load_model(tmp_path / "out"), model)
    some = next(iter(tensors))
    save_file({name: t for name, t in tensors.items() if name != some}, alone / "model.safetensors")
    with pytest.raises(InputError, match=rf"1 missing: {some}"):
        compose(alone, tmp_path / "whole", None, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    whole, large = tmp_path / "whole", tmp_path / "large"
    vlm(whole)
    language_model(large)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="maps 128 to 64 numbers, but these parts need 128 to 48"):
        compose(whole, large, whole, out)
    with pytest.raises(InputError, match="'qwen2'; a ViT comes from"):
        compose(large, large, None, out)
    with pytest.raises(InputError, match="'qwen2', expected internvl_chat"):
        compose(whole, large, large, out)
    with pytest.raises(InputError, match="exists; name another"):
        compose(whole, large, None, whole)
    with pytest.raises(InputError, match="No such file"):
        compose(whole, tmp_path / "missing.gguf", None, out)
    words = tokenizer(*CHAT, *(f"<extra{i}>" for i in range(30)))
    save_tokenizer(words, large)
    with pytest.raises(InputError, match="tokenizer has 313 tokens but the model only 303 rows"):
        compose(whole, large, None, out)
    assert not out.exists()


def test_no_part_is_rounded_unless_asked(tmp_path: Path) -> None:
    small = vlm(tmp_path / "small")
    large = language_model(tmp_path / "large")
    stored = load_file(tmp_path / "large" / "model.safetensors")
    save_file({name: t.bfloat16() for name, t in stored.items()}, tmp_path / "large" / "model.safetensors")
    compose(tmp_path / "small", tmp_path / "large", None, tmp_path / "wide")
    wide = load_model(tmp_path / "wide")
    assert wide.dtype == torch.float32 and vision_equal(wide, small)
    assert torch.equal(wide.decoder.norm.weight, large.decoder.norm.weight.bfloat16().float())
    compose(tmp_path / "small", tmp_path / "large", None, tmp_path / "narrow", dtype="bfloat16")
    assert load_model(tmp_path / "narrow").dtype == torch.bfloat16


def test_a_composed_model_answers_about_an_image_and_trains(tmp_path: Path) -> None:
    from PIL import Image

    vlm(tmp_path / "small")
    language_model(tmp_path / "large")
    compose(tmp_path / "small", tmp_path / "large", None, tmp_path / "out")
    model, processor = load_model(tmp_path / "out"), load_processor(tmp_path / "out")
    prompt = processor.prompt((Message("user", (ImageRef(Image.new("RGB", (60, 30), "red")), Text("Which color?"))),))
    vision_RUD = model.encode_tiles(prompt.tiles_GSSC)[prompt.tile_ids_R]
    hidden_TD = model(prompt.tokens_T, Layout.packed((len(prompt.tokens_T),)), vision_RUD)
    model.head(hidden_TD[-1:]).logsumexp(-1).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters())


def test_merge_writes_a_model_that_needs_nothing_else(tmp_path: Path) -> None:
    """The directory alone, opened by a fresh process, gives the logits of model plus adapter."""
    for dialect in ("internvl_chat", "transformers"):
        base = tmp_path / dialect
        model = vlm(base, "2B", dialect)
        add_lora(model, LoraConfig(rank=2, targets=("decoder.layers", "vision.layers")))
        for parameter in lora_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.2)
        save_adapter(model, tmp_path / f"{dialect}-adapter")
        expected = image_logits(model)
        merge(base, tmp_path / f"{dialect}-adapter", tmp_path / f"{dialect}-merged")
        merge_lora(model)
        assert same_weights(load_model(tmp_path / f"{dialect}-merged"), model)
        assert model_type(tmp_path / f"{dialect}-merged") == model_type(base)
        assert load_tokenizer(tmp_path / f"{dialect}-merged").encode("red 12") == load_tokenizer(base).encode("red 12")
    script = (
        "import sys, torch; from ivl.checkpoint import load_model; from tests.checkpoint.test_compose import image_logits;"
        "torch.save(image_logits(load_model(sys.argv[1])), sys.argv[2])"
    )
    base.rename(tmp_path / "gone")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / f"{dialect}-merged"), str(tmp_path / "logits")], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, atol=1e-4, rtol=1e-5)
    (tmp_path / "gone").rename(base)
    with pytest.raises(InputError, match="exists; name another"):
        merge(base, tmp_path / f"{dialect}-adapter", base)


def model_type(directory: Path) -> str:
    return json.loads((directory / "config.json").read_text())["model_type"]
