"""`ivl plan`: memory of a rank by torch's trackers on fake ranks, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ivl.cli.plan import plan as cli
from ivl.cli.train import train
from ivl.config import LoraConfig
from ivl.errors import InputError
from ivl.parallel.cards import BUFFERS, CARDS, GIB, Card, Machines
from ivl.parallel.cost import count_operations
from ivl.recipes import find
from ivl.recipes.nano import architecture
from ivl.runs.config import RunConfig
from ivl.runs.plan import build_empty, plan_ranks, proposals
from ivl.train.config import Stage, TrainablePart
from ivl.train.losses import linear_cross_entropy
from ivl.train.objectives import encode_vision
from ivl.train.stage import apply_stage
from tests.helpers.training import staged, tiny_batch


def small(*, layers: int = 2, **changes: object) -> RunConfig:
    """The nano stage that trains everything, with two packs for each of eight ranks; two layers are tracked as they are."""
    base, nano = find("nano-stage2"), architecture()
    train = replace(base.train, packs_per_step=16, precision="bf16", checkpointing=True, optim=find("1B-stage2").train.optim)
    parts = {part: replace(getattr(nano, part), num_layers=layers) for part in ("vision", "decoder")}
    return replace(base, **({"train": train, "shard": True, "architecture": replace(nano, **parts)} | changes))


def test_78b_stage_2_fits_512_cards_of_80_gb() -> None:
    plan = plan_ranks(find("78B-stage2"), Machines(nodes=64))
    assert plan.peak <= 66 * GIB and plan.fits
    moved = plan.tracked.collectives
    whole = sum(p.numel() for p in build(find("78B-stage2")))
    # Each parameter is gathered in bfloat16, forward and backward, and its gradient summed in float32.
    assert moved["all-gather"][1] == pytest.approx(2 * 2 * whole, rel=0.03)
    assert moved["reduce-scatter"][1] == pytest.approx(4 * whole, rel=0.03)
    assert moved["reduce-scatter"][0] == 80 + 45 + 3
    assert plan.checkpoint == 12 * whole
    assert plan.held["moments"] == pytest.approx(8 * whole / 512)
    assert 0.3 < plan.peak_share < 0.5 and 20 < plan.step_seconds < 40


def build(config: RunConfig) -> list[torch.nn.Parameter]:

    return list(build_empty(config).parameters())


def test_8b_stage_2_fits_8_cards_of_80_gb() -> None:
    plan = plan_ranks(find("8B-stage2"), Machines())
    assert plan.setup.shards == 8 and plan.peak <= 72 * GIB and plan.fits


def test_lora_of_78b_fits_8_cards_of_80_gb() -> None:
    plan = plan_ranks(find("78B-lora"), Machines())
    assert plan.fits and plan.held["parameters"] > 36 * GIB


def test_what_does_not_fit_is_refused_with_what_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_ranks(small(), Machines())
    monkeypatch.setitem(CARDS, "small-8gb", Card((8 * GIB + 0.9 * plan.peak) / 1e9, 100, 1000, 32, 3))
    change, other = next(proposals(replace(plan, machines=Machines(card="small-8gb")), {}))
    assert other.fits and other.setup.tokens == 2048 and change == "--data.max-tokens 2048 --data.max-tiles 32"
    monkeypatch.setitem(CARDS, "tiny-8gb", Card(8.6, 100, 1000, 32, 3))
    with pytest.raises(InputError, match=r"does not fit: .* the changes above do$"):
        cli(["nano-language", "--gpus", "1", "--card", "tiny-8gb", "--data.max-tokens", "64"])
    assert "memory of a rank" in capsys.readouterr().out


CASES = [(Machines(), None), (Machines(gpus=1), None), (Machines(), ("projector",))]


@pytest.mark.parametrize("machines,stage", CASES, ids=str)
def test_a_few_layers_tell_what_all_of_them_do(machines: Machines, stage: tuple[TrainablePart, ...] | None) -> None:
    config = small(layers=5) if stage is None else small(layers=5, stage=Stage(trainable=stage), tensor_parallel=2)
    few, whole = (plan_ranks(config, machines, whole=whole) for whole in (False, True))
    assert few.peak == pytest.approx(whole.peak, rel=1e-4)
    assert {n: c for n, (c, _) in few.tracked.collectives.items()} == {n: c for n, (c, _) in whole.tracked.collectives.items()}


def test_copies_of_a_sharded_model_hold_larger_shards() -> None:
    flat, copies = (plan_ranks(small(replicate=n), Machines()) for n in (1, 2))
    assert (copies.setup.shards, copies.setup.replicas) == (4, 2)
    assert copies.held["parameters"] == 2 * flat.held["parameters"] and copies.peak > flat.peak
    assert set(copies.tracked.collectives) - set(flat.tracked.collectives) == {"all-reduce"}


def test_parts_of_memory_follow_the_ranks() -> None:
    one, eight = (plan_ranks(small(), Machines(gpus=gpus)) for gpus in (1, 8))
    assert "bfloat16 copies" in one.held and "bfloat16 copies" not in eight.held
    for part in ("parameters", "gradients", "moments"):
        assert eight.held[part] == one.held[part] / 8
    assert not one.tracked.collectives
    plain = plan_ranks(small(train=replace(small().train, checkpointing=False)), Machines())
    assert plain.peak > eight.peak
    assert plan_ranks(small(train=replace(small().train, packs_per_step=8)), Machines()).held.keys() == {
        "parameters",
        "moments",
    }


def test_adapters_are_all_that_a_checkpoint_holds() -> None:
    config = small(stage=Stage(trainable=()), lora=LoraConfig(rank=4))
    plan = plan_ranks(config, Machines(gpus=1))
    trained = sum(p.numel() for p in build(config) if p.requires_grad)
    assert plan.checkpoint == 12 * trained and plan.held["moments"] == 8 * trained


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["78B-stage2", "--card", "h100"], "did you mean 'h100-80gb'"),
        (["78B-stage2", "--tensor-parallel", "3"], "8 key/value heads cannot be shared"),
        (["1B-stage2", "--tensor-parallel", "8"], "2 key/value heads cannot be shared"),
        (["78B-stage2", "--replicate", "3"], "replicate 3 does not divide the 8 ranks"),
        (["1B-stage2", "--replicate", "2"], "give shard = True"),
        (["78B-lora", "--nodes", "8"], "packs_per_step 16 is not a multiple of the 64 ranks .*: --packs-per-step 64"),
        (["78B-stage2", "--nodes", "0"], "nodes must be in .1, inf., got 0"),
        (["78b-stage2"], "did you mean 78B-stage2"),
        (["--serve", "79B", "--context", "0"], "context must be in"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cli(arguments)


def test_command_prints_a_page_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    train(["nano-language", "--dry-run", "--card", "a100-40gb", "--gpus", "2"])
    page = capsys.readouterr().out
    assert "nano-language on 2 x a100-40gb: 2 ranks, whole on each rank" in page and "left for buffers" in page
    assert max(map(len, page.splitlines())) <= 100
    cli(["nano-language", "--card", "a100-40gb", "--gpus", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["machines"]["card"] == "a100-40gb" and found["proposals"] == []
    assert found["hours"] is None and sum(found["held"].values()) < found["peak"]


def test_operations_are_those_that_torch_counts() -> None:
    model, batch = staged(), tiny_batch()
    apply_stage(model, Stage(trainable=("vision", "projector", "decoder")))
    vision_tokens = len(batch.tile_ids_R) * model.config.tokens_per_tile
    at = (batch.tokens_T != model.config.image_token_id).nonzero().squeeze(1)
    with FlopCounterMode(display=False) as counter:
        hidden = model(batch.tokens_T, batch.layout, encode_vision(model, batch))
        linear_cross_entropy(hidden[at], model.decoder.head.matrix(), batch.tokens_T[at], torch.ones(len(at))).total.backward()
    assert vision_tokens
    ours = count_operations(model, len(batch.tokens_T), len(batch.tiles_GSSC), len(batch.layout.new_lens), reference=False)
    assert ours.model == pytest.approx(counter.get_total_flops(), rel=0.1) and not ours.repeated


def test_cards_are_told_by_their_memory() -> None:
    for name, card in CARDS.items():
        assert card.memory == pytest.approx(float(name.rpartition("-")[2].removesuffix("gb")), rel=0.08)
    assert BUFFERS == 8 * GIB
