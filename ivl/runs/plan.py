"""The plan of a run: what trains, and on given cards memory, traffic, time, checkpoints. No weight is read or made.

Memory and traffic are those of ivl.parallel.track; the rest is arithmetic with the rates of ivl.parallel.cards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ivl.config import ModelConfig
from ivl.errors import InputError
from ivl.model.vlm import VLM
from ivl.parallel.cards import BUFFERS, CARDS, GIB, NODE_WRITES, Card, Machines, find_card
from ivl.parallel.cost import compute_seconds, count_operations, send_seconds
from ivl.parallel.tensor import local_config
from ivl.parallel.track import RankSetup, Tracked, track
from ivl.runs.build import adapt, read_architecture
from ivl.runs.config import RunConfig
from ivl.train.config import PARTS
from ivl.train.optim import is_hidden_matrix
from ivl.train.stage import trainable

SEQUENCES = 4
"""Sequences of a pack that holds as many samples as fit."""
WORKER_BYTES = 1e9
"""Memory of a process that encodes data."""
PACK_STEP = 1024
"""Proposed packs have a multiple of this many tokens."""


def describe_run(config: RunConfig, length: str = "") -> str:
    """Format what trains and how long the run is as a page of text.

    Args:
        config: the run.
        length: how many steps it has, where the rows were counted.

    Raises:
        InputError: if the model's configuration cannot be read, or the stage does not fit it.
    """
    train, optim, data = config.train, config.train.optim, config.data
    parts = count_by_part(build_empty(config))
    counts = parts | {"all": (sum(t for t, _ in parts.values()), sum(f for _, f in parts.values()))}
    unit = "pack" if data.max_samples != 1 else "pair" if config.objective.pairs else "row"
    tokens, tiles = train.packs_per_step * data.max_tokens, train.packs_per_step * data.max_tiles
    return "\n".join([
        f"{config.name}: {config.run_dir}",
        f"start      {config.model or 'random weights'}",
        "",
        f"{'part':11}{'trained':>18}{'frozen':>18}",
        *(f"{part:11}{trained:18,}{frozen:18,}" for part, (trained, frozen) in counts.items()),
        "",
        f"steps      {length or _schedule(config)}, {train.packs_per_step:,} {unit}{'s' * (train.packs_per_step > 1)} a step",
        f"step       at most {tokens:,} tokens and {tiles:,} tiles",
        f"optimizer  {optim.name}, lr {optim.lr:g}, weight decay {optim.weight_decay:g}, "
        f"{optim.schedule} with warm-up {optim.warmup_steps or f'{optim.warmup_ratio:.0%}'}",
        f"precision  {train.precision}{', activations recomputed' if train.checkpointing else ''}",
    ])  # fmt: skip


def _schedule(config: RunConfig) -> str:
    """Say how long a run is whose rows are not counted."""
    return f"{config.train.num_steps:,}" if config.train.num_steps else f"to the end of epoch {config.data.epochs}"


def build_empty(config: RunConfig, architecture: ModelConfig | None = None) -> VLM:
    """Build the run's model on the meta device, adapters included, with what trains marked; or one of another architecture."""
    with torch.device("meta"):
        model = VLM(architecture or config.architecture or read_architecture(config))
        adapt(model, config)
    return model


