"""The gradient of packs spread over ranks is that of the same samples one by one."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.model.vlm import VLM
from ivl.parallel.launch import start_world, stop_world
from ivl.train.config import OptimConfig
from ivl.train.loop import train
from ivl.train.objectives import forward_batch
from ivl.train.optim import Optimizer
from ivl.train.world import World
from ivl.types import Batch
from tests.helpers.mixtures import make_file, processor
from tests.helpers.ranks import on_ranks
from tests.helpers.training import BatchList, tiny_train

AVERAGINGS = ("token", "sample", "square")
Gradients = dict[str, torch.Tensor]


def model() -> VLM:
    torch.manual_seed(0)
    one = VLM(processor().config)
    one.init_weights()
    return one


def batches(path: Path, averaging: str, **changes) -> list[Batch]:
    config = DataConfig(
        mixture=str(path), max_tokens=300, max_tiles=30, averaging=averaging, num_workers=0, epochs=1, **changes
    )  # fmt: skip
    return list(Loader(config, processor(), seed=0))


def of_the_loop(data: list[Batch], world: World) -> Gradients:
    """What the optimizer is given in one step over all of these packs."""
    given: Gradients = {}

    def note(optimizer: Optimizer, factor: float) -> None:
        given.update({name: p.grad.clone() for name, p in optimizer.parameters.items()})

    packs_per_step = math.ceil(len(data) / world.size) * world.size
    config = tiny_train(num_steps=1, packs_per_step=packs_per_step, optim=OptimConfig(clip=0), log_every=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", note)
        train(model(), BatchList(data, epochs=1, rank=world.rank, world_size=world.size), config, world=world)
    return given


def by_the_formula(data: list[Batch]) -> Gradients:
    """sum(w * cross-entropy) / sum(w) in float64, one sample at a time, by nothing but autograd."""
    one = model().double()
    weight = sum(float(batch.weights_T.double().sum()) for batch in data)
    for batch in data:
        logits_TV = one.head(forward_batch(one, batch))
        ce_T = F.cross_entropy(logits_TV, batch.labels_T, ignore_index=-100, reduction="none")
        (ce_T @ batch.weights_T.double() / weight).backward()
    return {name: p.grad for name, p in one.named_parameters()}


def difference(a: Gradients, b: Gradients) -> float:
    """Largest difference of a parameter's gradients, relative to their size."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in b if b[n].any())


def save_of_the_loop(rank: int, data: dict[str, list[Batch]], out: Path) -> None:
    world = start_world("cpu")
    found = {averaging: of_the_loop(packs, world) for averaging, packs in data.items()}
    torch.save(found, out / f"{rank}.pt")
    stop_world(world)


def test_packed_gradients_are_those_of_samples_one_by_one(tmp_path):
    path = make_file(tmp_path, 24)
    packed = {averaging: batches(path, averaging) for averaging in AVERAGINGS}
    alone = {averaging: batches(path, averaging, max_samples=1) for averaging in AVERAGINGS}
    assert len(alone["token"]) == 24 and 4 < len(packed["token"]) < 12 and len(packed["token"]) % 4
    found = {}
    for world_size in (1, 2, 4):
        (tmp_path / str(world_size)).mkdir()
        on_ranks(world_size, save_of_the_loop, packed, tmp_path / str(world_size))
        found[world_size] = [torch.load(tmp_path / str(world_size) / f"{rank}.pt") for rank in range(world_size)]
    for averaging in AVERAGINGS:
        one_by_one, formula = of_the_loop(alone[averaging], World()), by_the_formula(alone[averaging])
        for world_size, ranks in found.items():
            assert all(rank[averaging][n].equal(ranks[0][averaging][n]) for rank in ranks for n in formula)
            loop, exact = difference(ranks[0][averaging], one_by_one), difference(ranks[0][averaging], formula)
            print(f"{averaging:7} {world_size} ranks: {loop:.1e} from one by one, {exact:.1e} from float64")
            assert loop <= 1e-5 and exact <= 1e-5
    assert difference(by_the_formula(alone["token"]), by_the_formula(alone["sample"])) > 0.01, "averagings do differ"
