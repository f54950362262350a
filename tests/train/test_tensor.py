"""Tensor parallelism, alone and with FSDP2 and HSDP: loss and gradients are those of one process with all packs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ivl.config import ModelConfig
from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.errors import InputError
from ivl.model.vlm import VLM
from ivl.parallel.launch import start_world, stop_world
from ivl.parallel.shard import shard
from ivl.parallel.tensor import local_config, split
from ivl.preference.config import PreferenceConfig
from ivl.preference.objective import PreferenceObjective
from ivl.preference.reference import frozen
from ivl.train.config import OptimConfig
from ivl.train.loop import train
from ivl.train.objectives import next_token
from ivl.train.optim import Optimizer
from ivl.train.world import ParameterCut, World, cuts_of
from ivl.types import Batch
from tests.helpers.mixtures import make_file, processor
from tests.helpers.pairs import make_pairs, pair_batches
from tests.helpers.ranks import on_ranks
from tests.helpers.training import BatchList, tiny_train

TERMS = PreferenceConfig(check_start=False, bco=0.0, simpo=0.2)
"""Of BCO the shift depends on the order of packs, and so on how data ranks share them."""
FOUR_RANKS = {
    "tensor 2, two replicas": {"tensor": 2},
    "tensor 4": {"tensor": 4},
    "FSDP2 2 x tensor 2": {"tensor": 2, "shard": True},
    "HSDP 2 x 2": {"replicate": 2, "shard": True},
    "HSDP 2 x 1 x tensor 2": {"replicate": 2, "tensor": 2, "shard": True},
}


def config(qwen3: bool) -> ModelConfig:
    """Four key/value heads, and a vocabulary that four ranks cannot share evenly."""
    whole = processor().config
    size = whole.decoder.vocab_size + (-whole.decoder.vocab_size + 2) % 4
    decoder = dataclasses.replace(
        whole.decoder, num_kv_heads=4, num_heads=8, vocab_size=size, qk_norm=qwen3, qkv_bias=not qwen3,
        family="qwen3" if qwen3 else "qwen2",
    )  # fmt: skip
    return dataclasses.replace(whole, decoder=decoder)


def new(seed: int = 0, *, qwen3: bool) -> VLM:
    torch.manual_seed(seed)
    model = VLM(config(qwen3))
    model.init_weights()
    return model


def step(model: VLM, data: list[Batch], pairs: bool, world: World, *, checkpointing: bool) -> dict[str, torch.Tensor]:
    """What the optimizer is given in one step over all packs, whole, and the figures of the step."""
    given: dict[str, torch.Tensor] = {}

    def note(optimizer: Optimizer, factor: float) -> None:
        cuts = cuts_of(model).cuts
        given.update({name: world.whole(p.grad, cuts.get(name)) for name, p in optimizer.parameters.items()})

    objective = next_token
    if pairs:
        reference = frozen(new(1, qwen3=False))
        objective = PreferenceObjective(TERMS, reference, world, max_stalled_calls=100)
    model.vision.checkpointing = model.decoder.checkpointing = checkpointing
    options = tiny_train(num_steps=1, packs_per_step=4, optim=OptimConfig(clip=0), log_every=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", note)
        source = BatchList(data, epochs=1, rank=world.data_rank, world_size=world.data_size)
        figures = train(model, source, options, objective=objective, world=world)[0]
    return given | {name: torch.tensor(figures[name]) for name in figures if "loss" in name or name in COUNTED}


COUNTED = ("grad_norm", "tokens", "samples", "tiles", "packs", "accuracy", "rewards/margin", "kl")


def on_mesh(rank: int, size: int, cases: dict[str, dict], data: dict[bool, list[Batch]], out: Path) -> None:
    start = start_world("cpu")
    for name, options in cases.items():
        world = start.arranged(replicate=options.get("replicate", 1), tensor=options.get("tensor", 1))
        for pairs, batches in data.items():
            model = new(qwen3=not pairs)
            if world.tensor > 1:
                split(model, world)
            if "shard" in options:
                shard(model, world)
            found = step(model, batches, pairs, world, checkpointing=pairs)
            if rank == size - 1:
                torch.save(found, out / f"{name}, {pairs}.pt")
    stop_world(start)


def packs(folder: Path, pairs: bool) -> list[Batch]:
    if pairs:
        return pair_batches(make_pairs(folder / "pairs", 12), max_samples=2)[:3]
    rows = DataConfig(
        mixture=str(make_file(folder / "rows", 12)), max_tokens=300, max_samples=2, max_tiles=30, num_workers=0, epochs=1
    )  # fmt: skip
    return list(Loader(rows, processor(), seed=0))[:3]


def test_loss_and_gradients_are_those_of_one_process(tmp_path):
    """Of three packs a data rank has none, where there are two or four."""
    data = {pairs: packs(tmp_path, pairs) for pairs in (False, True)}
    assert {len(batches) for batches in data.values()} == {3}
    assert any(not len(batch.tiles_GSSC) for batches in data.values() for batch in batches), "a pack of text alone"
    on_ranks(4, on_mesh, 4, FOUR_RANKS, data, tmp_path)
    whole = {
        pairs: step(new(qwen3=not pairs), batches, pairs, World(), checkpointing=False) for pairs, batches in data.items()
    }  # fmt: skip
    worst = {}
    for name in FOUR_RANKS:
        for pairs, expected in whole.items():
            found = torch.load(tmp_path / f"{name}, {pairs}.pt")
            assert found.keys() == expected.keys()
            assert {n: found[n].shape for n in found} == {n: expected[n].shape for n in found}
            case = f"{name}, {'MPO of Qwen2' if pairs else 'SFT of Qwen3'}"
            worst[case] = max(
                float((found[n].double() - expected[n].double()).norm() / expected[n].double().norm().clamp(min=1e-9))
                for n in expected
            )
    print("\n".join(f"{case}: {difference:.1e}" for case, difference in worst.items()))
    assert max(worst.values()) <= 1e-5


@pytest.mark.parametrize(("shape", "cut"), [((12, 3), ParameterCut(0, (6, 4, 2))), ((3, 8), ParameterCut(1, (8,))),
                                            ((7, 3), ParameterCut(0, (7,))), ((12,), ParameterCut(0, (8, 4)))])  # fmt: skip
def test_shares_join_to_the_whole(shape, cut):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    shares = [cut.share(whole, rank, 2) for rank in range(2)]
    assert shares[0].shape == shares[1].shape
    assert cut.join(shares).equal(whole)


def test_too_many_ranks_are_refused_with_what_fits():
    with pytest.raises(InputError, match=r"tensor_parallel is 4, but the decoder's 2 key/value heads .* take 1 or 2"):
        local_config(processor().config, 4)
    with pytest.raises(InputError, match=r"tensor_parallel 2 needs a multiple of 2 processes, there are 1: .*torchrun"):
        World().arranged(tensor=2)
