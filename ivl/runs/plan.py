"""The plan of a run, for `ivl train RECIPE --dry-run`. The model is built on the meta device, so any size costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ivl.data.config import DataConfig
from ivl.model.vlm import VLM
from ivl.runs.build import adapt, read_architecture
from ivl.runs.config import RunConfig
from ivl.train.config import PARTS, OptimConfig, TrainConfig
from ivl.train.losses import MAX_LOGITS
from ivl.train.optim import is_hidden_matrix
from ivl.train.stage import trainable


@dataclass(frozen=True)
class RunPlan:
    """Parameters by part as (trained, frozen), the length of the run, and memory in bytes of one rank without sharding."""

    parameters: dict[str, tuple[int, int]]
    num_steps: int | None
    tokens_per_step: int
    tiles_per_step: int
    memory: dict[str, int]

    def describe(self, config: RunConfig) -> str:
        """Format the plan as a page of text."""
        rows = [f"{config.name}: {config.run_dir}", f"start      {config.model or 'random weights'}", ""]
        rows.append(f"{'part':11}{'trained':>18}{'frozen':>18}")
        total = (sum(t for t, _ in self.parameters.values()), sum(f for _, f in self.parameters.values()))
        rows += [f"{part:11}{t:18,}{f:18,}" for part, (t, f) in {**self.parameters, "all": total}.items()]
        train, optim = config.train, config.train.optim
        steps = f"{self.num_steps:,}" if self.num_steps else f"until {config.data.epochs} epoch(s) end"
        rows += [
            "",
            f"steps      {steps}, {train.packs_per_step:,} packs each",
            f"step       at most {self.tokens_per_step:,} tokens and {self.tiles_per_step:,} tiles",
            f"optimizer  {optim.name}, lr {optim.lr:g}, weight decay {optim.weight_decay:g}, "
            f"{optim.schedule} with warm-up {optim.warmup_steps or f'{optim.warmup_ratio:.0%}'}",
            f"precision  {train.precision}{', activations recomputed' if train.checkpointing else ''}",
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
    train, trained = config.train, trainable(model)
    size = 2 if train.precision == "pure_bf16" else 4
    num_parameters = sum(p.numel() for p in model.parameters())
    return RunPlan(
        parameters=count_by_part(model),
        num_steps=train.num_steps,
        tokens_per_step=train.packs_per_step * config.data.max_tokens,
        tiles_per_step=train.packs_per_step * config.data.max_tiles,
        memory={
            "parameters": num_parameters * size,
            "copies": 2 * (num_parameters - model.decoder.embeddings.weight.numel()) if train.precision == "bf16" else 0,
            "reference": num_parameters * (4 if train.precision == "fp32" else 2) if config.objective.has_reference_copy else 0,
            "gradients": sum(p.numel() for p in trained.values()) * size,
            "optimizer": sum(p.numel() * size * _moments(train.optim, name, p) for name, p in trained.items()),
            "activations": _activations(model, train, config.data),
            "logits": MAX_LOGITS * 4,
        },
    )


def count_by_part(model: VLM) -> dict[str, tuple[int, int]]:
    """Count parameters: part -> (trained, frozen)."""
    counts: dict[str, tuple[int, int]] = {}
    for part in PARTS:
        parameters = list(model.get_submodule(part).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        counts[part] = (trained, sum(p.numel() for p in parameters) - trained)
    return counts


def _moments(optim: OptimConfig, name: str, parameter: torch.nn.Parameter) -> int:
    return 1 if optim.name == "muon" and is_hidden_matrix(name, parameter) else 2


def _activations(model: VLM, train: TrainConfig, data: DataConfig) -> int:
    """Estimate the bytes kept for the backward pass of a full pack: with recomputation every layer's input and one inside."""
    size = 4 if train.precision == "fp32" else 2
    c, tokens, total = model.config, data.max_tokens, 0
    d, v = c.decoder, c.vision
    positions = data.max_tiles * (v.grid**2 + 1)
    inside_decoder = tokens * (6 * d.width + 2 * (d.num_heads + d.num_kv_heads) * d.head_dim + 4 * d.mlp_width)
    inside_vision = positions * (9 * v.width + 2 * v.mlp_width)
    stacks = [(d.num_layers, tokens * d.width, inside_decoder)]
    if any(p.requires_grad for p in model.vision.parameters()):
        stacks.append((v.num_layers, positions * v.width, inside_vision))
    else:
        total += positions * v.mlp_width
    for layers, entry, inside in stacks:
        total += layers * entry + inside if train.checkpointing else layers * inside
    return total * size
