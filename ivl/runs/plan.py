"""What a run would do: `ivl train RECIPE --dry-run`. Builds the model on the meta device, so any size costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ivl.model.vlm import VLM
from ivl.runs.build import adapt, read_architecture
from ivl.runs.config import RunConfig
from ivl.train.losses import MAX_LOGITS
from ivl.train.optim import is_hidden_matrix
from ivl.train.stage import count_by_part, trainable


@dataclass(frozen=True)
class RunPlan:
    """Parameters by part as (trained, frozen), the length of the run, and memory in bytes of one rank without sharding."""

    parameters: dict[str, tuple[int, int]]
    num_steps: int | None
    tokens_per_step: int
    tiles_per_step: int
    memory: dict[str, int]

    def describe(self, config: RunConfig) -> str:
        """The plan as a page of text."""
        rows = [f"{config.name}: {config.run_dir}", f"start      {config.model or 'random weights'}", ""]
        rows.append(f"{'part':11}{'trained':>18}{'frozen':>18}")
        total = (sum(t for t, _ in self.parameters.values()), sum(f for _, f in self.parameters.values()))
        rows += [f"{part:11}{t:18,}{f:18,}" for part, (t, f) in {**self.parameters, "all": total}.items()]
        steps = f"{self.num_steps:,}" if self.num_steps else f"until {config.data.epochs} epoch(s) end"
        rows += [
            "",
            f"steps      {steps}, {config.train.packs_per_step:,} packs each",
            f"step       at most {self.tokens_per_step:,} tokens and {self.tiles_per_step:,} tiles",
            f"optimizer  {config.train.optim.name}, lr {config.train.optim.lr:g}, weight decay {config.train.optim.weight_decay:g}, "
            f"{config.train.optim.schedule} with warm-up {config.train.optim.warmup_steps or f'{config.train.optim.warmup_ratio:.0%}'}",
            f"precision  {config.train.precision}{', activations recomputed' if config.train.checkpointing else ''}",
            "",
            "memory of one rank (estimate" + (", before sharding over ranks)" if config.shard else ")"),
        ]
        rows += [f"  {name:14}{size / 2**30:10.2f} GiB" for name, size in self.memory.items() if size]
        return "\n".join([*rows, f"  {'sum':14}{sum(self.memory.values()) / 2**30:10.2f} GiB"])


def make_plan(config: RunConfig) -> RunPlan:
    """Count parameters and estimate memory from shapes alone.

    Raises:
        InputError: if the model's configuration cannot be read, or the stage does not fit it.
    """
    architecture = config.architecture or read_architecture(config)
    with torch.device("meta"):
        model = VLM(architecture)
        adapt(model, config)
    trained = trainable(model)
    return RunPlan(
        parameters=count_by_part(model),
        num_steps=config.train.num_steps,
        tokens_per_step=config.train.packs_per_step * config.data.max_tokens,
        tiles_per_step=config.train.packs_per_step * config.data.max_tiles,
        memory={
            "parameters": sum(p.numel() for p in model.parameters()) * _bytes(config),
            "reference": sum(p.numel() for p in model.parameters()) * _bytes(config) if config.objective.has_reference_copy else 0,
            "gradients": sum(p.numel() for p in trained.values()) * _bytes(config),
            "optimizer": sum(p.numel() * _bytes(config) * _moments(config, n, p) for n, p in trained.items()),
            "activations": _activations(model, config),
            "logits": MAX_LOGITS * 4,
        },
    )


def _bytes(config: RunConfig) -> int:
    return 2 if config.train.precision == "pure_bf16" else 4


def _moments(config: RunConfig, name: str, parameter: torch.nn.Parameter) -> int:
    return 1 if config.train.optim.name == "muon" and is_hidden_matrix(name, parameter) else 2


def _activations(model: VLM, config: RunConfig) -> int:
    """Values kept for the backward pass of a full pack: with recomputation the input of every layer and the inside of one."""
    size = 4 if config.train.precision == "fp32" else 2
    c, tokens, total = model.config, config.data.max_tokens, 0
    d, v = c.decoder, c.vision
    positions = config.data.max_tiles * (v.grid**2 + 1)
    inside_decoder = tokens * (6 * d.width + 2 * (d.num_heads + d.num_kv_heads) * d.head_dim + 4 * d.mlp_width)
    inside_vision = positions * (9 * v.width + 2 * v.mlp_width)
    vision_trains = any(p.requires_grad for p in model.vision.parameters())
    stacks = [(d.num_layers, tokens * d.width, inside_decoder)]
    if vision_trains:
        stacks.append((v.num_layers, positions * v.width, inside_vision))
    else:
        total += positions * v.mlp_width
    for layers, entry, inside in stacks:
        total += layers * entry + inside if config.train.checkpointing else layers * inside
    return total * size
