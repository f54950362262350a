"""`ivl train` as a person with a model and rows calls it: options from files, adapters anywhere, checks before a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ivl.cli.train import train as cli
from ivl.errors import InputError
from ivl.formats.rows import write_jsonl
from ivl.runs.directory import load_run_config
from tests.helpers.engines import tiny_directory
from tests.helpers.mixtures import make_file, make_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("person")
    tiny_directory(place / "tiny")
    make_file(place / "data", 20)
    return place


@pytest.fixture(autouse=True)
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "data"):
        (tmp_path / name).symlink_to(place / name)
    return tmp_path


START = ["--model", "tiny", "--data", "data/rows.jsonl", "--data.num-workers", "0"]


def test_one_command_from_rows_to_a_model_and_what_is_next(capfd: pytest.CaptureFixture[str]) -> None:
    cli(["finetune", *START, "--val-share", "0.2", "--num-steps", "6", "--val-every", "2", "--patience", "2"])
    told = capfd.readouterr()
    assert "16 rows and 4 for validation" in told.err and "done: " in told.err
    assert "ivl eval runs/tiny-finetune/model --data data/rows.jsonl --val-share 0.2 --metric exact" in told.err
    assert told.out.splitlines()[-1] == "runs/tiny-finetune/model"
    config = load_run_config(Path("runs/tiny-finetune"))
    assert config.data.val_share == 0.2 and config.val_data is not None and config.val_data.validation
    assert config.keep_best and config.patience == 2 and Path("runs/tiny-finetune/best").is_dir()


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_options_come_from_a_file_and_the_command_line_goes_before_it(here: Path, suffix: str) -> None:
    values = {
        "recipe": "lora", "model": "tiny", "data": ["data/rows.jsonl"], "num_steps": 1, "optim": {"lr": 1e-3},
        "lora": {"rank": 2, "targets": ["decoder.layers", "projector"]}, "data.num-workers": 0, "checkpointing": False,
    }  # fmt: skip
    text = json.dumps(values)  # which is YAML, too
    if suffix == "yaml":
        text = "recipe: lora\nmodel: tiny\ndata: [data/rows.jsonl]\nnum_steps: 1\noptim:\n  lr: 1e-3\nlora:\n  rank: 2\n"
        text += "  targets: [decoder.layers, projector]\ndata.num-workers: 0\ncheckpointing: no\n"
    Path(f"run.{suffix}").write_text(text)
    cli(["--config", f"run.{suffix}", "--lora.rank", "4", "--out-dir", "out"])
    config = load_run_config(Path("out"))
    assert config.lora is not None and (config.lora.rank, config.lora.targets) == (4, ("decoder.layers", "projector"))
    assert (config.train.num_steps, config.train.optim.lr, config.train.checkpointing) == (1, 1e-3, False)
    cli(["--config", "out/run.json", "--out-dir", "again"])
    assert (here / "again" / "metrics.jsonl").exists()
    assert load_run_config(Path("again")).lora == config.lora


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected options by name"),
        ("a: [", "not valid YAML"),
        ("[" * 5000, "more than 20 levels"),
        ("a: &a [1]\nb: [" + "*a, " * 21 + "]", "or 20 aliases"),
        ("recipe: lora\nmodel: tiny\na: &a {b: *a}", "nested without end"),
        ("a: " + "x" * 300_000, "more than 262,144 bytes"),
        ("model: tiny", "name a recipe, or finetune, lora or mpo"),
        ("recipe: finetune\nmodel: tiny", "needs --model and --data"),
        ("recipe: lora\nmodel: tiny\ndata: data/rows.jsonl\nlora_rank: 3", "--lora-rank is --lora.rank"),
        ("recipe: lora\nmodel: tiny\ndata: data/rows.jsonl\ndevice: cuda:0,cuda:1", "torchrun --nproc-per-node N trains on N"),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, message: str) -> None:
    Path("run.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        cli(["--config", "run.yaml"])
    with pytest.raises(InputError, match="cannot be read"):
        cli(["--config", "nowhere.yaml"])


def test_any_recipe_takes_adapters() -> None:
    cli(["finetune", *START, "--num-steps", "1", "--lora.rank", "2", "--out-dir", "a"])
    config = load_run_config(Path("a"))
    assert config.lora is not None and config.lora.rank == 2 and config.stage.trainable == ("projector",)
    assert Path("a/adapter/adapter_config.json").is_file()
    cli(["finetune", *START, "--num-steps", "1", "--lora.targets", "projector", "--out-dir", "b"])
    assert load_run_config(Path("b")).stage.trainable == ("decoder",)


def dry_run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What a dry run prints, and the error that it ends with."""
    error = ""
    try:
        cli([*arguments, "--dry-run"])
    except InputError as refused:
        error = str(refused)
    assert not Path("runs").exists()
    return capsys.readouterr().out, error


