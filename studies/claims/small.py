"""The small models that studies train: their data, their runs, and what is measured of them.

Every tenth picture of easy-vqa's training split is held out as validation data. Settings are chosen by these alone; the test
split is only ever measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from examples.quickstart.data import prepare, turns
from ivl.checkpoint import load_model, load_processor, load_tokenizer, save_model, save_processor
from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from ivl.evaluation.tasks import easy_vqa
from ivl.formats.rows import write_jsonl
from ivl.model.vlm import VLM
from ivl.processing.processor import Processor
from ivl.recipes import nano
from ivl.runs.build import build_model, build_processor
from ivl.runs.config import RunConfig
from ivl.runs.outcome import read_metrics
from ivl.runs.run import run
from ivl.train.config import ObjectiveConfig, OptimConfig, Stage, TrainablePart, TrainConfig
from ivl.train.objectives import forward_batch, next_token
from ivl.train.world import World
from studies.claims.study import PRECISION, Lab

VISION_WORDS = "ivl.recipes.nano_objectives:flipped_caption_words"
PACK_TOKENS = 3072
"""Tokens of a pack, unless a study says otherwise."""
VISION_STEPS = 1000
"""Steps of a ViT's warm-up: six passes over the captioned pictures."""
HELD_OUT = 10
"""One of so many training pictures is held out as validation data."""
EVERYTHING: tuple[TrainablePart, ...] = ("vision", "projector", "decoder")


def data(lab: Lab) -> Path:
    """Write the tokenizer and the rows of easy-vqa, a row a picture: train-, validation- and test-NAME.jsonl."""

    def make(folder: Path) -> None:
        prepare(folder)
        for name in ("questions", "captions", "language"):
            rows = read(folder / f"data/{name}.jsonl")
            write_jsonl([row for row in rows if int(row["id"]) % HELD_OUT], folder / f"train-{name}.jsonl")
            write_jsonl([row for row in rows if not int(row["id"]) % HELD_OUT], folder / f"validation-{name}.jsonl")
        talks: dict[str, list[Any]] = {}
        for row in easy_vqa.rows("test"):
            talks.setdefault(row.image, []).append(turns(f"<image>\n{row.question}", row.answer))
        rows = [{"id": Path(image).stem, "image": image, "conversations": asked} for image, asked in talks.items()]
        write_jsonl(rows, folder / "test-questions.jsonl")

    return lab.once("data", make)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def training(
    out: Path, rows: Path | Sequence[Path], trainable: tuple[TrainablePart, ...], *, model: Path | None = None,
    steps: int | None = None, optimizer: Literal["muon", "adamw"] = "muon", lr: float = 2e-3, seed: int = 0,
    objective: ObjectiveConfig | str = "", **data: Any,
) -> RunConfig:  # fmt: skip
    """A run of a study: a cosine after a short warm-up, in the precision of all studies.

    Args:
        out: its directory.
        rows: file of rows or of a mixture.
        trainable: parts that train.
        model: what it starts from; None needs `architecture` and `tokenizer`, which dataclasses.replace sets.
        steps: optimizer steps; None is one pass over the rows.
        optimizer: AdamW is the paper's; Muon needs fewer steps, and more time for the matrices of larger decoders.
        lr: peak learning rate.
        seed: of everything random.
        objective: import path, or settings; by default the next token's cross-entropy.
        data: further fields of DataConfig.
    """
    optim = OptimConfig(name=optimizer, lr=lr, warmup_ratio=0.1, min_lr_ratio=0.05)
    objective = ObjectiveConfig(path=objective) if isinstance(objective, str) and objective else objective or ObjectiveConfig()
    mixture = str(rows) if isinstance(rows, Path) else tuple(map(str, rows))
    return RunConfig(
        name=out.name, out_dir=str(out), model=str(model or ""), architecture=None if model else nano.architecture(),
        stage=Stage(trainable=trainable), objective=objective,
        data=DataConfig(
            mixture=mixture, epochs=None if steps else 1,
            **{"max_tokens": PACK_TOKENS, "max_tiles": 120, "num_workers": 0, "cache_samples": 1 << 14, **data},
        ),
        train=TrainConfig(
            optim=optim, num_steps=steps, seed=seed, precision=PRECISION, log_every=1 << 20, tensorboard=False
        ),
    )  # fmt: skip


def trained(config: RunConfig) -> Path:
    """Train and return the model; a finished run is not trained again."""
    model = Path(config.run_dir) / "model"
    return model if model.exists() else run(config, resume=True)


