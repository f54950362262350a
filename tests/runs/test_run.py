"""run() and `ivl train` from files to a final model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ivl.checkpoint import load_model, load_processor
from ivl.cli.train import train as cli
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.runs.config import differences, to_json
from ivl.runs.config import run_config as read_config
from ivl.runs.directory import load_run_config
from ivl.runs.run import run
from ivl.train.config import Stage
from ivl.train.loop import Evaluator
from tests.helpers.mixtures import processor
from tests.helpers.training import changed
from tests.runs.helpers import rows, same_weights, steps


def stop_at(step: int):
    """Evaluators whose last check ends the process's work, as a crash would."""

    def stop(model):
        raise KeyboardInterrupt

    return lambda processor: (Evaluator("crash", step, stop),)


def test_run_writes_a_model_that_opens_and_says_what_it_did(config):
    final = run(changed(config, val_data=dataclasses.replace(config.data), val_every=6, val_packs=2))
    assert steps(config)[-1][1] < 0.8 * steps(config)[0][1]
    assert [r["step"] for r in rows(config) if r.get("evaluation") == "validation"] == [6, 12]
    reopened = load_processor(final)
    assert len(reopened.tokenizer) == len(processor().tokenizer) and load_model(final).dtype == torch.float32
    environment = json.loads((final.parent / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["data"]
    assert load_run_config(final.parent / "checkpoint-12").name == "small"
    with pytest.raises(InputError, match="holds a run"):
        run(config)


def test_dirty_rows_are_refused_or_counted_by_kind(config):
    mixture = Path(config.data.mixture)
    clean = mixture.read_text().splitlines()
    gone = {"image": "gone.png", "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]}
    two = gone | {"conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "a"}]}
    silent = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}
    bad = [json.dumps(gone), json.dumps(two), json.dumps(silent), "{not json"]
    mixture.write_text("\n".join([*clean, *bad]) + "\n")
    one_pass = changed(config, num_steps=None, save_every=0, data=dataclasses.replace(config.data, epochs=1))
    with pytest.raises(InputError, match=rf"{mixture}:2[5-8]: "):
        run(one_pass)
    run(changed(one_pass, data=dataclasses.replace(one_pass.data, on_error="skip")))
    report = json.loads(Path(config.run_dir, "data_report.json").read_text())
    assert report["rows"] == {"missing_media": 1, "placeholder_mismatch": 1, "empty_answer": 1, "broken_json": 1}
    assert report["draws"] == len(clean) + 4 and sum(r["samples"] for r in rows(config)) == len(clean)
    assert f"{mixture}:28" in report["examples"]["broken_json"][0]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, dropout=0.1)])
def test_resume_is_exact(config, tmp_path, lora):
    if lora is not None:
        base = run(changed(config, out_dir=str(tmp_path / "base"), num_steps=1, save_every=0))
        config = changed(config, model=str(base), tokenizer="", stage=Stage(trainable=("projector",)), lora=lora)
    whole = changed(config, out_dir=str(tmp_path / "whole"))
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(config, evaluators=stop_at(7))
    final = run(config, resume=True)
    assert steps(config) == steps(whole)
    assert same_weights(final, f"{whole.run_dir}/model")
    if lora is not None:
        assert (final.parent / "adapter" / "adapter_model.safetensors").is_file()


def test_resume_refuses_another_configuration(config):
    with pytest.raises(KeyboardInterrupt):
        run(config, evaluators=stop_at(5))
    other = changed(config, optim=dataclasses.replace(config.train.optim, lr=1e-3), log_every=7)
    with pytest.raises(InputError, match=r"optim.lr: 0.003 -> 0.001\).*--allow-changed"):
        run(other, resume=True)
    run(other, resume=True, allow_changed=True)


def test_a_finished_run_without_checkpoints_is_left_alone(config):
    config = changed(config, num_steps=2, save_every=0)
    run(config)
    before = rows(config)
    with pytest.raises(InputError, match="holds a finished run: choose another"):
        run(config)
    with pytest.raises(InputError, match="is finished and kept no checkpoint"):
        run(config, resume=True)
    assert rows(config) == before


def test_relative_paths_are_those_of_the_folder_where_the_run_began(config, tmp_path, monkeypatch):
    (tmp_path / "one/data").mkdir(parents=True)
    for folder in ("two", "runs/mine"):
        (tmp_path / folder).mkdir(parents=True)
    for place in ("one/data/rows.jsonl", "one/own.py", "two/data.jsonl"):
        (tmp_path / place).write_text("")
    values = json.loads(json.dumps(to_json(changed(config, model="org/name", eval_tasks=("own.py:Task", "easy-vqa")))))
    values["data"]["mixture"] = ["data/rows.jsonl", "data.jsonl", "/absolute.jsonl"]
    values["folder"] = "../../one"  # as it is reached from the run's directory
    monkeypatch.chdir(tmp_path / "two")
    here = read_config(values, "../runs/mine/run.json")
    assert here.data.mixture == ("../one/data/rows.jsonl", "data.jsonl", "/absolute.jsonl")
    assert here.eval_tasks == ("../one/own.py:Task", "easy-vqa") and here.model == "org/name"
    monkeypatch.chdir(tmp_path / "one")
    assert read_config(values, "../runs/mine/run.json").data.mixture == tuple(values["data"]["mixture"])
    with pytest.raises(InputError, match="folder must be a path"):
        read_config(values | {"folder": "a\0"}, "run.json")


