"""`ivl train finetune|lora|mpo --model ANY --data ROWS`: from files in another folder to a model that answers."""

import json
from pathlib import Path

import pytest

import ivl
from ivl.checkpoint import load_config
from ivl.checkpoint.config_json import to_json
from ivl.checkpoint.releases import MODELS
from ivl.cli.convert import merge
from ivl.cli.train import train as cli
from ivl.errors import InputError
from ivl.formats.rows import write_jsonl
from ivl.recipes.any_model import any_model
from ivl.runs.directory import load_run_config
from ivl.utils.files import write_json
from tests.helpers.engines import tiny_directory
from tests.helpers.mixtures import make_file, make_rows
from tests.helpers.pairs import make_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("their") / "tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    make_file(folder / "a", 9)
    (folder / "b.json").write_text(json.dumps(make_rows(folder, 6, seed=1)))
    return folder


def answers(directory: Path) -> bool:
    return isinstance(ivl.load(directory).chat("what is this", max_new_tokens=4), str)


def test_fine_tuning_lora_merge_and_mpo(model, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = [str(rows / "a" / "rows.jsonl"), str(rows / "b.json")]
    cli(["finetune", "--model", str(model), "--data", *data, "--data.num-workers", "0", "--dry-run"])
    plan = capsys.readouterr()
    assert "steps      15 for 1 epoch, 1 row a step" in plan.out and not list(tmp_path.iterdir())
    assert "tiny-finetune: published settings of 1B; 15 rows, 1 a step (published 128), 15 steps an epoch" in plan.err
    cli(["finetune", "--model", str(model), "--data", *data, "--data.num-workers", "0"])
    config = load_run_config(Path("runs/tiny-finetune"))
    assert config.data.mixture == tuple(data) and config.data.max_tokens == load_config(model).decoder.max_positions
    assert answers(Path("runs/tiny-finetune/model"))

    cli(["lora", f"--model={model}", f"--data={data[0]}", "--lora.rank", "4", "--data.num-workers", "0", "--optim.lr", "1e-2"])
    merge([str(model), "runs/tiny-lora/adapter", "merged"])
    assert answers(Path("merged"))

    pairs = make_pairs(tmp_path / "pairs", 5)
    cli(["mpo", "--model", "merged", "--data", str(pairs), "--data.num-workers", "0", "--out-dir", "aligned"])
    assert load_run_config(Path("aligned")).name == "merged-mpo" and answers(Path("aligned/model"))


def test_settings_fit_the_data_and_the_ranks(model, tmp_path, monkeypatch):
    many = write_jsonl(make_rows(tmp_path, 3) * 200, tmp_path / "many.jsonl")
    config, _ = any_model("finetune", str(model), (str(many),))
    assert (config.train.packs_per_step, config.data.epochs, config.train.optim.lr) == (16, 1, 4e-5)
    assert (config.train.log_every, config.val_every) == (2, 10)  # of 38 steps
    config, chosen = any_model("finetune", str(model), (str(many),), epochs=8, packs_per_step=10, lr=1e-3)
    assert (config.train.log_every, config.val_every, config.data.epochs) == (24, 48, 8)
    assert "600 rows, 10 a step (published 128), 60 steps an epoch" in chosen and "lr 0.001" in chosen
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert any_model("lora", str(model), (str(many),))[0].train.packs_per_step == 18
    assert any_model("lora", f"{model}/", (str(many),))[0].run_dir == "runs/tiny-lora"


@pytest.mark.parametrize(
    "args,message",
    [
        (["finetune"], "needs --model and --data"),
        (["lora", "--model", "MODEL"], "needs --model and --data"),
        (["mpo", "--model", "MODEL", "--data", "nowhere.jsonl"], r"nowhere.jsonl: no such file"),
        (["finetune", "--model", "no/where/at/all", "--data", "x"], "neither a model directory nor a hub id"),
        (["finetun"], "did you mean finetune"),
        (["examples/lora_finetune.py"], r"name the function, as in examples/lora_finetune.py:\w+"),
    ],
)
def test_mistakes_are_named(model, args, message):
    with pytest.raises(InputError, match=message):
        cli([str(model) if arg == "MODEL" else arg for arg in args])


def test_help_needs_neither_model_nor_data(capsys):
    with pytest.raises(SystemExit):
        cli(["lora", "--help"])
    assert "--lora.rank" in capsys.readouterr().out


def test_a_recipe_file_imports_its_neighbor(tmp_path, capsys):
    (tmp_path / "neighbor_of_mine.py").write_text("NAME = 'from-a-neighbor'\n")
    (tmp_path / "recipe.py").write_text(
        "from dataclasses import replace\nfrom neighbor_of_mine import NAME\nfrom ivl.recipes import find\n"
        "def mine():\n    return replace(find('1B-lora'), name=NAME)\n"
    )
    with pytest.raises(InputError, match=r"data/finetune\.json: no such file"):
        cli([f"{tmp_path}/recipe.py:mine", "--dry-run"])
    assert "from-a-neighbor" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"muon needs whole matrices"):
        cli(["1B-finetune", "--optim.name", "muon", "--shard"])
    with pytest.raises(InputError, match=r"by zero|heads"):
        cli(["1B-finetune", "--architecture.vision.num-heads", "0"])


@pytest.mark.parametrize(("name", "lr"), [("3.5-8B", "2e-07"), ("3-14B", "2e-07"), ("8B", "1e-06"), ("4B", "1e-06")])
def test_a_model_takes_the_settings_of_its_own_release(tmp_path, name, lr):
    config = MODELS[name].config
    write_json(tmp_path / "config.json", to_json(config, "internvl_chat", "bfloat16"))
    pairs = make_pairs(tmp_path / "pairs", 3)
    made, chosen = any_model("mpo", str(tmp_path), (str(pairs),))
    assert f"published settings of {name};" in chosen and chosen.endswith(f"lr {lr}")
    assert made.model == str(tmp_path) and made.architecture is None
