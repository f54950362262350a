"""Adapters of other people's making, merged: the model computes what PEFT's own merge computes.

PEFT wraps a tree of plain modules with the names and weights of the class in question, since the original class and older
versions of transformers are not here. It writes the adapter and merges it; neither needs a forward pass.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ivl.checkpoint import load_model, save_model, save_processor
from ivl.checkpoint.adapter import load_adapter, merge, save_adapter
from ivl.checkpoint.config_table import Dialect
from ivl.checkpoint.convert import convert
from ivl.cli.convert import merge as merge_command
from ivl.errors import InputError
from ivl.processing.processor import Processor
from ivl.processing.tokenizer import train_tokenizer
from tests.checkpoint.test_compose import image_logits
from tests.helpers.checkpoints import random_model, tiny_like

peft = pytest.importorskip("peft")
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
QWEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INTERNLM2 = ["wqkv", "wo", "w1", "w2", "w3"]
VIT = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
Tensors = dict[str, torch.Tensor]


def leads(spelling: str) -> dict[str, str]:
    """What leads a class's names, and what leads the same names in the file of a whole model."""
    return {
        "transformers": {"": ""},
        "before 4.52": {
            "language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model.",
            "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
        },
        "original": {"": ""},
        "language model": {"": "language_model."},
        "decoder": {"": "language_model.model."},
        "vit": {"": "vision_model."},
    }[spelling]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An adapter, the class that it was trained around, and the dialect of the directory into which it is merged."""

    name: str
    options: dict[str, Any]
    size: str = "1B"
    spelling: str = "transformers"
    into: Dialect | None = None
    rename: dict[str, str] = field(default_factory=dict)
    """What stands in the adapter's file in place of what PEFT wrote."""

    @property
    def dialect(self) -> Dialect:
        return "transformers" if self.spelling in ("transformers", "before 4.52") else "internvl_chat"


PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 9, "down_proj": 5}}
CASES = [
    Case("plain", {"target_modules": ["q_proj", "v_proj"]}),
    Case("every layer of the decoder", {"target_modules": QWEN, "lora_alpha": 3}),
    Case("rslora", {"target_modules": QWEN, "use_rslora": True}),
    Case("ranks and alphas by name", {"target_modules": QWEN, **PATTERNS}),
    Case("rslora with ranks by name", {"target_modules": QWEN, "use_rslora": True, **PATTERNS}),
    Case(
        "ranks by expression",
        {"target_modules": QWEN, "rank_pattern": {r"^.*\.layers\.\d+\.(?:self_attn|mlp)\..*_proj$": 3, "o_proj": 7}},
    ),
    Case("biases of the adapted", {"target_modules": ["q_proj", "v_proj", "fc1"], "bias": "lora_only"}),
    Case("all biases", {"target_modules": ["k_proj", "projection_layer"], "bias": "all"}),
    Case("projector whole", {"target_modules": QWEN, "modules_to_save": ["multi_modal_projector"]}),
    Case("head and table whole", {"target_modules": QWEN, "modules_to_save": ["lm_head", "embed_tokens"]}),
    Case("norms whole", {"target_modules": QWEN, "modules_to_save": ["input_layernorm", "layernorm_after"]}),
    Case("head", {"target_modules": ["lm_head"]}),
    Case("table", {"target_modules": ["embed_tokens"]}),
    Case("head, table and decoder", {"target_modules": ["lm_head", "embed_tokens", *QWEN], "use_rslora": True}),
    Case("vit", {"target_modules": r".*vision_tower.*\.(q_proj|k_proj|v_proj|projection_layer|fc1|fc2)"}),
    Case("patches", {"target_modules": ["patch_embeddings.projection", "fc2"]}),
    Case("projector", {"target_modules": ["linear_1", "linear_2"]}),
    Case("6B vit", {"target_modules": ["q_proj", "fc1"]}, size="26B"),
    Case("another name", {"target_modules": QWEN}, rename={".weight": ".mine-2.weight"}),
    Case("behind DDP", {"target_modules": QWEN}, rename={"base_model.model.": "module.base_model.model."}),
    Case("compiled", {"target_modules": QWEN}, rename={"base_model.model.": "base_model.model._orig_mod."}),
    Case("before 4.52", {"target_modules": [*QWEN, "fc1", "linear_1", "lm_head", "embed_tokens"]}, spelling="before 4.52"),
    Case(
        "whole parts before 4.52", {"target_modules": QWEN, "modules_to_save": ["multi_modal_projector", "lm_head"]},
        spelling="before 4.52",
    ),
    Case("original class", {"target_modules": [*QWEN, *VIT, "mlp1.1", "mlp1.3"]}, spelling="original"),
    Case("original class with mlp1 whole", {"target_modules": QWEN, "modules_to_save": ["mlp1"]}, spelling="original"),
    Case("InternLM2", {"target_modules": [*INTERNLM2, "output", "tok_embeddings"]}, size="8B", spelling="original"),
    Case(
        "InternLM2 with ViT and ranks", {"target_modules": [*INTERNLM2, *VIT], "rank_pattern": {"wqkv": 3, "attn.qkv": 5}},
        size="26B", spelling="original",
    ),
    Case("InternLM2 as LLaMA, into the original", {"target_modules": QWEN}, size="8B", into="internvl_chat"),
    Case("InternLM2's wqkv, into LLaMA", {"target_modules": INTERNLM2}, size="8B", spelling="original", into="transformers"),
    Case("Qwen3", {"target_modules": QWEN, "modules_to_save": ["q_norm"]}, size="3.5-1B"),
    Case("original class with Qwen3", {"target_modules": [*QWEN, *VIT]}, size="3.5-1B", spelling="original"),
    Case("InternLM3", {"target_modules": QWEN}, size="3-9B", spelling="original"),
    Case("Qwen2ForCausalLM", {"target_modules": [*QWEN, "lm_head"]}, spelling="language model"),
    Case("InternLM2ForCausalLM", {"target_modules": [*INTERNLM2, "output"]}, size="2B", spelling="language model"),
    Case("Qwen2Model", {"target_modules": QWEN, "modules_to_save": ["embed_tokens"]}, spelling="decoder"),
    Case("InternVisionModel", {"target_modules": VIT}, spelling="vit"),
    Case(
        "XTuner", {"target_modules": INTERNLM2}, size="2B", spelling="language model",
        rename={"base_model.model.": "model.language_model.base_model.model."},
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory):
    """Complete model directories by size and dialect; those of one size hold the same weights."""
    root = tmp_path_factory.mktemp("bases")

    def base(size: str, dialect: Dialect) -> Path:
        directory = root / f"{size}-{dialect}"
        if not directory.exists():
            words = train_tokenizer(["what is this", "a red circle"] * 5, 300)
            config = tiny_like(size)
            config = replace(
                config, decoder=replace(config.decoder, vocab_size=len(words)), bos_token_id=None, pad_token_id=None,
                image_token_id=words.id("<IMG_CONTEXT>"), eos_token_ids=(words.id("<|im_end|>"),),
            )  # fmt: skip
            model = random_model(config)
            for parameter in model.parameters():
                parameter.data *= 0.5  # so that float32 tells 1e-5 of a logit
            save_model(model, directory, dialect=dialect)
            save_processor(Processor(config, words), directory)
        return directory

    return base


def tree(tensors: Tensors) -> nn.Module:
    """Modules with these names: linear layers, tables, convolutions, and others that just hold their tensors."""
    root = nn.Module()
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        weight = tensors.get(f"{path}.weight", torch.empty(0))
        owner, module = root, root
        for part in path.split(".") if path else ():
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            owner, module = module, module.get_submodule(part)
        if leaf in ("weight", "bias") and weight.ndim > 1 and type(module) is nn.Module:
            rows, columns = weight.shape[:2]
            biased = f"{path}.bias" in tensors
            last = path.rpartition(".")[2]
            if weight.ndim == 4:
                module = nn.Conv2d(columns, rows, weight.shape[2], weight.shape[2], bias=biased)
            elif last in ("embed_tokens", "tok_embeddings"):
                module = nn.Embedding(rows, columns)
            else:
                module = nn.Linear(columns, rows, bias=biased)
            owner.add_module(last, module)
        setattr(module, leaf, nn.Parameter(tensors[name].clone()))
    return root


def stir(wrapped: nn.Module) -> None:
    """As if trained: everything that trains differs."""
    generator = torch.Generator().manual_seed(1)
    trains = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert trains
    for parameter in trains:
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def expected_model(directory: Path, merged: Tensors, out: Path):
    """The model of a directory with some tensors replaced."""
    tensors = load_file(directory / WEIGHTS)
    assert merged.keys() <= tensors.keys()
    shutil.copytree(directory, out)
    save_file(tensors | {name: tensor.detach().clone() for name, tensor in merged.items()}, out / WEIGHTS)
    return load_model(out)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_merged_is_what_peft_merges(case: Case, bases, tmp_path: Path) -> None:
    source = bases(case.size, case.dialect)
    stored = load_file(source / WEIGHTS)
    names = {
        ours + name.removeprefix(theirs): name
        for name in stored
        for ours, theirs in leads(case.spelling).items()
        if name.startswith(theirs)
    }
    wrapped = peft.get_peft_model(
        tree({spelled: stored[name] for spelled, name in names.items()}), peft.LoraConfig(**{"r": 4, **case.options})
    )
    stir(wrapped)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    merged = wrapped.merge_and_unload().state_dict()
    expected = expected_model(source, {names[spelled]: tensor for spelled, tensor in merged.items()}, tmp_path / "expected")

    file = tmp_path / "adapter" / ADAPTER
    tensors = load_file(file)
    for old, new in case.rename.items():
        tensors = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    base = bases(case.size, case.into or case.dialect)
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    adapted = load_model(base)
    plain = image_logits(adapted)
    load_adapter(adapted, tmp_path / "adapter")
    want = image_logits(expected)
    assert (want - plain).abs().max() > 1e-2
    assert (image_logits(load_model(tmp_path / "merged")) - want).abs().max() <= 1e-5
    assert (image_logits(adapted) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("size", "parts"),
    [
        ("1B", {"language_model": QWEN}), ("1B", {"language_model": QWEN, "vision_model": VIT}),
        ("8B", {"language_model": INTERNLM2}), ("26B", {"vision_model": VIT}),
    ],
)  # fmt: skip
def test_what_the_original_training_leaves_unmerged(
    size: str, parts: dict[str, list[str]], prefix: str, bases, tmp_path: Path
) -> None:
    """Its wrap_llm_lora and wrap_backbone_lora: PEFT around a part, alpha twice the rank, saved whole with the flags."""
    base = bases(size, "internvl_chat")
    stored = load_file(base / WEIGHTS)
    model = tree(stored)
    for part, targets in parts.items():
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.05)
        setattr(model, part, peft.get_peft_model(model.get_submodule(part), config))
        stir(model.get_submodule(part))
    left = tmp_path / "left"
    shutil.copytree(base, left)
    save_file({prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}, left / WEIGHTS)
    config = json.loads((left / "config.json").read_text())
    flags = {"use_llm_lora": 4 * ("language_model" in parts), "use_backbone_lora": 4 * ("vision_model" in parts)}
    (left / "config.json").write_text(json.dumps(config | flags))
    for part in parts:
        setattr(model, part, model.get_submodule(part).merge_and_unload())
    want = image_logits(expected_model(base, model.state_dict(), tmp_path / "expected"))
    assert (want - image_logits(load_model(base))).abs().max() > 1e-2
    assert (image_logits(load_model(left)) - want).abs().max() <= 1e-5
    merge_command([str(left), str(tmp_path / "merged")])
    merge(base, left, tmp_path / "merged-too")
    convert(left, tmp_path / "converted", to="transformers")
    for out in ("merged", "merged-too", "converted"):
        written = json.loads((tmp_path / out / "config.json").read_text())
        assert not (written.get("use_llm_lora") or written.get("use_backbone_lora"))
        assert (image_logits(load_model(tmp_path / out)) - want).abs().max() <= 1e-5