def count_by_part(model: VLM) -> dict[str, tuple[int, int]]:
    """Count parameters: part -> (trained, frozen)."""
    counts: dict[str, tuple[int, int]] = {}
    for part in PARTS:
        parameters = list(model.get_submodule(part).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        counts[part] = (trained, sum(p.numel() for p in parameters) - trained)
    return counts


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """A run on given cards. Bytes and seconds; what is of a rank is of the fullest one."""

    config: RunConfig
    machines: Machines
    setup: RankSetup
    tracked: Tracked
    held: dict[str, float]
    """What a rank holds between packs."""
    packs_per_rank: int
    compute_seconds: float
    """Of a step, for the operations alone."""
    link_seconds: float
    """Of a step, for messages that are sent beside them."""
    wait_seconds: float
    """Of a step, for messages that nothing is computed beside."""
    peak_share: float
    """Operations of the loss and its gradients, as a share of what the cards could do (MFU)."""
    operations: float
    """Of a pack, those that are repeated included."""
    checkpoint: float
    host: float
    """Memory of a machine."""

    @property
    def card(self) -> Card:
        return find_card(self.machines.card)

    @property
    def peak(self) -> float:
        """The most that a rank holds on its card."""
        return self.tracked.peak + self.held.get("reference", 0)

    @property
    def fits(self) -> bool:
        """Whether the card has room for it and for BUFFERS."""
        return self.peak + BUFFERS <= self.card.size

    @property
    def step_seconds(self) -> float:
        return max(self.compute_seconds, self.link_seconds) + self.wait_seconds

    @property
    def hours(self) -> float | None:
        """Of the whole schedule; None where the data's end decides."""
        return self.config.train.num_steps and self.config.train.num_steps * self.step_seconds / 3600

    @property
    def tokens_per_second(self) -> float:
        return self.config.train.packs_per_step * self.config.data.max_tokens / self.step_seconds

    @property
    def checkpoint_seconds(self) -> float:
        """By all machines where each rank writes what it has, else by one."""
        return self.checkpoint / NODE_WRITES / (self.machines.nodes if self.setup.shards > 1 else 1)

    def to_json(self) -> dict[str, Any]:
        """Return the figures under the names of this class."""
        names = (
            "fits", "peak", "held", "packs_per_rank", "operations", "step_seconds", "compute_seconds", "link_seconds",
            "wait_seconds", "hours", "tokens_per_second", "peak_share", "checkpoint", "checkpoint_seconds", "host",
        )  # fmt: skip
        about = {"recipe": self.config.name, "machines": asdict(self.machines), "shards": self.setup.shards}
        pack = {"tokens": self.setup.tokens, "tiles": self.setup.tiles, "collectives": self.tracked.collectives}
        return about | pack | {name: getattr(self, name) for name in names} | {"fullest": self.tracked.fullest}

    def memory_rows(self) -> list[str]:
        """Format the memory of a rank."""
        note = f"{self.setup.tokens:,} tokens, {self.setup.tiles} tiles, and what is gathered for them"
        parts = {**self.held, "pack": self.peak - sum(self.held.values()), "peak": self.peak}
        notes = {"pack": f"  {note}", "peak": f"  {self.tracked.fullest}"}
        rows = [f"  {name:20}{size / GIB:9.2f}{notes.get(name, '')}" for name, size in parts.items()]
        return [f"{'memory of a rank':22}{'GiB':>9}", *rows]

    def describe(self) -> str:
        """Format the plan as a page of text."""
        setup, train, gib = self.setup, self.config.train, self.card.size / GIB
        ways = [f"{setup.shards} shards" if setup.shards > 1 else "whole on each rank"]
        ways += [f"{setup.replicas} groups of them"] if setup.shards > 1 and setup.replicas > 1 else []
        ways += [f"tensor parallel {setup.tensor_parallel}"] if setup.tensor_parallel > 1 else []
        rows = [f"{self.config.name} on {self.machines}: {self.machines.ranks} ranks, {', '.join(ways)}", ""]
        rows += [
            *self.memory_rows(),
            f"  {'left for buffers':20}{gib - self.peak / GIB:9.2f}  of {gib:.1f}; {BUFFERS // GIB} are needed",
            "",
        ]
        rows += [f"{'collectives of a pack':22}{'calls':>9}{'GB':>9}"]
        rows += [f"  {name:20}{n:9,}{size / 1e9:9.1f}" for name, (n, size) in self.tracked.collectives.items()]
        rows += ["  none"] * (not self.tracked.collectives)
        rows += [""]
        hours = f"{self.hours:,.1f} h for {train.num_steps:,} steps" if self.hours else ""
        facts = {
            "pack": f"{self.operations:.2e} operations",
            "step": f"{self.step_seconds:,.1f} s, {self.packs_per_rank} packs a rank: computes {self.compute_seconds:,.1f} s, "
            f"sends {self.link_seconds:,.1f} s beside it, waits {self.wait_seconds:,.1f} s",
            "tokens/s": f"{self.tokens_per_second:,.0f}, at {self.peak_share:.0%} of the cards' peak",
            "schedule": hours or _schedule(self.config),
            "checkpoint": f"{self.checkpoint / 1e9:,.1f} GB, {self.checkpoint_seconds:,.0f} s at {NODE_WRITES / 1e9:g} GB/s a "
            "machine",
            "host memory": f"{self.host / 1e9:,.0f} GB of each machine",
        }  # fmt: skip
        return "\n".join([*rows, *(f"{name:13}{text}" for name, text in facts.items())])


def plan_ranks(config: RunConfig, machines: Machines, *, tracked: Tracked | None = None, whole: bool = False) -> RankPlan:
    """Plan a run on given cards.

    Args:
        config: the run.
        machines: the cards.
        tracked: of the same run on other cards, if it is known.
        whole: track all layers instead of a few.

    Raises:
        InputError: if the ranks cannot share the run, or its model cannot be read.
    """
    architecture = config.architecture or read_architecture(config)
    model, setup = build_empty(config), setup_of(config, machines, architecture)
    if tracked is None:
        named = config.stage.vision_from_layer or (config.lora and any(c.isdigit() for c in "".join(config.lora.targets)))
        tracked = track(lambda part: build_empty(config, part), architecture, setup, whole=whole or bool(named))
    packs = config.train.packs_per_step // (machines.ranks // config.tensor_parallel)
    reference = config.objective.has_reference_copy
    operations = count_operations(model, setup.tokens, setup.tiles, setup.sequences, reference=reference)
    card, total = find_card(machines.card), operations.model + operations.repeated
    beside, pack_waits, step_waits = _send_times(model, setup, machines, tracked)
    held, checkpoint, host = _storage(model, config, setup, machines)
    links, waits = packs * beside, packs * pack_waits + step_waits
    compute = packs * compute_seconds(total / setup.tensor_parallel, card)
    seconds = max(compute, links) + waits
    return RankPlan(
        config=config, machines=machines, setup=setup, tracked=tracked, held=held, packs_per_rank=packs,
        compute_seconds=compute, link_seconds=links, wait_seconds=waits,
        peak_share=operations.model * config.train.packs_per_step / (seconds * machines.ranks * card.tflops * 1e12),
        operations=total, checkpoint=checkpoint, host=host,
    )  # fmt: skip


def describe_alone(config: RunConfig) -> str:
    """Format the memory of a run in one process, which shares nothing."""
    rows = plan_ranks(config, Machines(gpus=1)).memory_rows()
    above = "libraries and rows that wait take about 1.5 GiB beside it"
    return "\n".join([*rows, "", above, "for many ranks add --nodes N --gpus N --card NAME, or ask `ivl plan`"])


def setup_of(config: RunConfig, machines: Machines, architecture: ModelConfig) -> RankSetup:
    """Return what one rank of the machines holds and does.

    Raises:
        InputError: if the ranks cannot share out heads or packs.
    """
    train, data, ranks = config.train, config.data, machines.ranks // config.tensor_parallel
    if config.tensor_parallel > 1:
        local_config(architecture, config.tensor_parallel)
        if machines.gpus % config.tensor_parallel:
            raise InputError(f"tensor_parallel {config.tensor_parallel} does not divide the {machines.gpus} GPUs of a machine")
    if ranks % config.replicate:
        raise InputError(f"replicate {config.replicate} does not divide the {ranks} ranks that have packs of their own")
    if train.packs_per_step % ranks:
        packs = -(-train.packs_per_step // ranks) * ranks
        raise InputError(
            f"packs_per_step {train.packs_per_step} is not a multiple of the {ranks} ranks that have packs of their own: "
            f"--packs-per-step {packs}, or other machines"
        )
    sharded = config.shard and ranks > 1
    muon = train.optim.name == "muon"
    return RankSetup(
        precision="bf16" if train.precision == "auto" else train.precision,
        shards=ranks // config.replicate if sharded else 1,
        replicas=config.replicate if sharded else ranks,
        tensor_parallel=config.tensor_parallel,
        moments=lambda name, p: 1 if muon and is_hidden_matrix(name, p) else 2,
        accumulates=train.packs_per_step > ranks,
        tokens=data.max_tokens,
        tiles=min(data.max_tiles, data.max_tokens // (architecture.tokens_per_tile + 2)),
        sequences=2 if config.objective.pairs else SEQUENCES if data.max_samples is None else min(data.max_samples, SEQUENCES),
    )


def _storage(model: VLM, config: RunConfig, setup: RankSetup, machines: Machines) -> tuple[dict[str, float], float, float]:
    """Return bytes that a rank holds between packs, of a checkpoint, and of a machine's memory."""
    size = 2 if setup.precision == "pure_bf16" else 4
    parameters, trained = list(model.parameters()), trainable(model)
    # Tensor ranks share the decoder alone.
    shared = {p: setup.shards * (setup.tensor_parallel if n.startswith("decoder.") else 1) for n, p in model.named_parameters()}
    count, own = (sum(p.numel() / shared[p] for p in ps) for ps in (parameters, trained.values()))
    moments = {p: setup.moments(name, p) for name, p in trained.items()}
    held = {"parameters": size * count}
    if setup.precision == "bf16" and setup.shards == 1:
        held["bfloat16 copies"] = 2 * (count - model.decoder.embeddings.weight.numel() / setup.tensor_parallel)
    if setup.accumulates:
        held["gradients"] = size * own
    held["moments"] = size * sum(p.numel() * n / shared[p] for p, n in moments.items())
    if config.objective.has_reference_copy:
        held["reference"] = count * (2 if setup.precision == "bf16" and setup.shards == 1 else size)
    saved = list(trained.values()) if config.lora else parameters
    checkpoint = float(size * (sum(p.numel() for p in saved) + sum(p.numel() * n for p, n in moments.items())))
    largest = max(p.numel() for p in parameters)
    copies = 2 if config.objective.has_reference_copy else 1
    start = machines.gpus * size * copies * (count + (largest if setup.shards > 1 else 0))
    saving = checkpoint if setup.shards == 1 else machines.gpus * checkpoint / setup.shards / setup.tensor_parallel
    return held, checkpoint, max(start, saving) + machines.gpus * config.data.num_workers * WORKER_BYTES


def _send_times(model: VLM, setup: RankSetup, machines: Machines, tracked: Tracked) -> tuple[float, float, float]:
    """Return seconds of messages: beside a pack's computation, waited for in a pack, and waited for at the end of a step."""
    card, tensor = find_card(machines.card), setup.tensor_parallel
    near = {"shards": setup.shards * tensor <= machines.gpus, "replicas": machines.nodes == 1}
    sizes = {name: size for name, (_, size) in tracked.collectives.items()}
    gradients = 4.0 * sum(p.numel() for p in trainable(model).values()) / tensor
    beside = sum(
        send_seconds(sizes.get(name, 0), setup.shards, card, near=near["shards"]) for name in ("all-gather", "reduce-scatter")
    )
    # FSDP2 sums the shards of replicas for every pack; whole models are summed once a step.
    own = gradients / setup.shards if setup.shards > 1 else 0.0
    beside += 2 * send_seconds(own, setup.replicas, card, near=near["replicas"])
    stream = 2 * max(0.0, sizes.get("all-reduce", 0) - own * (setup.replicas > 1)) + sizes.get("all-gather of tensor ranks", 0)
    pack = send_seconds(stream, tensor, card, near=True)
    step = 2 * send_seconds(gradients, setup.replicas, card, near=near["replicas"]) if setup.shards == 1 else 0.0
    return beside, pack, step


def proposals(plan: RankPlan, others: Mapping[str, RunConfig]) -> Iterator[tuple[str, RankPlan]]:
    """Yield plans that fit in place of one that does not, each with what to change.

    Args:
        plan: the one that does not fit.
        others: runs that may stand in for it, by what says so.
    """
    for way in _ways(plan, others):
        for change, config, machines in way:
            try:
                other = plan_ranks(config, machines, tracked=plan.tracked if change.startswith("--card") else None)
            except InputError:  # heads or packs cannot be divided so
                continue
            if other.fits:
                yield change, other
                break


Change = tuple[str, RunConfig, Machines]


def _ways(plan: RankPlan, others: Mapping[str, RunConfig]) -> Iterator[Iterator[Change]]:
    """Yield ways to need less memory of a card, each with its smallest changes first."""
    config, machines = plan.config, plan.machines
    if not config.train.checkpointing:
        yield iter([("--checkpointing", replace(config, train=replace(config.train, checkpointing=True)), machines)])
    if not config.shard and plan.setup.replicas > 1 and config.train.optim.name != "muon":
        yield iter([("--shard", replace(config, shard=True), machines)])
    fewer = [n for n in (8, 4, 2, 1) if n < config.replicate]
    yield ((f"--replicate {n}", replace(config, replicate=n), machines) for n in fewer)
    yield _smaller_packs(plan)
    yield ((f"--nodes {n * machines.nodes}", config, replace(machines, nodes=n * machines.nodes)) for n in (2, 4, 8))
    yield ((name, other, machines) for name, other in others.items())
    larger = sorted((card.memory, name) for name, card in CARDS.items() if card.memory > plan.card.memory)
    yield ((f"--card {name}", config, replace(machines, card=name)) for _, name in larger)


def _smaller_packs(plan: RankPlan) -> Iterator[Change]:
    """Yield packs that should fit: memory is all but linear in the size of a pack, and half of one shows the slope."""
    tokens, machines = plan.config.data.max_tokens, plan.machines
    half = plan_ranks(_with_pack(plan.config, tokens // 2), machines)
    slope = (plan.peak - half.peak) / (tokens - tokens // 2)
    most = int(tokens - (plan.peak + BUFFERS - plan.card.size) / slope) // PACK_STEP * PACK_STEP
    for size in range(most, max(most - 3 * PACK_STEP, 0), -PACK_STEP):
        smaller = _with_pack(plan.config, size)
        yield f"--data.max-tokens {size} --data.max-tiles {smaller.data.max_tiles}", smaller, machines


def _with_pack(config: RunConfig, tokens: int) -> RunConfig:
    """Return the run with packs of so many tokens, and tiles in proportion."""
    data = config.data
    return replace(config, data=replace(data, max_tokens=tokens, max_tiles=max(1, data.max_tiles * tokens // data.max_tokens)))
