"""Laws of checkpoints: names and shapes of the published models, and nothing lost on any way there and back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ivl.checkpoint import load_config, load_model, load_processor, save_model
from ivl.checkpoint.config_json import generation_json, to_json
from ivl.checkpoint.config_table import Dialect
from ivl.checkpoint.keymaps import TensorEntry, key_map
from ivl.checkpoint.model_dir import empty_model
from ivl.checkpoint.releases import MODELS
from ivl.checkpoint.weights import StoredWeights
from ivl.config import SIZES, TilingConfig, published_config
from ivl.errors import InputError
from ivl.model.vlm import VLM
from ivl.utils.files import write_json
from tests.checkpoint.test_hand_over import chat_shapes
from tests.helpers.checkpoints import random_model, remove_head, same_weights, tiny_like

DIALECTS: tuple[Dialect, ...] = ("internvl_chat", "transformers")


def names_and_shapes(model: VLM, dialect: Dialect) -> dict[str, tuple[int, ...]]:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    entries = key_map(model, dialect)
    assert [entry.ours for entry in entries] == list(shapes), "every parameter once"
    pairs = [pair for e in entries for pair in zip(e.theirs, e.shapes(shapes[e.ours]), strict=True)]
    assert len(dict(pairs)) == len(pairs), "every tensor once"
    return dict(pairs)


@pytest.mark.parametrize("size", MODELS)
def test_internvl_chat_names_and_shapes_are_the_published_ones(size: str) -> None:
    config = MODELS[size].config
    assert names_and_shapes(empty_model(config), "internvl_chat") == chat_shapes(config)


@pytest.mark.parametrize("size", MODELS)
def test_transformers_names_and_shapes_are_those_of_the_library(size: str) -> None:
    """At full width. All layers but the first are like the second."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = MODELS[size].config
    few = replace(config, **{part: replace(getattr(config, part), num_layers=2) for part in ("vision", "decoder")})
    with torch.device("meta"):
        library = InternVLForConditionalGeneration(InternVLConfig(**to_json(few, "transformers", "bfloat16")))
    expected = {name: tuple(tensor.shape) for name, tensor in library.state_dict().items()}
    assert names_and_shapes(empty_model(few), "transformers") == expected


def test_wqkv_rows_are_queries_key_value_by_group() -> None:
    """Rows of the published 8B: 32 query heads, 8 groups, head size 128."""
    entry = TensorEntry("qkv", ("wqkv",), groups=(8, 4, 128))
    ours = torch.arange(6144).unsqueeze(1)  # all queries, then all keys, then all values
    (theirs,) = entry.split(ours)
    rows = theirs.squeeze(1).tolist()
    assert rows[:512] == list(range(512)), "query heads 0-3"
    assert rows[512:640] == list(range(4096, 4224)), "key head 0"
    assert rows[640:768] == list(range(5120, 5248)), "value head 0"
    assert rows[768:1280] == list(range(512, 1024)), "query heads 4-7"
    assert torch.equal(entry.join([theirs]), ours)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("size", MODELS)
def test_published_configurations_survive_both_dialects(size: str, dialect: Dialect, tmp_path: Path) -> None:
    config = MODELS[size].config
    write_json(tmp_path / "config.json", to_json(config, dialect, "bfloat16"))
    write_json(tmp_path / "generation_config.json", generation_json(config))
    assert load_config(tmp_path) == config


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_field_survives_but_drop_path(dialect: Dialect, tmp_path: Path) -> None:
    config = tiny_like("2B")
    config = replace(
        config, select_layer=-2, template="plain-chatml", system_message="Hallo", eos_token_ids=(91, 92, 7),
        pixel_shuffle="v1" if dialect == "internvl_chat" else "v2", pad_token_id=None,
        tiling=TilingConfig(tile_size=28, min_tiles=2, max_tiles=7, thumbnail=False, dynamic=False),
        vision=replace(config.vision, norm_eps=1e-5, drop_path=0.4),
        decoder=replace(config.decoder, rope_dynamic_factor=2.5, rope_theta=5e7, max_positions=77, norm_eps=3e-5),
    )  # fmt: skip
    write_json(tmp_path / "config.json", to_json(config, dialect, "bfloat16"))
    write_json(tmp_path / "generation_config.json", generation_json(config))
    assert load_config(tmp_path) == replace(config, vision=replace(config.vision, drop_path=0.0))