def test_a_dry_run_counts_and_checks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, error = dry_run("finetune", *START, "--val-share", "0.2", "--packs-per-step", "3", capsys=capsys)
    assert error == "" and "steps      6 for 1 epoch, 3 rows a step" in out
    assert "16 rows of 1 data set" in out and "4 rows of 1 data set" in out
    out, error = dry_run("1B-finetune", "--model", "tiny", "--data.mixture", "data/rows.jsonl", capsys=capsys)
    assert "the run was written for" in error
    _, error = dry_run("1B-finetune", "--data.mixture", "nowhere.jsonl", "--log-to", "trackio", capsys=capsys)
    assert "nowhere.jsonl: no such file" in error and 'pip install "ivl[trackio]"' in error
    rows = make_rows(here / "more", 6) if (here / "more").mkdir() is None else []
    rows[0]["image"] = "gone.png"
    write_jsonl(rows, here / "more" / "rows.jsonl")
    _, error = dry_run("finetune", "--model", "tiny", "--data", "more/rows.jsonl", "--data.num-workers", "0", capsys=capsys)
    assert "1 of 6 rows that were tried cannot be used, such as more/rows.jsonl:1: " in error
    assert "`ivl data validate more/rows.jsonl` names them all" in error
    skipping = ["--data.on-error", "skip", "--data.num-workers", "0"]
    out, error = dry_run("finetune", "--model", "tiny", "--data", "more/rows.jsonl", *skipping, capsys=capsys)
    assert error == "" and "1 of 6 rows that were tried cannot be used" in out and "and are left out" in out


def test_steps_are_done_however_many_epochs_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--packs-per-step", "8", "--num-steps", "4"]  # of 20 rows
    out, _ = dry_run("lora", *START, *options, capsys=capsys)
    assert "steps      4, about 1.60 epochs" in out
    out, _ = dry_run("lora", *START, *options, "--data.epochs", "1", capsys=capsys)
    assert "steps      3 for 1 epoch; the data end before 4, see --data.epochs" in out
    cli(["lora", *START, *options])
    assert load_run_config(Path("runs/tiny-lora")).data.epochs is None and "done: 4 steps" in capsys.readouterr().err
    cli(["lora", *START, *options, "--data.epochs", "1", "--out-dir", "short"])
    assert "done: 3 of 4 steps" in capsys.readouterr().err
    cli(["--resume", "short", "--num-steps", "4"])  # as a launcher repeats its command
    assert load_run_config(Path("short")).data.epochs == 1


def test_one_name_of_the_root_of_pictures_and_the_stage_of_other_trainers(capsys: pytest.CaptureFixture[str]) -> None:
    out, error = dry_run("lora", *START, "--root", "data", capsys=capsys)
    assert error == "" and "20 rows of 1 data set" in out
    with pytest.raises(InputError, match=r"--stage is the first word: ivl train finetune\|lora\|mpo"):
        cli(["lora", *START, "--stage", "sft"])


def test_help_shows_no_architecture_of_a_model_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for recipe, shown in (("1B-finetune", False), ("nano-language", True)):
        with pytest.raises(SystemExit):
            cli([recipe, "--help"])
        assert ("--architecture.vision.width" in capsys.readouterr().out) == shown


def test_the_first_line_says_whether_the_memory_suffices(capsys: pytest.CaptureFixture[str]) -> None:
    cli(["lora", *START, "--num_steps", "40", "--optim.lr=2e-3", "--dry-run"])
    said = capsys.readouterr().err
    assert "lr 0.002\n" in said and re.search(r"tokens fit the [\d.,]+ GiB of (this machine|the card)$", said.rstrip())


def test_rows_of_a_given_size_are_not_made_shorter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ivl.recipes.fit.memory_at_hand", lambda: (1 << 20, "this machine"))
    for options in (["--data.max-tokens", "700"], ["--data.max_tokens=700"]):
        cli(["lora", *START, "--num_steps", "40", *options, "--dry-run"])
        assert "for rows of at most 700 tokens, this machine has" in capsys.readouterr().err
