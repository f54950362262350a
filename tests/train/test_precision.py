"""bf16 computes with copies of float32 parameters: it learns as under autocast, on one rank and on shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ivl.model.vlm import VLM
from ivl.parallel.launch import start_world, stop_world
from ivl.parallel.shard import shard
from ivl.preference.config import PreferenceConfig
from ivl.preference.objective import PreferenceObjective
from ivl.preference.reference import frozen
from ivl.recipes.nano_objectives import caption_words
from ivl.train.loop import Evaluator, train
from ivl.train.objectives import next_token
from ivl.train.precision import computing
from ivl.types import Batch, Loss
from tests.helpers.mixtures import make_file
from tests.helpers.pairs import make_pairs, new_model, pair_batches
from tests.helpers.ranks import on_ranks
from tests.helpers.training import BatchList, staged, tiny_batch, tiny_train


def under_autocast(model: VLM, batch: Batch) -> Loss:
    with torch.autocast("cpu", torch.bfloat16):
        return next_token(model, batch)


def test_the_loss_falls_as_under_autocast() -> None:
    curves = []
    for precision, objective in (("bf16", next_token), ("fp32", under_autocast)):
        config = tiny_train(precision=precision, num_steps=40, packs_per_step=2, log_every=1000)
        rows = train(staged(seed=0), BatchList([tiny_batch(seed) for seed in range(4)]), config, objective=objective)
        curves.append([row["loss"] for row in rows])
    assert curves[0] == pytest.approx(curves[1], abs=5e-3)
    assert curves[0][-1] < curves[0][0] - 0.8
    assert curves[0] != curves[1]


def test_copies_are_in_place_inside_alone() -> None:
    model = staged(seed=0)
    before = dict(model.named_parameters())
    weights = computing(model, "bf16")
    with weights:
        inside = dict(model.named_parameters())
        assert {name for name, p in inside.items() if p.dtype is torch.float32} == {"decoder.embeddings.weight"}
        assert model.dtype is model.encode_tiles(tiny_batch().tiles_GSSC).dtype is torch.bfloat16
    assert all(p is before[name] for name, p in model.named_parameters()) and model.dtype is torch.float32
    with torch.no_grad():
        model.projector.fc1.weight.add_(1)
    with weights:
        assert model.projector.fc1.weight.equal(before["projector.fc1.weight"].bfloat16())


def test_gradients_of_packs_add_up_in_float32() -> None:
    batches = [tiny_batch(seed) for seed in range(3)]
    found = []
    for packs in ([batches[0]], [batches[1]], [batches[2]], batches):
        model = staged(seed=0)
        with computing(model, "bf16"):
            for batch in packs:
                next_token(model, batch).total.backward()
        assert all(p.grad.dtype is torch.float32 for p in model.parameters() if p.grad is not None)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    one, two, three, together = found
    assert all(together[name].equal(one[name] + two[name] + three[name]) for name in together)


def losses_on_rank(rank: int, data: dict[str, list[Batch]], out: Path) -> None:
    world = start_world("cpu")
    found: dict[str, list[float]] = {}
    for kind in ("next_token", "captions", "preference"):
        for sharded in (False, True):
            model = new_model()
            start = new_model()
            if sharded:
                shard(model, world, torch.bfloat16)
                shard(start, world, torch.bfloat16)
            objective = {"next_token": next_token, "captions": caption_words}.get(kind)
            objective = objective or PreferenceObjective(
                PreferenceConfig(), frozen(start if sharded else start.bfloat16()), world
            )  # fmt: skip
            batches = BatchList(data["pairs" if kind == "preference" else "rows"], epochs=1, rank=rank, world_size=2)
            config = tiny_train(precision="bf16", num_steps=3, packs_per_step=2, log_every=1000)
            seen: list[float] = []

            def evaluate(model: VLM, data: Batch = batches.batches[0], seen: list[float] = seen) -> dict[str, float]:
                loss = next_token(model, data)
                seen.append(float(loss.total / loss.weight))
                return {}

            rows = train(
                model, batches, config, objective=objective, world=world, evaluators=(Evaluator("loss", 1, evaluate),)
            )  # fmt: skip
            assert all(p.dtype is torch.float32 for p in model.parameters())
            assert all(hasattr(p, "full_tensor") == sharded for p in model.parameters())
            found[f"{kind} {'shards' if sharded else 'replicas'}"] = [row["loss"] for row in rows] + seen
    (out / f"{rank}.json").write_text(json.dumps(found))
    stop_world(world)


def test_shards_compute_in_bf16_as_replicas_do(tmp_path: Path) -> None:
    """Of three packs the second rank has none in the second step."""
    rows = [tiny_batch_of(tmp_path, seed) for seed in range(3)]
    data = {"rows": rows, "pairs": pair_batches(make_pairs(tmp_path / "pairs", 6), max_samples=2)[:3]}
    on_ranks(2, losses_on_rank, data, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for kind in ("next_token", "captions", "preference"):
        assert first[f"{kind} shards"] == pytest.approx(first[f"{kind} replicas"], abs=5e-3)
        assert first[f"{kind} shards"] == pytest.approx(second[f"{kind} shards"], abs=5e-3)


def tiny_batch_of(folder: Path, seed: int = 0) -> Batch:
    from ivl.data.config import DataConfig
    from ivl.data.loader import Loader
    from tests.helpers.mixtures import processor

    path = make_file(folder / f"rows-{seed}", 6, seed=seed)
    config = DataConfig(mixture=str(path), max_tokens=300, max_tiles=30, num_workers=0, epochs=1)
    return next(iter(Loader(config, processor(), seed=0)))