def test_reading_a_configuration_imports_no_torch(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", to_json(published_config("8B"), "internvl_chat", "bfloat16"))
    code = "import sys; from ivl.checkpoint import load_config; load_config(sys.argv[1]); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_pixel_shuffle_v1_is_refused_where_it_cannot_be_expressed() -> None:
    with pytest.raises(InputError, match="v1 cannot be written"):
        to_json(replace(tiny_like("1B"), pixel_shuffle="v1"), "transformers", "bfloat16")


def test_published_files_are_understood_without_keys_of_ours(tmp_path: Path) -> None:
    """The original repositories tell the placeholder's id in tokenizer files and the end of a reply nowhere in config.json."""
    for size in ("1B", "8B"):
        config = published_config(size)
        written = to_json(config, "internvl_chat", "bfloat16")
        for key in ("image_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
            del written[key]
        written["llm_config"]["eos_token_id"] = 2
        write_json(tmp_path / "config.json", written)
        end = config.eos_token_ids[0]
        write_json(tmp_path / "added_tokens.json", {"<IMG_CONTEXT>": config.image_token_id, "<|im_end|>": end})
        assert load_config(tmp_path) == config


@pytest.mark.parametrize("size", (*SIZES, "3-2B", "3-9B", "3.5-4B", "3.5-38B"))
@pytest.mark.parametrize("dialect", DIALECTS)
def test_weights_survive_bit_for_bit(size: str, dialect: Dialect, tmp_path: Path) -> None:
    model = random_model(tiny_like(size))
    save_model(model, tmp_path, dialect=dialect, max_shard_bytes=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert same_weights(model, loaded)


def test_one_shard_replaces_many(tmp_path: Path) -> None:
    model = random_model(tiny_like("2B"))
    save_model(model, tmp_path, max_shard_bytes=40_000)
    save_model(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    save_model(model, tmp_path, max_shard_bytes=40_000)
    assert not (tmp_path / "model.safetensors").exists() and same_weights(load_model(tmp_path), model)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs a list of mapped files")
def test_one_shard_is_open_at_a_time(tmp_path: Path) -> None:
    save_model(random_model(tiny_like("1B")), tmp_path, max_shard_bytes=40_000)
    weights = StoredWeights(tmp_path)
    mapped = set()
    for name in weights.shapes:
        weights.get(name)
        maps = {
            line.split("/")[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
        }
        assert len(maps) <= 1
        mapped |= maps
    assert len(mapped) > 3


def test_dtype_is_kept_or_converted(tmp_path: Path) -> None:
    model = random_model(tiny_like("4B"))
    save_model(model, tmp_path, dtype=torch.bfloat16)
    kept, wide = load_model(tmp_path), load_model(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16} == {p.dtype for p in model.to(torch.bfloat16).parameters()}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert same_weights(kept, model) and same_weights(wide, model.float())


def test_the_model_does_not_depend_on_its_file(tmp_path: Path) -> None:
    model = random_model(tiny_like("1B"))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))  # in place: a mapping would see zeros
    assert same_weights(model, loaded)


@pytest.mark.parametrize("size", ("1B", "26B"))
def test_older_unprefixed_names_are_read(size: str, tmp_path: Path) -> None:
    model = random_model(tiny_like(size))
    save_model(model, tmp_path, dialect="transformers")
    older = {
        "lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector.",
    }  # fmt: skip
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        lead = next(new for new in older if name.startswith(new))
        tensors[older[lead] + name.removeprefix(lead)] = tensor
    assert not any(name.startswith(("model.", "lm_head")) for name in tensors)
    tensors["language_model.model.rotary_emb.inv_freq"] = torch.ones(4)  # follows from the configuration
    save_file(tensors, tmp_path / "model.safetensors")
    assert same_weights(model, load_model(tmp_path))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_tied_checkpoint_is_untied(dialect: Dialect, tmp_path: Path) -> None:
    model = random_model(tiny_like("1B"))
    model.decoder.head.weight.data = model.decoder.embeddings.weight.data.clone()
    save_model(model, tmp_path, dialect=dialect)
    remove_head(tmp_path)
    with pytest.raises(InputError, match=r"1 missing: .*lm_head"):
        load_model(tmp_path)
    write_json(tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True})
    loaded = load_model(tmp_path)
    assert same_weights(model, loaded)
    assert loaded.decoder.head.weight.data_ptr() != loaded.decoder.embeddings.weight.data_ptr()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("part", ["top", "language"])
def test_a_tied_flag_counts_wherever_it_stands(dialect: Dialect, part: str, tmp_path: Path) -> None:
    model = random_model(tiny_like("1B"))
    model.decoder.head.weight.data = model.decoder.embeddings.weight.data.clone()
    save_model(model, tmp_path, dialect=dialect)
    remove_head(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())  # both flags are false
    (config if part == "top" else config["llm_config" if "llm_config" in config else "text_config"])["tie_word_embeddings"] = (
        True
    )
    write_json(tmp_path / "config.json", config)
    assert same_weights(model, load_model(tmp_path))


def test_a_head_that_contradicts_the_tied_flag_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(tiny_like("1B"))
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"tie_word_embeddings": True})
    assert same_weights(model, load_model(tmp_path))
    assert "tie_word_embeddings is true, but language_model.lm_head.weight differs from" in capsys.readouterr().err
    model.decoder.head.weight.data = model.decoder.embeddings.weight.data.clone()
    save_model(model, tmp_path)
    write_json(tmp_path / "config.json", config | {"tie_word_embeddings": True})
    load_model(tmp_path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "wrapper",
    [
        "module.",
        "base_model.model.",
        "module.base_model.model.",
        "_forward_module.",
        "_orig_mod.",
        "_fsdp_wrapped_module.",
        "model.",
        "module.model.",
    ],
)
def test_names_behind_a_wrapper_are_recognized(dialect: Dialect, wrapper: str, tmp_path: Path) -> None:
    model = random_model(tiny_like("1B"))
    save_model(model, tmp_path, dialect=dialect)
    file = tmp_path / "model.safetensors"
    save_file({wrapper + name: tensor for name, tensor in load_file(file).items()}, file)
    assert same_weights(model, load_model(tmp_path))


