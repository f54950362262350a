"""Files of preference pairs, and models to ask about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.formats.rows import write_jsonl
from ivl.model.vlm import VLM
from ivl.types import Batch
from tests.helpers.mixtures import picture, processor


def make_pairs(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Pairs of replies of several lengths; every third is about text only."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        row = {
            "id": f"p{n}",
            "question": "what is this",
            "chosen": "a red circle " * int(rng.integers(1, 6)),
            "rejected": "on white " * int(rng.integers(1, 6)),
        }
        if n % 3 < 2:
            width, height = rng.integers(20, 90, size=2).tolist()
            picture(folder / f"{n}.png", width, height, seed=n)
            row["image"] = f"{n}.png"
        rows.append(row)
    return write_jsonl(rows, folder / "pairs.jsonl")


def pair_data(path: Path, **changes) -> DataConfig:
    options = {"max_tokens": 300, "max_tiles": 30, "averaging": "token", "num_workers": 0, "epochs": 1, "shuffle": False}
    return DataConfig(mixture=str(path), **{**options, **changes})


def pair_batches(path: Path, **changes) -> list[Batch]:
    return list(Loader(pair_data(path, **changes), processor(), seed=0))


def new_model(seed: int = 0) -> VLM:
    torch.manual_seed(seed)
    model = VLM(processor().config)
    model.init_weights()
    return model
