"""The seven sizes of InternVL2.5: stages 1, 1.5 and 2, both fine-tunings and MPO, with the published settings
(arXiv:2412.05271, table 3, and its released scripts; arXiv:2411.10442 for MPO). InternVL3 and InternVL3.5, which had other
stages: both fine-tunings and MPO.

Each stage starts from the model that the stage before left in runs/; give --model for another. Stage 1 starts from parts:
`ivl compose --vit VIT --llm LLM runs/SIZE-parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ivl.checkpoint.releases import MODELS
from ivl.config import SIZES, LoraConfig, published_config
from ivl.data.config import DataConfig
from ivl.preference.config import PreferenceConfig
from ivl.runs.config import RunConfig
from ivl.train.config import OptimConfig, Stage, TrainConfig


@dataclass(frozen=True)
class _Size:
    """What differs between sizes. Stage 1 and 1.5 steps are the published tokens over 512 or 1,024 packs of 16,384."""

    weight_decay: float
    lr: float
    """Of stage 2 and fine-tuning; stages 1 and 1.5 have one rate for all sizes."""
    drop_path: float
    stage1_steps: int
    stage2_steps: int
    stage15_steps: int = 4_500


_SIZES = {
    "1B": _Size(0.01, 4e-5, 0.1, 22_800, 22_000),
    "2B": _Size(0.01, 4e-5, 0.1, 33_000, 22_000),
    "4B": _Size(0.01, 4e-5, 0.1, 19_600, 11_000),
    "8B": _Size(0.05, 4e-5, 0.1, 2_600, 5_500),
    "26B": _Size(0.05, 2e-5, 0.4, 3_700, 5_500, 8_700),
    "38B": _Size(0.05, 2e-5, 0.4, 12_800, 5_500),
    "78B": _Size(0.05, 2e-5, 0.4, 9_100, 5_500),
}


def stage1(size: str) -> RunConfig:
    """The projector learns while ViT and language model are frozen."""
    s = _SIZES[size]
    return RunConfig(
        name=f"{size}-stage1",
        model=f"runs/{size}-parts",
        architecture=published_config(size),
        stage=Stage(trainable=("projector",)),
        data=DataConfig(mixture="data/stage1.json", max_tokens=16384, max_tiles=48, averaging="square"),
        train=TrainConfig(
            # The cosine is shaped for 100,000 steps and stopped long before, so the rate hardly falls.
            optim=OptimConfig(lr=2e-4, weight_decay=s.weight_decay, warmup_steps=100, schedule_steps=100_000),
            num_steps=s.stage1_steps,
            packs_per_step=512,
            checkpointing=True,
            save_every=100,
        ),
        shard=size not in ("1B", "2B", "4B"),
        save_dtype="bfloat16",
    )


def stage15(size: str) -> RunConfig:
    """ViT and projector learn; published for 8B and 26B, whose ViTs the other sizes start from."""
    s, base = _SIZES[size], stage1(size)
    optim = replace(base.train.optim, lr=1e-5)
    return replace(
        base,
        name=f"{size}-stage1.5",
        model=f"{base.run_dir}/model",
        stage=Stage(trainable=("vision", "projector"), drop_path=s.drop_path),
        train=replace(base.train, optim=optim, num_steps=s.stage15_steps, packs_per_step=1024),
    )


def stage2(size: str) -> RunConfig:
    """Everything learns, on the instruction mixture."""
    s, base = _SIZES[size], stage1(size)
    optim = OptimConfig(lr=s.lr, weight_decay=s.weight_decay, warmup_ratio=0.03)
    return replace(
        base,
        name=f"{size}-stage2",
        model=f"{(stage15(size) if size in ('8B', '26B') else base).run_dir}/model",
        stage=Stage(trainable=("vision", "projector", "decoder"), drop_path=s.drop_path),
        data=replace(base.data, mixture="data/stage2.json"),
        train=replace(base.train, optim=optim, num_steps=s.stage2_steps),
    )


def finetune(size: str) -> RunConfig:
    """Projector and decoder learn on your own data, one epoch, 128 samples a step, token averaging.

    The published scripts keep drop path in the frozen ViT; here a frozen part runs in eval mode, without it.
    """
    s, base = _SIZES[size], stage1(size)
    optim = OptimConfig(lr=s.lr, weight_decay=s.weight_decay, warmup_ratio=0.03)
    return replace(
        base,
        name=f"{size}-finetune",
        model=f"OpenGVLab/InternVL2_5-{size}",
        stage=Stage(trainable=("projector", "decoder")),
        data=DataConfig(
            mixture="data/finetune.json", max_tokens=8192, max_samples=1, max_tiles_per_image=6, averaging="token", epochs=1
        ),
        train=replace(base.train, optim=optim, num_steps=None, packs_per_step=128, save_every=200, keep_last=1),
    )


def lora(size: str) -> RunConfig:
    """Rank 16 adapters on the decoder learn on your own data, one epoch, 16 samples a step."""
    base = finetune(size)
    return replace(
        base,
        name=f"{size}-lora",
        stage=Stage(trainable=()),
        lora=LoraConfig(rank=16, dropout=0.05),
        train=replace(base.train, packs_per_step=16),
    )


def mpo(size: str) -> RunConfig:
    """Mixed Preference Optimization on pairs of replies, one epoch, 256 or 512 pairs a step.

    A pack is one pair, as published, and holds two sequences of 8,192 tokens; to pack several, raise data.max_samples and
    lower packs_per_step. Rows that are no pair to learn from (equal or empty sides, turns out of order) are left out and
    counted. The published runs keep drop path in the policy, which then differs from its start; here it is off.
    """
    base = finetune(size)
    optim = OptimConfig(lr=1e-6, weight_decay=0.05, warmup_ratio=0.03)
    return replace(
        base,
        name=f"{size}-mpo",
        stage=Stage(trainable=("vision", "projector", "decoder")),
        objective=PreferenceConfig(),
        data=DataConfig(
            mixture="data/mmpr.json", max_tokens=2 * 8192, max_samples=1, averaging="token", epochs=1, on_error="skip"
        ),
        train=replace(base.train, optim=optim, packs_per_step=512 if size in ("38B", "78B") else 256),
    )


STAGES: dict[str, Callable[[str], RunConfig]] = {
    "stage1": stage1, "stage1.5": stage15, "stage2": stage2, "finetune": finetune, "lora": lora, "mpo": mpo,
}  # fmt: skip


def later(name: str, stage: str) -> RunConfig:
    """Fine-tuning, LoRA or MPO of InternVL3 or InternVL3.5, by InternVL3's scripts.

    InternVL3.5 has scripts of its own for MPO alone. How many rows the 9B has is not known, so its directory says it.
    """
    large, mpo_stage = name in ("3-38B", "3-78B"), stage == "mpo"
    base = STAGES[stage]("78B" if large else "26B" if name == "3.5-38B" else "1B")
    tokens = 16384 if not mpo_stage or name.startswith("3.5") else 8192 if large else 12288
    lr = 2e-7 if mpo_stage else 1e-5 if name.endswith("-1B") else 2e-5
    return replace(
        base,
        name=f"{name}-{stage}",
        model=MODELS[name].hub_id + ("-Instruct" if mpo_stage else ""),
        architecture=None if name == "3-9B" else MODELS[name].config,
        shard=name.split("-")[1] not in ("1B", "2B", "4B"),
        data=replace(
            base.data, max_tokens=(1 + mpo_stage) * tokens, max_tiles=max(48, tokens // 256), max_tiles_per_image=None
        ),
        train=replace(base.train, optim=replace(base.train.optim, lr=lr, weight_decay=0.05)),
    )  # fmt: skip


RECIPES = {f"{size}-{stage}": partial(make, size) for size in SIZES for stage, make in STAGES.items()}
RECIPES |= {
    f"{name}-{stage}": partial(later, name, stage)
    for name in MODELS
    for stage in ("finetune", "lora", "mpo")
    if name not in SIZES
}
