"""Validation rows, the best model, the end of a run that no longer gets better, and what a run says when it is done."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import ivl.runs.run
from ivl.checkpoint import load_model, save_model, save_processor
from ivl.checkpoint.adapter import adapted
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.model.vlm import VLM
from ivl.runs.config import RunConfig
from ivl.runs.outcome import describe, evaluation_command
from ivl.runs.run import run
from ivl.train.config import Stage
from ivl.train.loop import Evaluator
from tests.helpers.mixtures import processor
from tests.helpers.ranks import on_ranks
from tests.helpers.training import changed
from tests.runs.helpers import rows, same_weights, steps


def validations(config: RunConfig) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(config) if row.get("evaluation") == "validation"}


@pytest.fixture
def checked(config) -> RunConfig:
    """The small run with a quarter of its rows for validation, and every step's model."""
    return changed(config, data=replace(config.data, val_share=0.25), val_every=2, keep_best=True, save_every=2, keep_last=0)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Validation losses of this list, in place of those that the model has."""
    losses: list[float] = []

    def build(config: RunConfig, *_: object) -> Evaluator:
        left = list(losses)
        return Evaluator("validation", config.val_every, lambda model: {"loss": left.pop(0)})

    monkeypatch.setattr(ivl.runs.run, "build_validation", build)
    return losses


def test_rows_kept_for_validation_are_not_trained_on(checked) -> None:
    run(changed(checked, num_steps=None, data=replace(checked.data, epochs=2, max_samples=1), packs_per_step=3))
    trained = {id for _, _, ids in steps(checked) for id in ids}
    assert len(trained) == 18 and len(validations(checked)) == 6
    assert [row["epoch"] for row in rows(checked) if "epoch" in row] == pytest.approx([n / 6 for n in range(1, 13)])


def test_the_best_model_is_that_of_the_lowest_loss(checked, scripted) -> None:
    scripted += [5.0, 4.0, 4.5, 3.0, 3.5, 3.1]
    final = run(checked)
    best = Path(checked.run_dir, "best")
    assert same_weights(best, Path(checked.run_dir, "checkpoint-8")) and not same_weights(best, final)
    assert not list(Path(checked.run_dir).glob(".tmp-*")) and not list(Path(checked.run_dir).glob("*.old"))


def test_of_adapters_the_best_is_an_adapter(checked, scripted, tmp_path) -> None:
    scripted += [5.0, 4.0, 4.5, 4.6, 4.7, 4.8]
    base = tmp_path / "base"
    _base(base)
    lora = LoraConfig(rank=4, dropout=0.0, targets=("decoder.layers",))
    run(changed(checked, model=str(base), architecture=None, tokenizer="", stage=Stage(trainable=()), lora=lora))
    found = adapted(load_model(base), Path(checked.run_dir, "best"))
    then = adapted(load_model(base), Path(checked.run_dir, "checkpoint-4"))
    assert all(p.equal(q) for p, q in zip(found.parameters(), then.parameters(), strict=True))


def _base(path: Path) -> None:
    model = VLM(processor().config)
    model.init_weights()
    save_model(model, path)
    save_processor(processor(), path)


def test_a_run_ends_when_the_loss_no_longer_falls_and_stays_ended(checked, scripted) -> None:
    scripted += [3.0, 2.0, 2.5, 2.4, 1.0, 0.5]
    config = changed(checked, patience=2)
    run(config)
    assert [step for step, *_ in steps(config)] == list(range(1, 9)) and validations(config) == {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.4}
    assert "lowest 2.0000 after step 4" in describe(config)
    before = Path(config.run_dir, "metrics.jsonl").read_bytes()
    run(config, resume=True)
    assert Path(config.run_dir, "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_remembers_the_lowest_loss(checked, scripted) -> None:
    scripted += [3.0, 2.0, 2.5]
    config = changed(checked, patience=2)
    with pytest.raises(IndexError):  # of the script, at its end
        run(config)
    scripted[:] = [2.4, 9.0]
    run(config, resume=True)
    assert [step for step, *_ in steps(config)] == list(range(1, 11)) and list(validations(config)) == [2, 4, 6, 10]
    assert same_weights(Path(config.run_dir, "best"), Path(config.run_dir, "checkpoint-4"))


def on_rank(rank: int, config: RunConfig) -> None:
    run(config)


@pytest.mark.parametrize("shard", [False, True])
def test_ranks_keep_the_best_and_end_together(checked, shard) -> None:
    config = changed(checked, device="cpu", shard=shard, patience=1, save_every=2)
    on_ranks(2, on_rank, config)
    losses = validations(config)
    lowest = min(losses, key=lambda step: losses[step])
    assert same_weights(Path(config.run_dir, "best"), Path(config.run_dir, f"checkpoint-{lowest}"))
    assert list(losses)[-1] in (lowest, lowest + 2)


def test_patience_needs_something_to_wait_for(config) -> None:
    with pytest.raises(InputError, match="give --val-share or --val-mixture"):
        run(changed(config, patience=2))
    with pytest.raises(InputError, match="give --val-every"):
        run(changed(config, patience=2, data=replace(config.data, val_share=0.2)))
    assert not Path(config.run_dir).exists()


def test_the_end_says_what_came_of_it_and_what_is_next(checked) -> None:
    run(checked)
    said, place = describe(checked), checked.run_dir
    losses = validations(checked)
    for part in (
        "done: 12 steps in 0 min",
        f"validation loss {losses[12]:.4f} at the end, lowest {min(losses.values()):.4f}",
        f"drawn in {place}/loss.png",
        f"  ivl chat {place}/model\n",
        f"  ivl eval {place}/model --data {checked.data.mixture} --val-share 0.25 --metric exact\n",
        f"  ivl serve {place}/model --web",
    ):
        assert part in said
    assert Path(place, "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_that_evaluates_names_all_that_training_read(checked) -> None:
    data = replace(checked.data, mixture=("my rows.jsonl", "b.jsonl"), root="pictures")
    told = evaluation_command(replace(checked, data=data, val_data=None), "m")
    assert told == "ivl eval m --data 'my rows.jsonl' b.jsonl --root pictures --val-share 0.25 --metric exact"
    told = evaluation_command(replace(checked, val_data=replace(checked.data, mixture="meta.json", val_share=0)), "m")
    assert told == "ivl eval m --data meta.json --metric exact"


class Recorded:
    """Stands for a tracker's package."""

    def __init__(self) -> None:
        self.begun, self.logged, self.ended = {}, [], 0
        self.module = SimpleNamespace(init=self.init, log=lambda row, step: self.logged.append((step, row)), finish=self.finish)

    def init(self, **about) -> None:
        self.begun = about

    def finish(self) -> None:
        self.ended += 1


def test_trackers_get_the_figures(checked, monkeypatch) -> None:
    wandb, trackio = Recorded(), Recorded()
    monkeypatch.setitem(sys.modules, "wandb", wandb.module)
    monkeypatch.setitem(sys.modules, "trackio", trackio.module)
    run(changed(checked, log_to=("wandb", "trackio")))
    assert wandb.begun["name"] == "small" and wandb.begun["dir"] == checked.run_dir and "dir" not in trackio.begun
    assert wandb.begun["config"]["train"]["packs_per_step"] == 2
    assert wandb.logged == trackio.logged and wandb.ended == trackio.ended == 1
    first = rows(checked)[0]
    assert wandb.logged[0][0] == 1 and wandb.logged[0][1]["train/loss"] == first["loss"]
    assert any("validation/loss" in row for _, row in wandb.logged)


def test_a_tracker_that_is_missing_is_one_line_before_anything_is_done(config, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r'--log-to wandb needs wandb: pip install "ivl\[wandb\]"'):
        run(changed(config, log_to=("wandb",)))
    assert not Path(config.run_dir).exists()
