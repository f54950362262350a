"""Every published recipe builds at full size on the meta device and trains exactly what it says."""

import subprocess
import sys

import pytest

from ivl.config import SIZES
from ivl.errors import InputError
from ivl.recipes import find
from ivl.recipes.published import RECIPES, STAGES
from ivl.runs.plan import build_empty, count_by_part

PARTS = {
    "stage1": ("projector",),
    "stage1.5": ("vision", "projector"),
    "stage2": ("vision", "projector", "decoder"),
    "finetune": ("projector", "decoder"),
    "lora": (),
    "mpo": ("vision", "projector", "decoder"),
}
# The published scripts: weight decay, stage 2 and fine-tuning rate, drop path, stage 2 steps, pairs of a step of MPO.
TABLE = {
    "1B": (0.01, 4e-5, 0.1, 22000, 256), "2B": (0.01, 4e-5, 0.1, 22000, 256), "4B": (0.01, 4e-5, 0.1, 11000, 256),
    "8B": (0.05, 4e-5, 0.1, 5500, 256), "26B": (0.05, 2e-5, 0.4, 5500, 256), "38B": (0.05, 2e-5, 0.4, 5500, 512),
    "78B": (0.05, 2e-5, 0.4, 5500, 512),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_builds_and_trains_what_it_says(size):
    for stage in STAGES:
        parts = count_by_part(build_empty(find(f"{size}-{stage}")))
        for part, (trained, frozen) in parts.items():
            assert bool(trained) == (part in PARTS[stage] or (stage == "lora" and part == "decoder"))
            assert bool(frozen) == (part not in PARTS[stage])
        total = sum(t + f for t, f in parts.values())
        adapters = parts["decoder"][0] if stage == "lora" else 0
        assert total - adapters == sum(t + f for t, f in count_by_part(build_empty(find(f"{size}-stage1"))).values())


@pytest.mark.parametrize("size", SIZES)
def test_settings_are_the_published_ones(size):
    decay, lr, drop_path, steps, pairs = TABLE[size]
    stage1, stage15, stage2, full, lora, mpo = (find(f"{size}-{stage}") for stage in STAGES)
    assert (stage1.train.optim.lr, stage1.train.packs_per_step, stage1.stage.drop_path) == (2e-4, 512, 0)
    assert (stage1.train.optim.warmup_steps, stage1.train.optim.schedule_steps) == (100, 100_000)
    assert (stage15.train.optim.lr, stage15.train.packs_per_step, stage15.stage.drop_path) == (1e-5, 1024, drop_path)
    assert (stage2.train.optim.lr, stage2.train.packs_per_step, stage2.stage.drop_path) == (lr, 512, drop_path)
    assert (stage2.train.num_steps, stage2.train.optim.warmup_ratio, stage2.train.optim.schedule_steps) == (steps, 0.03, None)
    assert (full.train.optim.lr, full.train.packs_per_step, lora.train.packs_per_step) == (lr, 128, 16)
    assert lora.lora is not None and (lora.lora.rank, lora.lora.scale, lora.lora.dropout) == (16, 2.0, 0.05)
    for config in (stage1, stage15, stage2):
        assert (config.data.max_tokens, config.data.max_tiles, config.data.averaging) == (16384, 48, "square")
        assert (config.train.save_every, config.train.keep_last) == (100, 3)
    for config in (full, lora):
        assert (config.data.max_tokens, config.data.max_tiles_per_image, config.data.epochs) == (8192, 6, 1)
    assert (mpo.train.optim.lr, mpo.train.optim.warmup_ratio, mpo.stage.drop_path, mpo.train.packs_per_step) == (
        1e-6,
        0.03,
        0,
        pairs,
    )
    assert (mpo.data.max_samples, mpo.data.max_tokens, mpo.data.max_tiles_per_image, mpo.data.epochs) == (1, 16384, None, 1)
    assert [config.data.on_error for config in (stage2, full, lora, mpo)] == ["refuse", "refuse", "refuse", "skip"]
    weights = mpo.objective
    assert (weights.sigmoid, weights.bco, weights.generation, weights.beta) == (0.8, 0.2, 1.0, 0.1)
    for config in (stage1, stage15, stage2, full, lora, mpo):
        optim = config.train.optim
        assert (optim.name, optim.betas, optim.eps, optim.clip) == ("adamw", (0.9, 0.999), 1e-8, 1.0)
        assert optim.weight_decay == (0.05 if config is mpo else decay)
        assert (optim.schedule, config.train.precision) == ("cosine", "bf16")


def test_stages_follow_each_other():
    assert find("8B-stage2").model == "runs/8B-stage1.5/model" and find("1B-stage2").model == "runs/1B-stage1/model"
    assert len(RECIPES) == 42 + 13 * 3


# The scripts of InternVL3 and of InternVL3.5: hub id, fine-tuning rate, tokens of a reply in MPO, pairs a step of MPO.
LATER = {
    "3-1B": ("OpenGVLab/InternVL3-1B", 1e-5, 12288, 256), "3-2B": ("OpenGVLab/InternVL3-2B", 2e-5, 12288, 256),
    "3-9B": ("OpenGVLab/InternVL3-9B", 2e-5, 12288, 256), "3-14B": ("OpenGVLab/InternVL3-14B", 2e-5, 12288, 256),
    "3-78B": ("OpenGVLab/InternVL3-78B", 2e-5, 8192, 512), "3.5-1B": ("OpenGVLab/InternVL3_5-1B", 1e-5, 16384, 256),
    "3.5-8B": ("OpenGVLab/InternVL3_5-8B", 2e-5, 16384, 256), "3.5-38B": ("OpenGVLab/InternVL3_5-38B", 2e-5, 16384, 256),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_later_releases_have_fine_tuning_and_mpo(name):
    hub_id, lr, mpo_tokens, pairs = LATER[name]
    full, lora, mpo = (find(f"{name}-{stage}") for stage in ("finetune", "lora", "mpo"))
    assert full.model == lora.model == hub_id and mpo.model == f"{hub_id}-Instruct"
    assert (full.train.optim.lr, full.train.optim.weight_decay, full.train.packs_per_step) == (lr, 0.05, 128)
    assert (full.data.max_tokens, full.data.max_tiles_per_image) == (16384, None) and full.stage.trainable == PARTS["finetune"]
    assert lora.lora is not None and (lora.lora.rank, lora.train.packs_per_step) == (16, 16)
    assert (mpo.train.optim.lr, mpo.data.max_tokens, mpo.train.packs_per_step) == (2e-7, 2 * mpo_tokens, pairs)
    assert mpo.stage.trainable == PARTS["mpo"]
    if name != "3-9B":  # its rows are not known, so its directory says what it is
        assert set(count_by_part(build_empty(lora))) == {"vision", "projector", "decoder"}
    with pytest.raises(InputError, match="unknown recipe"):
        find(f"{name}-stage2")


def test_unknown_recipe_names_its_neighbors():
    with pytest.raises(InputError, match="did you mean 78B-stage1"):
        find("78B-stage-1")


def test_listing_recipes_needs_no_torch():
    code = "import sys; from ivl.cli.train import train; train([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