def test_a_lead_that_is_not_known_is_named(tmp_path: Path) -> None:
    save_model(random_model(tiny_like("1B")), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"ema_model." + name: tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"65 tensors have 'ema_model\.' before their names; rename them without it"):
        load_model(tmp_path)


def test_what_is_no_model_directory_is_named(tmp_path: Path) -> None:
    save_model(random_model(tiny_like("1B")), tmp_path / "run" / "checkpoint-500")
    with pytest.raises(InputError, match=r"run: has no config\.json; .*checkpoint-500 has one"):
        load_model(tmp_path / "run")
    (tmp_path / "run" / "model.gguf").touch()
    with pytest.raises(InputError, match=r"run: has GGUF files; 'ivl compose' makes a model"):
        load_model(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-500" / "model.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(InputError, match=r"model\.safetensors: is a web page, not the file itself; download it again"):
        load_model(tmp_path / "run" / "checkpoint-500")
    edited = json.loads((tmp_path / "run" / "checkpoint-500" / "config.json").read_text()) | {"template": "internvl_zh"}
    write_json(tmp_path / "run" / "checkpoint-500" / "config.json", edited)
    with pytest.raises(InputError, match=r"config\.json: template is 'internvl_zh', expected 'internvl2_5' or"):
        load_processor(tmp_path / "run" / "checkpoint-500")


def test_what_peft_kept_beside_the_trained_copies_is_left_out(tmp_path: Path) -> None:
    model = random_model(tiny_like("1B"))
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.startswith("mlp1.1.")]:
        leaf, trained = name.removeprefix("mlp1.1."), tensors.pop(name)
        tensors[f"mlp1.1.modules_to_save.default.{leaf}"] = trained
        tensors[f"mlp1.1.original_module.{leaf}"] = torch.zeros_like(trained)
    save_file(tensors, file)
    assert same_weights(model, load_model(tmp_path))