def test_another_architecture_is_refused(config, tmp_path):
    base = run(changed(config, num_steps=1))
    other = dataclasses.replace(processor().config, decoder=dataclasses.replace(processor().config.decoder, num_layers=5))
    with pytest.raises(InputError, match="decoder"):
        run(changed(config, model=str(base), architecture=other, out_dir=str(tmp_path / "next")))


def test_configuration_survives_json(config):
    config = changed(config, lora=LoraConfig(targets=("decoder.layers",)), stage=Stage(trainable=("vision",)))
    again = read_config(json.loads(json.dumps(to_json(config))), "run.json")
    assert again == config and differences(config, again) == []
    wrong = to_json(config) | {"train": {"optim": {"lrr": 1}}}
    with pytest.raises(InputError, match=r"run.json: train: optim: unknown key 'lrr'; did you mean 'lr'"):
        read_config(wrong, "run.json")


@pytest.mark.parametrize("value", [b"", b"[]", b"null", b"5", b"{}", b"\xff", b"[" * 9000, b'{"name": NaN}'])
def test_any_run_json_is_one_line(config, tmp_path, value):
    (tmp_path / "run.json").write_bytes(value)
    with pytest.raises(InputError, match=r"run\.json"):
        cli(["--resume", str(tmp_path)])


WRONG = {
    "name": [5, None, []], "data": [None, [], {}, {"mixture": 5}, {"mixture": "x", "max_tokens": 0}],
    "train": [[], {"seed": 1.5}, {"seed": -1}, {"seed": 2**64}, {"precision": "fp8"}, {"num_steps": "x"},
              {"optim": {"lr": "x"}}, {"optim": {"eps": -1}}, {"optim": {"clip": -1}}, {"optim": {"betas": [0.9]}}],
    "architecture": [5, [], {"vision": {"num_heads": 0}}], "stage": [None, {"trainable": ["x"]}],
    "objective": [5, {"path": 5}, {"path": "nowhere:x"}, {"further": 1}],
    "lora": [[], {"rank": 0}, {"targets": []}], "val_every": [-1, "x"], "shard": ["yes"], "further": [1],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_any_value_in_run_json_is_one_line(config, key, value):
    good = json.loads(json.dumps(to_json(config)))
    if key in ("train", "architecture") and isinstance(value, dict):
        value = {k: {**good[key][k], **v} if isinstance(v, dict) else v for k, v in value.items()}
        value = good[key] | value
    with pytest.raises(InputError, match=r"run\.json|nowhere|names no objective"):
        read_config(good | {key: value}, "run.json")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_steps": None}, "has no end"),
        ({"stage": Stage(trainable=())}, "nothing would train"),
        ({"lora": LoraConfig()}, "LoRA targets .* trains whole"),
        ({"packs_per_step": 0}, "packs_per_step must be in .1, inf., got 0"),
        ({"architecture": None}, "give `model`"),
    ],
)
def test_configuration_is_checked(config, changes, message):
    with pytest.raises(ValueError, match=message):
        changed(config, **changes)


def test_command_line_runs_and_resumes_a_recipe_of_ones_own(config, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "import json\nfrom ivl.runs.config import run_config\n"
        f"def small():\n    return run_config(json.loads({json.dumps(to_json(config))!r}), 'mine')\n"
    )
    cli([f"{recipe}:small", "--optim.lr", "2e-5", "--num-steps", "3", "--save-every", "2", "--dry-run"])
    assert "steps      3, about 1.00 epochs, 2 packs a step" in capsys.readouterr().out
    cli([f"{recipe}:small", "--optim.lr", "2e-5", "--num-steps", "3", "--save-every", "2"])
    assert capsys.readouterr().out.strip() == f"{config.run_dir}/model"
    cli(["--resume", config.run_dir])
    assert [s for s, *_ in steps(config)] == [1, 2, 3]
    assert load_run_config(tmp_path / "run").train.optim.lr == 2e-5


@pytest.mark.parametrize(
    "args,message",
    [
        (["8b-stage2"], "did you mean 8B-stage2"),
        (["--resume", "nowhere"], "nowhere: not a training run"),
        (["--resume"], "--resume needs the directory"),
        (["nowhere.py:f"], "no such recipe file"),
    ],
)
def test_command_line_mistakes_are_named(args, message):
    with pytest.raises(InputError, match=message):
        cli(args)


def test_command_line_adds_a_validation_loss(config, tmp_path, monkeypatch):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "import json\nfrom ivl.runs.config import run_config\n"
        f"def small():\n    return run_config(json.loads({json.dumps(to_json(config))!r}), 'mine')\n"
    )
    cli([f"{recipe}:small", "--num-steps", "2", "--val-mixture", config.data.mixture, "--val-every", "1"])
    assert [r["step"] for r in rows(config) if r.get("evaluation") == "validation"] == [1, 2]


def test_command_line_typo_is_refused_with_a_suggestion(capsys):
    with pytest.raises(SystemExit):
        cli(["1B-stage1", "--optm.lr", "1e-3"])
    assert "--optim.lr" in capsys.readouterr().err


def test_command_line_lists_recipes(capsys):
    cli([])
    assert "78B-stage1.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "precision,save_dtype,stored",
    [("pure_bf16", None, torch.bfloat16), ("bf16", "bfloat16", torch.bfloat16), ("bf16", None, torch.float32)],
)
def test_precisions(config, precision, save_dtype, stored):
    final = run(changed(config, precision=precision, save_dtype=save_dtype, num_steps=6, save_every=0))
    losses = [loss for _, loss, _ in steps(config)]
    assert losses[-1] < losses[0] and load_model(final).dtype == stored
