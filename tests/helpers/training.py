"""Small batches and configurations for the training tests."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ivl.config import LoraConfig
from ivl.lora.layers import add_lora, lora_parameters
from ivl.model.vlm import VLM
from ivl.runs.config import RunConfig
from ivl.train.config import OptimConfig, Stage, TrainConfig
from ivl.train.loop import Evaluator
from ivl.train.stage import apply_stage
from ivl.types import IGNORE, Batch, Layout
from tests.conftest import tiny_config


def tiny_batch(seed: int = 0, *, lens: tuple[int, ...] = (9, 12, 5), tiles: int = 2, averaging: str = "square") -> Batch:
    """Sequences of random tokens for tests.conftest.tiny_config; the first `tiles` begin with an image."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels, weights = [], [], []
    for s, length in enumerate(lens):
        ids = torch.randint(0, 90, (length,), generator=g)
        if s < tiles:
            ids[:4] = 90
        label = torch.cat([ids[1:], torch.tensor([IGNORE])])
        label[: length // 2] = IGNORE
        trained = int((label != IGNORE).sum())
        weight = {"token": 1.0, "sample": 1 / trained, "square": trained**-0.5}[averaging]
        tokens.append(ids), labels.append(label), weights.append((label != IGNORE).float() * weight)
    pixels = torch.randint(0, 256, (tiles, 28, 28, 3), generator=g, dtype=torch.uint8)
    names = tuple(f"{seed}-{s}" for s in range(len(lens)))
    datasets = tuple("ab"[s % 2] for s in range(len(lens)))
    return Batch(
        torch.cat(tokens), torch.cat(labels), torch.cat(weights), pixels, torch.arange(tiles), Layout.packed(lens),
        names, tuple(f"rows.jsonl:{seed * 10 + s}" for s in range(len(lens))), datasets, lens,
    )  # fmt: skip


def tiny_train(**changes: Any) -> TrainConfig:
    """A few steps of a tiny model."""
    base = {
        "precision": "fp32", "optim": OptimConfig(lr=1e-3, warmup_steps=2), "num_steps": 4, "tensorboard": False,
    }  # fmt: skip
    return TrainConfig(**{**base, **changes})


EVERYTHING = Stage(trainable=("vision", "projector", "decoder"))


def staged(
    stage: Stage = EVERYTHING, *, lora: LoraConfig | None = None, checkpointing: bool = False, seed: int | None = None
) -> VLM:
    """A tiny model with random weights, its adapters and the parameters marked that train."""
    if seed is not None:
        torch.manual_seed(seed)
    model = VLM(tiny_config())
    model.init_weights()
    if lora is not None:
        add_lora(model, lora)
    apply_stage(model, stage, adapters=lora_parameters(model), checkpointing=checkpointing)
    return model


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with other values; those of TrainConfig are named like the others."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    train = {name: value for name, value in changes.items() if name in names}
    rest = {name: value for name, value in changes.items() if name not in names}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train), **rest)


def run_config(**options: Any) -> RunConfig:
    """A run's configuration; options of TrainConfig are named like the others."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    train = TrainConfig(**{name: value for name, value in options.items() if name in names})
    return RunConfig(train=train, **{name: value for name, value in options.items() if name not in names})


@dataclass
class BatchList:
    """Batches in memory as a BatchSource; `epochs` None repeats them without end."""

    batches: list[Batch]
    epochs: int | None = None
    rank: int = 0
    world_size: int = 1
    next: int = 0

    def __iter__(self) -> Iterator[Batch]:
        while self.epochs is None or self.next * self.world_size + self.rank < self.epochs * len(self.batches):
            at = (self.next * self.world_size + self.rank) % len(self.batches)
            self.next += 1
            yield self.batches[at]

    def state(self) -> dict[str, Any]:
        return {"next": self.next}

    def restore(self, state: list[dict[str, Any]]) -> None:
        # Ranks take turns, so together they have taken the first so many; the next turn may begin with any of the new ranks.
        self.next, more = divmod(sum(each["next"] for each in state), self.world_size)
        self.next += self.rank < more


def wait_for(path: Path) -> None:
    """Wait for at most a minute until something is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def crash_at(step: int, run_dir: str, *, saved: int) -> Callable[[Any], tuple[Evaluator, ...]]:
    """Return evaluators that end the process without a word after a step, once the checkpoint before it is on disk.

    A sharded run writes its checkpoints while it trains: without the wait, the crash would end the save, too.
    """

    def crash(model: VLM) -> dict[str, float]:
        wait_for(Path(run_dir) / f"checkpoint-{saved}")
        os._exit(3)

    return lambda _: (Evaluator("crash", step, crash),)
