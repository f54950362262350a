"""The laws of the loop: one update, however its work is split; and it stops at once when something is wrong."""

import json
from dataclasses import replace

import pytest
import torch

from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.train.config import OptimConfig, Stage
from ivl.train.loop import Evaluator, train
from ivl.train.objectives import next_token
from ivl.train.optim import Optimizer
from ivl.train.recorder import Recorder
from ivl.types import IGNORE, Batch, Layout, Loss
from tests.helpers.training import EVERYTHING, BatchList, staged, tiny_batch, tiny_train


def merge(batches: list[Batch]) -> Batch:
    shift, ids = 0, []
    for b in batches:
        ids.append(b.tile_ids_R + shift)
        shift += len(b.tiles_GSSC)
    joined = {n: torch.cat([getattr(b, n) for b in batches]) for n in ("tokens_T", "labels_T", "weights_T", "tiles_GSSC")}
    names = {n: sum((getattr(b, n) for b in batches), ()) for n in ("ids", "sources", "datasets", "sample_lens")}
    return Batch(**joined, tile_ids_R=torch.cat(ids), layout=Layout.packed(names["sample_lens"]), **names)


class NotingOptimizer(Optimizer):
    """Keeps the gradients of the first step; the update itself is not the subject."""

    gradients: dict[str, torch.Tensor]

    def step(self, factor: float) -> None:
        NotingOptimizer.gradients = {n: p.grad.clone() for n, p in self.parameters.items()}
        super().step(factor)


def one_step(batches: list[Batch], stage=EVERYTHING, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    config = tiny_train(num_steps=1, packs_per_step=len(batches), **changes)
    model = staged(stage, checkpointing=config.checkpointing, seed=0)
    (row,) = train(model, BatchList(batches), config)
    return row, NotingOptimizer.gradients


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr("ivl.train.loop.Optimizer", NotingOptimizer)


def assert_same_step(a, b):
    assert abs(a[0]["loss"] - b[0]["loss"]) <= 1e-5 and abs(a[0]["grad_norm"] - b[0]["grad_norm"]) <= 1e-5
    assert max(float((a[1][n] - b[1][n]).abs().max()) for n in a[1]) <= 1e-5
    assert a[0]["tokens"] == b[0]["tokens"] and abs(a[0]["accuracy"] - b[0]["accuracy"]) <= 1e-6


@pytest.mark.parametrize("averaging", ["token", "sample", "square"])
def test_update_is_invariant_to_the_split_into_micro_batches(recorder, averaging):
    parts = [tiny_batch(i, lens=(8 + 3 * i,), tiles=i % 2, averaging=averaging) for i in range(4)]
    whole = one_step([merge(parts)])
    assert_same_step(whole, one_step([merge(parts[:1]), merge(parts[1:])]))
    assert_same_step(whole, one_step(parts))


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": OptimConfig(lr=3e-3)},
        {"optim": OptimConfig(name="muon", lr=3e-3)},
        {"optim": OptimConfig(lr=3e-3), "precision": "bf16", "checkpointing": True},
        {"optim": OptimConfig(lr=1e-2), "stage": Stage(trainable=()), "lora": LoraConfig(rank=4)},
    ],
)
def test_learns(changes):
    marks = {name: changes.pop(name) for name in ("stage", "lora") if name in changes}
    config = tiny_train(num_steps=30, **changes)
    model = staged(**marks, checkpointing=config.checkpointing, seed=0)
    rows = train(model, BatchList([tiny_batch(0)]), config)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_checkpointing_changes_nothing(recorder):
    stage = Stage(trainable=("vision", "projector", "decoder"), drop_path=0.5)
    assert_same_step(one_step([tiny_batch()], stage=stage), one_step([tiny_batch()], stage=stage, checkpointing=True))


def test_each_tile_is_encoded_once_and_shown_where_named():
    model = staged(seed=0)
    once = replace(tiny_batch(tiles=2), tile_ids_R=torch.tensor([0, 0]))
    once = replace(once, tiles_GSSC=once.tiles_GSSC[:1])
    twice = replace(once, tiles_GSSC=once.tiles_GSSC.repeat(2, 1, 1, 1), tile_ids_R=torch.tensor([0, 1]))
    torch.testing.assert_close(next_token(model, once).total, next_token(model, twice).total)


