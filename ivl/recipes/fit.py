"""Rows that fit the memory at hand, for `ivl train finetune|lora|mpo`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from ivl.checkpoint.releases import count_parameters
from ivl.config import ModelConfig
from ivl.parallel.cards import GIB, Machines
from ivl.runs.build import read_architecture, with_precision
from ivl.runs.config import RunConfig
from ivl.runs.plan import plan_ranks
from ivl.utils.machine import free_memory

BESIDE = 1.5 * GIB
"""Memory of a process that no plan counts: libraries, allocators, rows that wait."""
LEAST_TOKENS = 512
"""Rows are not made shorter than this."""


def memory_at_hand() -> tuple[float, str]:
    """Return the bytes that this process may take, and where: of its card, or its share of the machine."""
    if torch.cuda.is_available():
        return float(free_memory("cuda")), "the card"
    return free_memory("cpu") / int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "this machine"


def fit(config: RunConfig, *, keep: bool = False) -> tuple[RunConfig, str]:
    """Return the run with rows that fit the memory at hand, the longest that do, and say what was found.

    keep: change no row, and say only whether they fit.
    """
    room, place = memory_at_hand()
    room -= BESIDE
    architecture = read_architecture(config)
    rows = f"{'pairs' if config.objective.pairs else 'rows'} of at most {config.data.max_tokens:,} tokens"
    if _most(config, architecture) < room:  # no need to plan
        return config, f"{rows} fit the {_gib(room)} GiB of {place}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machines = Machines(gpus=int(os.environ.get("WORLD_SIZE", "1")))
    needed = []
    for smaller in [config] if keep else _smaller(config, architecture):
        needed.append(plan_ranks(with_precision(smaller, device), machines).peak)
        if needed[-1] <= room:
            data = smaller.data
            if len(needed) == 1:
                return smaller, f"{rows} take {_gib(needed[0])} of the {_gib(room)} GiB of {place}"
            return smaller, (
                f"rows of at most {data.max_tokens:,} tokens and pictures of {data.max_tiles_per_image} tiles take "
                f"{_gib(needed[-1])} of the {_gib(room)} GiB of {place} (published: {_gib(needed[0])}); "
                f"{'longer pairs are left out' if config.objective.pairs else 'longer rows lose turns'}"
            )
    return config, (
        f"DOES NOT FIT: {_gib(needed[-1])} GiB for {rows if keep else 'the shortest rows'}, {place} has {_gib(room)}; "
        f"{'a smaller --data.max-tokens, ' if keep else ''}`ivl train lora`, several cards with --shard, or a smaller model "
        "take less (`ivl plan`)"
    )


def _smaller(config: RunConfig, architecture: ModelConfig) -> Iterator[RunConfig]:
    """Yield the run, then with rows of half the tokens and with as many tiles as those hold, and so on."""
    data, sequences = config.data, 2 if config.objective.pairs else 1
    yield config
    while data.max_tokens >= 2 * sequences * LEAST_TOKENS:
        tokens = data.max_tokens // 2
        tiles = max(1, tokens // sequences // architecture.tokens_per_tile)
        of_picture = min(data.max_tiles_per_image or architecture.tiling.max_tiles, max(1, tiles - 1))
        data = replace(data, max_tokens=tokens, max_tiles=min(data.max_tiles, tiles + 1), max_tiles_per_image=of_picture)
        yield replace(config, data=data)


def _most(config: RunConfig, architecture: ModelConfig) -> float:
    """A bound that is quick to compute, and far above what a plan says: float32 everywhere, nothing recomputed."""
    d, v = architecture.decoder, architecture.vision
    tokens, positions = config.data.max_tokens, config.data.max_tiles * (v.grid**2 + 1)
    inside = tokens * d.num_layers * (12 * d.width + 4 * d.mlp_width)
    inside += positions * v.num_layers * (12 * v.width + 4 * v.mlp_width)
    return 24.0 * count_parameters(architecture)["all"] + 4.0 * inside


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"
