"""Small batches and configurations for the training tests."""

from __future__ import annotations

import torch

from ivl.data.config import DataConfig
from ivl.train.config import OptimConfig, Stage, TrainConfig
from ivl.types import IGNORE, Batch, Layout


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


def tiny_train(**changes) -> TrainConfig:
    base = dict(
        name="test", model="nowhere", stage=Stage(trainable=("vision", "projector", "decoder")), precision="fp32",
        optim=OptimConfig(lr=1e-3, warmup_steps=2), data=DataConfig(mixture="none", max_tokens=32), num_steps=4,
        tensorboard=False,
    )  # fmt: skip
    return TrainConfig(**{**base, **changes})
