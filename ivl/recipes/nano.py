"""nano: an InternVL2.5 of 1.7 M parameters that learns easy-vqa from nothing on two CPU cores.

The recipe's own order in small: language alone, vision alone, then language meets vision in stages 1, 1.5 and 2.
`make quickstart` writes the data under runs/quickstart/data and runs the five stages one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ivl.config import SPECIAL_TOKENS, DecoderConfig, ModelConfig, TilingConfig, VisionConfig
from ivl.data.config import DataConfig
from ivl.preference.config import PreferenceConfig
from ivl.runs.config import RunConfig
from ivl.train.config import ObjectiveConfig, OptimConfig, Stage, TrainConfig

RUN = "runs/quickstart"
VOCAB_SIZE = 382
"""Of the tokenizer trained on the questions: bytes, pieces up to every whole word, control tokens and SPECIAL_TOKENS. An
answer must be one token: two words that share a piece blur what the warm-up of the ViT is asked for."""

RANKS = 2
"""Processes that the quickstart trains in. Every step is RANKS packs, one a rank; one process takes them in turn."""


BETA = 2.0
"""Of the preference losses. They sum log-probabilities over a reply, and replies here have 20 tokens: at the published 0.1 they
never saturate, and go on pushing rejected replies down until others than the chosen rise."""


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


def language() -> RunConfig:
    """Warm-up 1: the decoder learns to answer from descriptions in words; no pictures."""
    return RunConfig(
        name="nano-language",
        out_dir=f"{RUN}/1-language",
        architecture=architecture(),
        tokenizer=f"{RUN}/tokenizer",
        stage=Stage(trainable=("decoder",)),
        data=_data("language", epochs=1, max_tokens=1536),
        train=TrainConfig(
            optim=OptimConfig(name="muon", lr=2e-3, warmup_ratio=0.1, min_lr_ratio=0.05), packs_per_step=RANKS, log_every=20
        ),
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
        train=TrainConfig(
            optim=OptimConfig(name="muon", lr=2e-3, warmup_ratio=0.05, min_lr_ratio=0.05), packs_per_step=RANKS, log_every=70
        ),
    )


def stage1() -> RunConfig:
    """Stage 1: the projector learns to speak to the decoder."""
    return RunConfig(
        name="nano-stage1",
        out_dir=f"{RUN}/3-stage1",
        model=f"{RUN}/2-vision/model",
        stage=Stage(trainable=("projector",)),
        data=_data("questions", max_tokens=3072),
        train=TrainConfig(
            optim=OptimConfig(name="muon", lr=1e-3, warmup_ratio=0.05, min_lr_ratio=0.05),
            num_steps=80,
            packs_per_step=RANKS,
            log_every=50,
        ),
    )


def stage15() -> RunConfig:
    """Stage 1.5: the ViT learns too, from what the decoder asks of it."""
    base = stage1()
    return replace(
        base,
        name="nano-stage1.5",
        out_dir=f"{RUN}/4-stage1.5",
        model=f"{RUN}/3-stage1/model",
        stage=Stage(trainable=("vision", "projector")),
        train=replace(base.train, num_steps=240),
    )


def stage2() -> RunConfig:
    """Stage 2: everything learns."""
    base = stage1()
    return replace(
        base,
        name="nano-stage2",
        out_dir=f"{RUN}/5-stage2",
        model=f"{RUN}/4-stage1.5/model",
        stage=Stage(trainable=("vision", "projector", "decoder")),
        train=replace(base.train, num_steps=360),
    )


def reason() -> RunConfig:
    """Supervised: questions about several pictures, with short written reasoning before the answer."""
    base = stage2()
    optim = OptimConfig(name="muon", lr=2e-3, warmup_ratio=0.05, min_lr_ratio=0.05)
    return replace(
        base,
        name="nano-reason",
        out_dir=f"{RUN}/6-reason",
        model=f"{RUN}/5-stage2/model",
        data=_data("reasoning", max_tokens=3072, max_tiles=120),
        train=replace(base.train, optim=optim, num_steps=300),
    )


def mpo() -> RunConfig:
    """Mixed Preference Optimization on pairs of the model's own replies."""
    base = reason()
    return replace(
        base,
        name="nano-mpo",
        out_dir=f"{RUN}/7-mpo",
        model=f"{RUN}/6-reason/model",
        objective=PreferenceConfig(beta=BETA),
        data=replace(base.data, mixture=f"{RUN}/pairs/pairs.jsonl"),
        train=replace(base.train, optim=replace(base.train.optim, lr=5e-5), num_steps=50),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "nano-language": language,
    "nano-vision": vision,
    "nano-stage1": stage1,
    "nano-stage1.5": stage15,
    "nano-stage2": stage2,
    "nano-reason": reason,
    "nano-mpo": mpo,
}