def test_unmerged_directories_that_contradict_themselves_are_refused(bases, tmp_path: Path) -> None:
    base = bases("1B", "internvl_chat")
    with pytest.raises(InputError, match=r"config\.json: names no adapters in use_llm_lora"):
        merge(base, None, tmp_path / "out")
    left = tmp_path / "left"
    shutil.copytree(base, left)
    layer = "language_model.base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{layer}.lora_A.default.weight": torch.ones(4, 64), f"{layer}.lora_B.default.weight": torch.ones(64, 4)}
    save_file(load_file(base / WEIGHTS) | pair, left / WEIGHTS)
    with pytest.raises(InputError, match=r"use_llm_lora is 0, but of such adapters the weights hold adapters of rank 4"):
        load_model(left)
    save_file(load_file(base / WEIGHTS) | {name: tensor[:3] for name, tensor in pair.items()}, left / WEIGHTS)
    with pytest.raises(InputError, match=r"low-rank matrices .* do not fit"):
        load_model(left)


def test_an_adapter_with_ranks_of_its_own_is_saved_with_them(bases, tmp_path: Path) -> None:
    model = load_model(bases("1B", "transformers"))
    wrapped = peft.get_peft_model(
        tree(load_file(bases("1B", "transformers") / WEIGHTS)), peft.LoraConfig(r=4, target_modules=QWEN, **PATTERNS)
    )
    stir(wrapped)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    again = load_model(bases("1B", "transformers"))
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(image_logits(again), image_logits(model))
    reread = peft.PeftModel.from_pretrained(tree(load_file(bases("1B", "transformers") / WEIGHTS)), str(tmp_path / "ours"))
    theirs, ours = (each.merge_and_unload().state_dict() for each in (wrapped, reread))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True.*only plain LoRA"),
        ({"use_what_comes_next": True}, "use_what_comes_next is True, expected false: it is not known here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"rank_pattern": {"(a*)*b": 2}}, "repeats too much"),
        ({"rank_pattern": {"a?" * 30: 2}}, "repeats too much"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj is 0"),
        ({"alpha_pattern": {"[": 2}}, "is no regular expression"),
        ({"alpha_pattern": {f"a.*{n}": 2 for n in range(17)}}, "more than 16 regular expressions"),
    ],
)
def test_what_is_more_than_lora_is_refused(change: dict[str, Any], message: str, bases, tmp_path: Path) -> None:
    base = bases("1B", "transformers")
    wrapped = peft.get_peft_model(tree(load_file(base / WEIGHTS)), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    wrapped.save_pretrained(str(tmp_path))
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(described | change))
    with pytest.raises(InputError, match=message):
        load_adapter(load_model(base), tmp_path)