def test_frozen_vision_keeps_no_graph(monkeypatch):
    model = staged(Stage(trainable=("decoder",)))
    seen = []
    encode = model.encode_tiles
    monkeypatch.setattr(model, "encode_tiles", lambda tiles: seen.append(torch.is_grad_enabled()) or encode(tiles))
    next_token(model, tiny_batch()).total.backward()
    assert seen == [False] and model.projector.fc1.weight.grad is None


def test_drop_path_acts_in_a_trained_vit_only():
    for trainable, drops in ((("vision",), True), (("decoder",), False)):
        model = staged(Stage(trainable=trainable, drop_path=0.9))
        losses = {next_token(model, tiny_batch()).total.item() for _ in range(6)}
        assert (len(losses) > 1) == drops


def broken(batch: Batch, **changes) -> Batch:
    return replace(batch, **changes)


def nan_objective(model, batch):
    loss = next_token(model, batch)
    return Loss(loss.total * float("nan"), loss.weight)


def nan_gradient(model, batch):
    loss = next_token(model, batch)
    return Loss(loss.total + (model.projector.fc2.bias * 0).abs().sqrt().sum(), loss.weight)


GOOD = tiny_batch(3)
LABELS = GOOD.labels_T.clone()
LABELS[15] = 200
TOKENS = GOOD.tokens_T.clone()
TOKENS[22] = -1


@pytest.mark.parametrize(
    "batch,objective,message",
    [
        (broken(GOOD, weights_T=torch.zeros(26)), next_token, r"step 1, samples 3-0 \(rows.jsonl:30\).*no trained token"),
        (broken(GOOD, labels_T=LABELS), next_token, r"3-1 \(rows.jsonl:31\): trained label outside the vocabulary of 96"),
        (broken(GOOD, tokens_T=TOKENS), next_token, r"3-2 \(rows.jsonl:32\): token outside the vocabulary of 96"),
        (broken(GOOD, tile_ids_R=torch.tensor([0])), next_token, r"3-0.*8 image placeholder tokens but 4 vision tokens"),
        (broken(GOOD, weights_T=GOOD.weights_T * torch.inf), next_token, r"3-0.*weight that is negative or not finite"),
        (GOOD, nan_objective, r"step 1, samples 3-0 .*loss is nan"),
        (GOOD, nan_gradient, r"step 1: gradient norm is nan.*projector.*samples 3-0"),
    ],
)
def test_stops_within_the_step_and_names_the_sample(batch, objective, message):
    config = tiny_train()
    model = staged(seed=0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(InputError, match=message):
        train(model, BatchList([batch]), config, objective=objective)
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


def test_untrained_labels_may_be_anything():
    config = tiny_train(num_steps=1)
    assert (GOOD.labels_T[GOOD.weights_T == 0] == IGNORE).any()
    train(staged(seed=0), BatchList([GOOD]), config)


def test_ends_with_the_data():
    batches = [tiny_batch(i) for i in range(5)]
    config = tiny_train(num_steps=None, packs_per_step=2, optim=OptimConfig(warmup_ratio=0.5))
    rows = train(staged(seed=0), BatchList(batches, epochs=2), config, num_samples=30)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5] and rows[-1]["total_samples"] == 30
    assert rows[0]["lr"] < rows[2]["lr"] > rows[-1]["lr"] > 0


def test_evaluators_run_on_time_in_eval_mode(tmp_path):
    config = tiny_train(num_steps=5, log_samples=True)
    model = staged(seed=0)
    modes = []

    def run(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return {"score": 0.5}

    train(
        model,
        BatchList([GOOD]),
        config,
        evaluators=(Evaluator("quiz", 2, run),),
        recorder=Recorder("test", config, directory=tmp_path),
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r.get("evaluation") == "quiz"] == [2, 4, 5]
    assert rows[0]["ids"] == ["3-0", "3-1", "3-2"]
    assert modes == [(False, False)] * 3 and model.training
