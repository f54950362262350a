"""The demonstration: compose, stage 1 on captioned pictures, LoRA, and the right caption among 20 of pictures never seen."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import ivl
from examples.real_parts import parts, pictures
from ivl.checkpoint import load_model, load_processor
from ivl.checkpoint.compose import compose
from ivl.config import LoraConfig
from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.evaluation.scoring import wilson
from ivl.formats.rows import write_jsonl
from ivl.runs.config import RunConfig
from ivl.runs.run import run
from ivl.train.config import OptimConfig, Stage, TrainConfig
from ivl.train.losses import linear_cross_entropy
from ivl.train.objectives import forward_batch
from ivl.types import SamplingParams
from ivl.utils.files import write_json

CHOICES, SHOWN = 20, 12
SELECT_LAYER = -4
"""The ViT's fourth layer from its end: the last ones of a ViT that nobody taught to speak have outliers in a few patches."""


@dataclass(frozen=True)
class Size:
    """How long the demonstration is."""

    image_size: int = 224
    """Side of a tile: 224 px are 64 vision tokens."""
    stage1_epochs: int = 6
    lora_epochs: int = 4
    steps: int | None = None
    """Steps of each training instead of its epochs, for a trial."""
    test: int = 100
    """Held-out pictures that are asked about."""


def demonstrate(out: Path, folder: Path | None = None, size: Size | None = None) -> dict[str, Any]:
    """Do everything in a directory, and go on where an earlier call stopped; returns the figures.

    Args:
        out: where data, parts and models go.
        folder: captioned pictures; None takes the stamps of Tux Paint.
        size: how long it is.
    """
    size = size or Size()
    if not (out / "test.jsonl").exists():
        pictures.write_rows(out, folder)
    start = joined(out, size)
    stage1 = trained(stage1_run(out, start, size))
    model = trained(lora_run(out, stage1, size))
    test = rows(out / "test.jsonl")
    known = sorted({row["conversations"][1]["value"] for row in test})
    test = random.Random(1).sample(test, min(size.test, len(test)))
    arms = {"trained": (model, True), "stage1": (stage1, True), "untrained": (start, True), "blind": (model, False)}
    scores = {name: choices(each, test, known, out / f"choices-{name}.jsonl", sees=sees) for name, (each, sees) in arms.items()}
    found: dict[str, Any] = {name: retrieval(each) for name, each in scores.items()}
    gains = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(scores["trained"], scores["blind"], strict=True)]
    found["trained"]["by_gain"] = retrieval(gains)["accuracy"]
    found["written"] = captions(model, test[:SHOWN])
    write_json(out / "report.json", found)
    return found


def joined(out: Path, size: Size) -> Path:
    """Join DINOv2, a fresh projector and SmolLM2, as `ivl compose --vit DINOV2 --llm SMOLLM2.gguf OUT` does."""
    target = out / "joined"
    if not (target / "config.json").exists():
        vit = parts.dinov2(out / "dinov2", image_size=size.image_size)
        compose(vit, parts.smollm2(), None, target, dtype="float32")
    parts.settle(target, select_layer=SELECT_LAYER, max_dynamic_patch=1)
    return target


def stage1_run(out: Path, model: Path, size: Size) -> RunConfig:
    """Stage 1: the projector learns to speak to the language model."""
    return RunConfig(
        name="real-stage1", out_dir=str(out / "stage1"), model=str(model), stage=Stage(trainable=("projector",)),
        data=DataConfig(
            mixture=str(out / "train.jsonl"), epochs=None if size.steps else size.stage1_epochs, max_tokens=1536,
            max_tiles_per_image=1, num_workers=0,
        ),
        train=TrainConfig(
            optim=OptimConfig(lr=1e-3, warmup_ratio=0.03), num_steps=size.steps, precision="fp32", log_every=10,
            tensorboard=False, save_every=50,
        ),
    )  # fmt: skip


def lora_run(out: Path, model: Path, size: Size) -> RunConfig:
    """Then the projector goes on, and adapters of the language model learn with it."""
    base = stage1_run(out, model, size)
    data = replace(base.data, epochs=None if size.steps else size.lora_epochs)
    train = replace(base.train, optim=OptimConfig(lr=3e-4, warmup_ratio=0.03))
    return replace(base, name="real-lora", out_dir=str(out / "lora"), lora=LoraConfig(), data=data, train=train)


def trained(config: RunConfig) -> Path:
    model = Path(config.run_dir) / "model"
    return model if model.exists() else run(config, resume=True)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def choices(model: Path, test: list[dict[str, Any]], known: list[str], path: Path, *, sees: bool) -> list[list[float]]:
    """Log-likelihoods of 20 captions of every held-out picture, the right one first.

    Args:
        model: directory of the model.
        test: rows of held-out pictures.
        known: captions to choose from, all of them held out.
        path: where the choices are written as rows: a picture with 20 conversations.
        sees: whether the model sees the picture; a blind one has the captions alone.
    """
    rng, asked = random.Random(2), []
    for row in test:
        question, right = row["conversations"]
        others = rng.sample([caption for caption in known if caption != right["value"]], CHOICES - 1)
        question = question if sees else question | {"value": question["value"].replace("<image>\n", "")}
        talks = [[question, right | {"value": caption}] for caption in (right["value"], *others)]
        asked.append({**({"image": row["image"]} if sees else {}), "id": row["id"], "conversations": talks})
    return log_likelihoods(model, write_jsonl(asked, path))


def retrieval(scores: list[list[float]]) -> dict[str, Any]:
    """How often the first of the scores is the highest."""
    hits = sum(max(range(len(some)), key=some.__getitem__) == 0 for some in scores)
    return {"accuracy": hits / len(scores), "ci95": wilson(hits, len(scores)), "pictures": len(scores)}


@torch.no_grad()
def log_likelihoods(model: Path, path: Path) -> list[list[float]]:
    """Of every row, the log-likelihood of the reply of each conversation."""
    net, processor = load_model(model, dtype=torch.float32).eval(), load_processor(model)
    data = DataConfig(mixture=str(path), epochs=1, shuffle=False, num_workers=0, max_samples=1, max_tiles_per_image=1)
    found = []
    for batch in Loader(data, processor, seed=0):
        hidden_TD, trained_T = forward_batch(net, batch), batch.weights_T != 0
        losses_T = torch.zeros(len(trained_T))
        weights = torch.ones(int(trained_T.sum()))
        losses_T[trained_T] = linear_cross_entropy(
            hidden_TD[trained_T], net.decoder.head.matrix(), batch.labels_T[trained_T], weights
        ).ce_M  # fmt: skip
        found.append([-float(each.sum()) for each in losses_T.split(batch.layout.new_lens)])
    return found


def captions(model: Path, test: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What the model writes about pictures, unedited."""
    question = pictures.QUESTION.removeprefix("<image>\n")
    replies = ivl.load(model).generate(
        [ivl.ask(question, row["image"]) for row in test], SamplingParams(max_new_tokens=48), progress=False
    )
    return [
        {"picture": row["image"], "caption": row["conversations"][1]["value"], "said": reply.text.strip()}
        for row, reply in zip(test, replies, strict=True)
    ]