def test_a_vit_that_ms_swift_trained_whole_is_taken_along(bases, tmp_path: Path) -> None:
    base = bases("1B", "internvl_chat")
    stored = load_file(base / WEIGHTS)
    wrapped = peft.get_peft_model(tree(stored), peft.LoraConfig(r=4, target_modules=QWEN))
    stir(wrapped)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    vit = {name: tensor + 0.1 for name, tensor in stored.items() if name.startswith(("vision_model.", "mlp1."))}
    save_file({f"base_model.model.{name}": tensor for name, tensor in vit.items()}, tmp_path / "adapter" / "vit.safetensors")
    want = image_logits(expected_model(base, wrapped.merge_and_unload().state_dict() | vit, tmp_path / "expected"))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert (image_logits(load_model(tmp_path / "merged")) - want).abs().max() <= 1e-5
    save_file(vit, tmp_path / "adapter" / "projector.safetensors")
    with pytest.raises(InputError, match=r"holds projector\.safetensors beside adapter_model\.safetensors"):
        load_adapter(load_model(base), tmp_path / "adapter")


def test_an_adapter_in_a_wrong_place_says_where_it_belongs(bases, tmp_path: Path) -> None:
    base = bases("1B", "transformers")
    wrapped = peft.get_peft_model(tree(load_file(base / WEIGHTS)), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(InputError, match=r"is a LoRA adapter, not a model; 'ivl merge MODEL .*adapter OUT'"):
        load_model(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is an adapter; name its model before it: ivl merge MODEL"):
        merge_command([str(tmp_path / "adapter"), str(tmp_path / "out")])
    for names in ([], ["a"], ["a", "b", "c", "d"]):
        with pytest.raises(InputError, match=rf"takes MODEL \[ADAPTER\] OUT, got {len(names)} names"):
            merge_command(names)
    with pytest.raises(InputError, match=r"no adapter_config.json; .*adapter has one"):
        merge(base, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickled_adapter_is_not_opened(bases, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"adapter_model\.bin may run code when opened and is never read"):
        load_adapter(load_model(bases("1B", "transformers")), tmp_path)