@pytest.mark.parametrize("size", ["1B", "8B"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_half_converted_directory_is_named_as_such(dialect: Dialect, size: str, tmp_path: Path) -> None:
    """Names of the other dialect in part or in all, as the tools of the original repository leave them."""
    model = random_model(tiny_like(size))
    other: Dialect = "transformers" if dialect == "internvl_chat" else "internvl_chat"
    for name in DIALECTS:
        save_model(model, tmp_path / name, dialect=name)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in (dialect, other))
    vision = {name: tensor for name, tensor in theirs.items() if "vision" in name}
    mixed = vision | {name: tensor for name, tensor in ours.items() if "vision" not in name}
    led = {
        name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head"): tensor
        for name, tensor in ours.items()
    }  # of a Qwen's names only what leads them differs, and -hf directories from before transformers 4.52 have the others
    for tensors in (theirs, mixed, *([led] if dialect == "internvl_chat" else [])):
        save_file(tensors, tmp_path / dialect / "model.safetensors")
        with pytest.raises(InputError, match=r"is half converted: \d+ of \d+ tensors have names of another dialect") as caught:
            load_model(tmp_path / dialect)
        assert "convert the original directory again" in str(caught.value)
    save_file(ours, tmp_path / dialect / "model.safetensors")
    config = json.loads((tmp_path / other / "config.json").read_text())
    kind = json.loads((tmp_path / dialect / "config.json").read_text())["model_type"]
    write_json(tmp_path / dialect / "config.json", config | {"model_type": kind})
    with pytest.raises(InputError, match=r"config\.json: is half converted: model_type is .*_config of the other dialect"):
        load_model(tmp_path / dialect)


def test_wqkv_under_names_of_transformers_is_half_converted(tmp_path: Path) -> None:
    """The original repository's converter renames what leads a name and leaves InternLM2's layers as they are."""
    model = random_model(tiny_like("8B"))
    for dialect in DIALECTS:
        save_model(model, tmp_path / dialect, dialect=dialect)
    tensors, chat = (load_file(tmp_path / name / "model.safetensors") for name in ("transformers", "internvl_chat"))
    body = "model.language_model."
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{body}layers")} | {
        name.replace("language_model.model.", body): tensor for name, tensor in chat.items() if ".attention" in name
    }
    save_file(tensors, tmp_path / "transformers" / "model.safetensors")
    with pytest.raises(InputError, match=r"is half converted: .*attention"):
        load_model(tmp_path / "transformers")


def test_shards_without_an_index_are_read_if_they_are_complete(tmp_path: Path) -> None:
    model = random_model(tiny_like("1B"))
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    assert same_weights(model, load_model(tmp_path))
    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    names = sorted(tensors)
    for number, part in ((1, names[::2]), (2, names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    assert same_weights(model, load_model(tmp_path))
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 shards without .*index.json; model-00001-of-00002.safetensors is missing"):
        load_model(tmp_path)


def test_a_git_lfs_pointer_is_named_in_place_of_any_file(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4000000\n"
    for name in ("model.safetensors", "config.json"):
        save_model(random_model(tiny_like("1B")), tmp_path)
        (tmp_path / name).write_text(pointer)
        with pytest.raises(InputError, match=rf"{name}: is a git-LFS pointer.*git lfs pull"):
            load_model(tmp_path)


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    model = random_model(tiny_like("1B"))
    save_model(model, tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "config.json").read_bytes())
    assert same_weights(model, load_model(tmp_path))


def test_files_say_that_they_are_torch_tensors(tmp_path: Path) -> None:
    save_model(random_model(tiny_like("1B")), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert not list(tmp_path.glob("*.part"))


def test_a_model_with_adapters_is_not_saved_without_them(tmp_path: Path) -> None:
    from ivl.config import LoraConfig
    from ivl.lora.layers import add_lora

    model = random_model(tiny_like("1B"))
    add_lora(model, LoraConfig(rank=2))
    with pytest.raises(InputError, match="merge LoRA adapters first"):
        save_model(model, tmp_path)
