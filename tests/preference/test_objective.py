"""Packed pairs are the pairs one by one; reference from file, copy or adapters agree; wrong pairs and starts are named."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ivl.checkpoint import save_processor
from ivl.data.records import to_record
from ivl.errors import DataError, InputError
from ivl.formats.rows import write_jsonl
from ivl.preference.config import PreferenceConfig
from ivl.preference.objective import PreferenceObjective
from ivl.preference.reference import frozen
from ivl.preference.replies import reply_log_probs
from ivl.runs.config import RunConfig
from ivl.runs.run import run
from ivl.train.config import OptimConfig, Stage, TrainConfig
from ivl.train.loop import train
from tests.helpers.mixtures import processor
from tests.helpers.pairs import make_pairs, new_model, pair_batches, pair_data
from tests.helpers.training import BatchList, run_config

ALL = PreferenceConfig(sigmoid=0.8, bco=0.0, generation=1.0, ipo=0.1, hinge=0.2, robust=0.1, orpo=0.1, simpo=0.1)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return make_pairs(tmp_path, 10)


def test_packed_pairs_are_the_pairs_one_by_one(pairs: Path) -> None:
    packed, alone = pair_batches(pairs), pair_batches(pairs, max_samples=1)
    assert len(packed) < len(alone) == 10
    reference = frozen(new_model(seed=1))
    found = []
    for data in (packed, alone):
        one = new_model()
        objective = PreferenceObjective(replace(ALL, check_start=False), reference, max_stalled_calls=100)
        losses = [objective(one, batch) for batch in data]
        total = sum(loss.total for loss in losses) / sum(float(loss.weight) for loss in losses)
        total.backward()
        found.append((float(total.detach()), {name: p.grad for name, p in one.named_parameters() if p.grad is not None}))
    (loss, gradients), (loss_alone, gradients_alone) = found
    worst = max(
        float((g - gradients_alone[n]).norm() / gradients_alone[n].norm().clamp(min=1e-6)) for n, g in gradients.items()
    )
    print(f"packed against alone: loss {abs(loss - loss_alone):.1e}, gradients {worst:.1e}")
    assert abs(loss - loss_alone) <= 1e-5 and worst <= 1e-5


def test_the_vision_encoding_is_shared(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = new_model(), []
    encode = one.encode_tiles
    monkeypatch.setattr(one, "encode_tiles", lambda tiles: seen.append(len(tiles)) or encode(tiles))
    data = pair_batches(pairs)
    for batch in data:
        reply_log_probs(one, batch)
    assert sum(seen) == sum(len(batch.tiles_GSSC) for batch in data) == sum(len(batch.tile_ids_R) for batch in data) / 2


def test_gradients_are_those_of_the_formula(pairs: Path) -> None:
    """Against plain autograd in float64 with whole logits."""
    [batch, *_] = pair_batches(pairs)
    one, reference = new_model().double(), frozen(new_model(seed=1).double())
    loss = PreferenceObjective(PreferenceConfig(check_start=False), reference)(one, batch)
    loss.total.backward()
    given = {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}
    one.zero_grad()
    at = batch.weights_T.nonzero().squeeze(1)
    hidden = one(batch.tokens_T, batch.layout, one.encode_tiles(batch.tiles_GSSC)[batch.tile_ids_R])[at]
    log_probs = one.head(hidden).log_softmax(-1).gather(1, batch.labels_T[at, None]).squeeze(1)
    seq = torch.arange(len(batch.layout.new_lens)).repeat_interleave(torch.tensor(batch.layout.new_lens))[at]
    sums = torch.zeros(len(batch.layout.new_lens)).double().index_add(0, seq, log_probs)
    ratios = sums - reference(one, batch)
    chosen, rejected = ratios[0::2] * 0.1, ratios[1::2] * 0.1
    shift = (chosen + rejected).detach().mean() / 2
    s = torch.nn.functional.logsigmoid
    expected = -0.8 * s(chosen - rejected).sum() - 0.2 * (s(chosen - shift) + s(-(rejected - shift))).sum()
    expected = expected - (sums / torch.bincount(seq))[0::2].sum()
    expected.backward()
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, p in one.named_parameters():
        if p.grad is not None:
            assert torch.allclose(given[name], p.grad, rtol=1e-4, atol=1e-6), name


def config(path: Path, start: Path, out: Path, **changes) -> RunConfig:
    options = {
        "name": "mpo", "out_dir": str(out), "model": str(start), "stage": Stage(trainable=("vision", "projector", "decoder")),
        "objective": PreferenceConfig(), "optim": OptimConfig(lr=1e-3), "data": pair_data(path, max_tokens=200, epochs=None),
        "num_steps": 4, "packs_per_step": 1, "precision": "fp32", "tensorboard": False, "log_every": 1000,
    }  # fmt: skip
    return run_config(**{**options, **changes})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ivl.checkpoint import save_model

    folder = tmp_path_factory.mktemp("start")
    save_model(new_model(), folder)
    save_processor(processor(), folder)
    return folder


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_starts_at_ln_2_and_learns(pairs: Path, start: Path, tmp_path: Path) -> None:
    run(config(pairs, start, tmp_path / "run", num_steps=12))
    rows = metrics(tmp_path / "run")
    assert rows[0]["loss/sigmoid"] == pytest.approx(0.6931, abs=1e-4)
    assert rows[0]["loss/bco"] == pytest.approx(2 * 0.6931, abs=2e-4)
    assert rows[-1]["rewards/margin"] > 0 and rows[-1]["rewards/accuracy"] > 0.5
    for key in ("kl", "rewards/chosen", "rewards/rejected", "length/chosen", "log_probs/rejected", "loss/generation"):
        assert key in rows[-1]


def test_references_agree(pairs: Path, start: Path, tmp_path: Path) -> None:
    losses = {}
    for name in ("file", "model"):
        run(config(pairs, start, tmp_path / name, objective=PreferenceConfig(reference=name)))
        losses[name] = [row["loss"] for row in metrics(tmp_path / name)]
    assert losses["file"] == pytest.approx(losses["model"], abs=1e-5)
    from ivl.config import LoraConfig

    lora = LoraConfig(rank=4, targets=("decoder.layers",))
    for name in ("adapters", "model"):
        changes = {"lora": lora, "stage": Stage(trainable=()), "objective": PreferenceConfig(reference=name)}
        run(config(pairs, start, tmp_path / f"lora-{name}", **changes))
        losses[name] = [row["loss"] for row in metrics(tmp_path / f"lora-{name}")]
    assert losses["adapters"] == pytest.approx(losses["model"], abs=1e-5)


def test_a_killed_run_ends_as_if_it_never_was(pairs: Path, start: Path, tmp_path: Path) -> None:
    """Killed inside the reference pass, and between checkpoints: the shift and the file survive."""
    whole = run(config(pairs, start, tmp_path / "whole", num_steps=6, save_every=2))
    out = tmp_path / "killed"
    killed = config(pairs, start, out, num_steps=6, save_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ivl.preference.reference.PAIRS_A_CHUNK", 2)
        patch.setattr("ivl.utils.jsonl.Journal.add", _die_at(2))
        with pytest.raises(KeyboardInterrupt):
            run(killed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ivl.train.optim.Optimizer.step", _die_at(4))
        with pytest.raises(KeyboardInterrupt):
            run(killed, resume=True)
    run(killed, resume=True)
    files = [(folder / "model.safetensors").read_bytes() for folder in (whole, out / "model")]
    assert files[0] == files[1]
    assert [row["loss"] for row in metrics(tmp_path / "whole")] == [row["loss"] for row in metrics(out)]


def _die_at(call: int):
    import ivl.train.optim
    import ivl.utils.jsonl

    plain = {"add": ivl.utils.jsonl.Journal.add, "step": ivl.train.optim.Optimizer.step}
    count = 0

    def method(self, argument):
        nonlocal count
        count += 1
        if count == call:
            raise KeyboardInterrupt
        return plain["step" if isinstance(self, ivl.train.optim.Optimizer) else "add"](self, argument)

    return method


def test_a_reference_of_other_weights_is_refused(pairs: Path, start: Path, tmp_path: Path) -> None:
    [batch, *_] = pair_batches(pairs)
    objective = PreferenceObjective(PreferenceConfig(), frozen(new_model(seed=1)))
    with pytest.raises(ValueError, match=r"pair p\d+ .*pairs.jsonl:\d+\): at the first step .* ln 2 = 0.6931"):
        objective(new_model().train(), batch)


def test_a_policy_that_stays_where_it_is_is_an_error(pairs: Path) -> None:
    one = new_model().train()
    objective = PreferenceObjective(PreferenceConfig(generation=0.0), frozen(copy.deepcopy(one)), max_stalled_calls=3)
    with pytest.raises(InputError, match="after 3 packs the log-ratios"):
        frozen_lr = OptimConfig(lr=1e-30)
        setup = TrainConfig(optim=frozen_lr, num_steps=5, precision="fp32")
        train(one, BatchList(pair_batches(pairs)), setup, objective=objective)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rejected": "a red circle"}, "chosen and rejected are the same"),
        ({"rejected": " "}, "rejected reply is empty"),
        ({"chosen": 3}, "`chosen` must be text or turns"),
        ({"question": None}, "needs `question`"),
    ],
)
def test_bad_pairs_are_named(changes: dict, problem: str) -> None:
    row = {"question": "what is this", "chosen": "a red circle", "rejected": "a square"} | changes
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{problem}"):
        to_record(row, source="rows.jsonl:3", root=Path())


def test_other_layouts_of_a_pair_are_the_same_record() -> None:
    q, good, bad = "what is this", "a red circle", "a square"
    user, says = {"role": "user", "content": q}, lambda text: {"role": "assistant", "content": text}
    rows = [
        {"question": q, "chosen": good, "rejected": bad},
        {"prompt": q, "chosen": good, "rejected": bad},
        {"prompt": [user], "chosen": [says(good)], "rejected": [says(bad)]},
        {"chosen": [user, says(good)], "rejected": [user, says(bad)]},
        {
            "conversations": [{"from": "human", "value": q}],
            "chosen": {"from": "gpt", "value": good},
            "rejected": {"from": "gpt", "value": bad},
        },
    ]
    records = {to_record(row, source="x:1", root=Path()) for row in rows}
    assert len(records) == 1 and len(records.pop().conversations) == 2


def test_a_sample_that_is_no_pair_is_refused(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "what is this"}, {"from": "gpt", "value": "a red circle"}]}
    [batch] = pair_batches(write_jsonl([row], tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1.*has two replies, this sample has 1"):
        PreferenceObjective(PreferenceConfig(), frozen(new_model()))(new_model(), batch)
