"""nano: an InternVL2.5 of 1.7 M parameters that learns easy-vqa from nothing on two CPU cores.

The recipe's own order in small: language alone, vision alone, then language meets vision in stages 1, 1.5 and 2.
`make quickstart` writes the data under runs/quickstart/data and runs the five stages one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivl.config import SPECIAL_TOKENS, DecoderConfig, ModelConfig, TilingConfig, VisionConfig
from ivl.data.config import DataConfig
from ivl.preference.config import PreferenceConfig
from ivl.runs.config import RunConfig
from ivl.train.config import ObjectiveConfig, OptimConfig, Stage, TrainConfig

RUN = "runs/quickstart"
VOCAB_SIZE = 382
"""Size of the tokenizer that is trained on the questions: bytes, pieces up to every whole word, control tokens and
SPECIAL_TOKENS. Each answer is one token: two words that share a piece would blur the labels of the ViT's warm-up."""
RANKS = 2
"""Processes that the quickstart trains in. A step has RANKS packs, one a rank; a single process takes them in turn."""
BETA = 2.0
"""Scale of the rewards in preference training. The losses sum log-probabilities over a reply, and replies here have 20 tokens:
at the published 0.1 the losses never saturate, and push rejected replies down until replies other than the chosen rise."""


def architecture() -> ModelConfig:
    """A small InternViT and a small decoder: the classes and the structure of the published models."""
    first_special = VOCAB_SIZE - len(SPECIAL_TOKENS)
    return ModelConfig(
        vision=VisionConfig(
            width=128, num_layers=4, mlp_width=512, num_heads=4, patch_size=8, image_size=64, layer_scale_init=1.0
        ),
        decoder=DecoderConfig(
            vocab_size=VOCAB_SIZE, width=128, num_layers=4, mlp_width=384, num_heads=4, num_kv_heads=2, head_dim=32,
            rope_theta=1e4, qkv_bias=True, max_positions=4096,
        ),
        tiling=TilingConfig(tile_size=64, max_tiles=6),
        image_token_id=first_special + SPECIAL_TOKENS.index("<IMG_CONTEXT>"),
        eos_token_ids=(first_special - 1,),
        pad_token_id=first_special - 3,
        system_message="",
    )  # fmt: skip


def _data(name: str, **options: int) -> DataConfig:
    return DataConfig(mixture=f"{RUN}/data/{name}.jsonl", num_workers=0, cache_samples=8192, **options)  # type: ignore[arg-type]


def _muon(lr: float, warmup_ratio: float = 0.05) -> OptimConfig:
    return OptimConfig(name="muon", lr=lr, warmup_ratio=warmup_ratio, min_lr_ratio=0.05)


def _after(base: RunConfig, name: str, *, optim: OptimConfig | None = None, num_steps: int, **changes: Any) -> RunConfig:
    """The run that goes on from the final model of another, on the same data unless they are changed."""
    number = int(Path(base.run_dir).name.split("-")[0]) + 1
    train = replace(base.train, optim=optim or base.train.optim, num_steps=num_steps)
    out_dir = f"{RUN}/{number}-{name}"
    return replace(base, name=f"nano-{name}", out_dir=out_dir, model=f"{base.run_dir}/model", train=train, **changes)


def language() -> RunConfig:
    """Warm-up 1: the decoder learns to answer from descriptions in words; no pictures."""
    return RunConfig(
        name="nano-language",
        out_dir=f"{RUN}/1-language",
        architecture=architecture(),
        tokenizer=f"{RUN}/tokenizer",
        stage=Stage(trainable=("decoder",)),
        data=_data("language", epochs=1, max_tokens=1536),
        train=TrainConfig(optim=_muon(2e-3, warmup_ratio=0.1), packs_per_step=RANKS, precision="auto", log_every=20),
    )


def vision() -> RunConfig:
    """Warm-up 2: ViT and projector learn to name what a picture shows."""
    return RunConfig(
        name="nano-vision",
        out_dir=f"{RUN}/2-vision",
        model=f"{RUN}/1-language/model",
        stage=Stage(trainable=("vision", "projector")),
        objective=ObjectiveConfig(path="ivl.recipes.nano_objectives:flipped_caption_words"),
        data=_data("captions", epochs=12, max_tiles=25),
        train=TrainConfig(optim=_muon(2e-3), packs_per_step=RANKS, precision="auto", log_every=70),
    )


def stage1() -> RunConfig:
    """Stage 1: the projector learns to speak to the decoder."""
    return RunConfig(
        name="nano-stage1",
        out_dir=f"{RUN}/3-stage1",
        model=f"{RUN}/2-vision/model",
        stage=Stage(trainable=("projector",)),
        data=_data("questions", max_tokens=3072),
        train=TrainConfig(optim=_muon(1e-3), num_steps=80, packs_per_step=RANKS, precision="auto", log_every=50),
    )


def stage15() -> RunConfig:
    """Stage 1.5: the ViT learns too, from what the decoder asks of it."""
    return _after(stage1(), "stage1.5", num_steps=240, stage=Stage(trainable=("vision", "projector")))


def stage2() -> RunConfig:
    """Stage 2: everything learns."""
    return _after(stage15(), "stage2", num_steps=360, stage=Stage(trainable=("vision", "projector", "decoder")))


def reason() -> RunConfig:
    """Supervised: questions about several pictures, with short written reasoning before the answer."""
    data = _data("reasoning", max_tokens=3072, max_tiles=120)
    return _after(stage2(), "reason", num_steps=300, optim=_muon(2e-3), data=data)


def mpo() -> RunConfig:
    """Mixed Preference Optimization on pairs of the model's own replies."""
    base = reason()
    data = replace(base.data, mixture=f"{RUN}/pairs/pairs.jsonl", on_error="skip")
    return _after(base, "mpo", num_steps=50, optim=_muon(5e-5), data=data, objective=PreferenceConfig(beta=BETA))


STAGES: tuple[Callable[[], RunConfig], ...] = (language, vision, stage1, stage15, stage2, reason, mpo)
RECIPES = {stage().name: stage for stage in STAGES}
