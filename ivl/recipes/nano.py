"""nano: an InternVL2.5 of 1.7 M parameters that learns easy-vqa from nothing on two CPU cores.

The recipe's own order in small: language alone, vision alone, then language meets vision in stages 1, 1.5 and 2.
`make quickstart` writes the data under runs/quickstart/data and runs the five stages one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ivl.config import SPECIAL_TOKENS, DecoderConfig, ModelConfig, TilingConfig, VisionConfig
from ivl.data.config import DataConfig
from ivl.train.config import OptimConfig, PreferenceConfig, Stage, TrainConfig

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


def language() -> TrainConfig:
    """Warm-up 1: the decoder learns to answer from descriptions in words; no pictures."""
    return TrainConfig(
        name="nano-language",
        out_dir=f"{RUN}/1-language",
        architecture=architecture(),
        tokenizer=f"{RUN}/tokenizer",
        stage=Stage(trainable=("decoder",)),
        optim=OptimConfig(name="muon", lr=2e-3, warmup_ratio=0.1, min_lr_ratio=0.05),
        data=_data("language", epochs=1, max_tokens=1536),
        packs_per_step=RANKS,
        log_every=20,
    )


def vision() -> TrainConfig:
    """Warm-up 2: ViT and projector learn to name what a picture shows."""
    return TrainConfig(
        name="nano-vision",
        out_dir=f"{RUN}/2-vision",
        model=f"{RUN}/1-language/model",
        stage=Stage(trainable=("vision", "projector")),
        objective="caption_words",
        flip_tiles=True,
        optim=OptimConfig(name="muon", lr=2e-3, warmup_ratio=0.05, min_lr_ratio=0.05),
        data=_data("captions", epochs=12, max_tiles=25),
        packs_per_step=RANKS,
        log_every=70,
    )


def stage1() -> TrainConfig:
    """Stage 1: the projector learns to speak to the decoder."""
    return TrainConfig(
        name="nano-stage1",
        out_dir=f"{RUN}/3-stage1",
        model=f"{RUN}/2-vision/model",
        stage=Stage(trainable=("projector",)),
        optim=OptimConfig(name="muon", lr=1e-3, warmup_ratio=0.05, min_lr_ratio=0.05),
        data=_data("questions", max_tokens=3072),
        num_steps=80,
        packs_per_step=RANKS,
        log_every=50,
    )


def stage15() -> TrainConfig:
    """Stage 1.5: the ViT learns too, from what the decoder asks of it."""
    return replace(
        stage1(),
        name="nano-stage1.5",
        out_dir=f"{RUN}/4-stage1.5",
        model=f"{RUN}/3-stage1/model",
        stage=Stage(trainable=("vision", "projector")),
        num_steps=240,
    )


def stage2() -> TrainConfig:
    """Stage 2: everything learns."""
    return replace(
        stage1(),
        name="nano-stage2",
        out_dir=f"{RUN}/5-stage2",
        model=f"{RUN}/4-stage1.5/model",
        stage=Stage(trainable=("vision", "projector", "decoder")),
        num_steps=360,
    )


def reason() -> TrainConfig:
    """Supervised: questions about several pictures, with short written reasoning before the answer."""
    return replace(
        stage2(),
        name="nano-reason",
        out_dir=f"{RUN}/6-reason",
        model=f"{RUN}/5-stage2/model",
        optim=OptimConfig(name="muon", lr=2e-3, warmup_ratio=0.05, min_lr_ratio=0.05),
        data=_data("reasoning", max_tokens=3072, max_tiles=120),
        num_steps=300,
    )


def mpo() -> TrainConfig:
    """Mixed Preference Optimization on pairs of the model's own replies."""
    return replace(
        reason(),
        name="nano-mpo",
        out_dir=f"{RUN}/7-mpo",
        model=f"{RUN}/6-reason/model",
        objective="preference",
        preference=PreferenceConfig(beta=BETA),
        optim=OptimConfig(name="muon", lr=5e-5, warmup_ratio=0.05, min_lr_ratio=0.05),
        data=replace(_data("questions", max_tokens=3072, max_tiles=120), mixture=f"{RUN}/pairs/pairs.jsonl"),
        num_steps=50,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "nano-language": language,
    "nano-vision": vision,
    "nano-stage1": stage1,
    "nano-stage1.5": stage15,
    "nano-stage2": stage2,
    "nano-reason": reason,
    "nano-mpo": mpo,
}