def nano_start(lab: Lab) -> dict[str, Path]:
    """Train nano by the stages of the quickstart, on pictures that are not held out; returns the models by stage."""

    def make(folder: Path) -> None:
        given = data(lab)
        model = trained(language(folder / "language", given, lab.few(300)))
        model = trained(vision(folder / "vision", given, model, lab.few(VISION_STEPS)))
        for number, (stage, (parts, steps)) in enumerate(STAGES.items()):
            lr = 1e-3 if parts == ("projector",) else 2e-3
            out, rows = folder / stage, given / "train-questions.jsonl"
            model = trained(training(out, rows, parts, model=model, steps=lab.few(steps), lr=lr, seed=number))

    folder = lab.once("nano", make)
    return {name: folder / name / "model" for name in ("language", "vision", *STAGES)}


STAGES: dict[str, tuple[tuple[TrainablePart, ...], int]] = {
    "stage1": (("projector",), 80), "stage1.5": (("vision", "projector"), 240), "stage2": (EVERYTHING, 360),
}  # fmt: skip
"""Stages of the recipe: what trains, and for how many steps of one pack."""


def language(out: Path, given: Path, steps: int, seed: int = 0, **decoder: int) -> RunConfig:
    """Warm-up of a decoder on text alone; `decoder` changes nano's numbers."""
    rows = given / "train-language.jsonl"
    base = training(out, rows, ("decoder",), steps=steps, seed=seed, max_tokens=PACK_TOKENS // 2)
    plain = nano.architecture()
    wide = replace(plain, decoder=replace(plain.decoder, **decoder))
    return replace(base, architecture=wide, tokenizer=str(given / "tokenizer"))


def vision(out: Path, given: Path, model: Path, steps: int, seed: int = 0) -> RunConfig:
    """Warm-up of a ViT: it learns to name what a picture shows."""
    rows = given / "train-captions.jsonl"
    return training(
        out, rows, ("vision", "projector"), model=model, steps=steps, seed=seed, objective=VISION_WORDS, max_tiles=25
    )


def untrained(out: Path, given: Path, seed: int) -> Path:
    """Write nano with random weights; its ViT is what a run without any warm-up starts from."""
    torch.manual_seed(seed)
    model = VLM(nano.architecture())
    model.init_weights()
    save_model(model, out)
    save_processor(Processor(model.config, load_tokenizer(given / "tokenizer")), out)
    return out


@torch.no_grad()
def exact(model: Path, rows: Path) -> dict[str, float]:
    """Share of replies that greedy decoding gives word for word, and the mean loss of a trained token.

    A reply is right if each of its tokens is the likeliest after those before it. One pass tells that for all of a pack.
    """
    net, processor = load_model(model, dtype=torch.float32).eval(), load_processor(model)
    config = DataConfig(mixture=str(rows), epochs=1, shuffle=False, num_workers=0, max_tokens=3072, max_tiles=120)
    hits, count, loss, tokens = 0, 0, 0.0, 0
    for batch in Loader(config, processor, seed=0):
        trained_T = batch.weights_T != 0
        logits_MV = net.head(forward_batch(net, batch)[trained_T])
        labels_M = batch.labels_T[trained_T]
        loss += float(torch.nn.functional.cross_entropy(logits_MV, labels_M, reduction="sum"))
        tokens += len(labels_M)
        right_T = torch.ones_like(trained_T)
        right_T[trained_T] = logits_MV.argmax(-1) == labels_M
        sequences = right_T.split(batch.layout.new_lens)
        hits, count = hits + sum(bool(each.all()) for each in sequences), count + len(sequences)
    return {"accuracy": hits / count, "loss": loss / tokens, "questions": count}


def flops_per_token(config: RunConfig) -> float:
    """Operations of a training step for each token of its first pack, images included, by torch's counter."""
    model = build_model(config, None, World())
    loader = Loader(replace(config.data, cache_samples=0), build_processor(config, model), seed=0)
    batch = next(iter(loader))
    with FlopCounterMode(display=False) as counter:
        next_token(model, batch).total.backward()
    return counter.get_total_flops() / len(batch.tokens_T)


def last_step(config: RunConfig) -> dict[str, float]:
    """The figures of a run's last step."""
    return [row for row in read_metrics(Path(config.run_dir)) if "evaluation" not in row][-1]


def or_else(pairs: Path, known: Iterable[dict[str, Any]]) -> None:
    """Put known pairs into a file of pairs that is empty: a model of a tiny size is never right, and makes none of its own."""
    if not pairs.exists() or not pairs.stat().st_size:
        write_jsonl(known, pairs)


def drop(folder: Path) -> None:
    """Delete what an arm trained, once it is measured."""
    shutil.rmtree(folder, ignore_errors=True)
