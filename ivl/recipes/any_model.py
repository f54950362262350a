"""Train any model on rows of one's own: the published settings of the size that is nearest to it, fitted to model and data."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import cast

from ivl.checkpoint import load_config, resolve
from ivl.checkpoint.releases import MODELS
from ivl.config import SIZES, ModelConfig
from ivl.data.mixture import Mixture, load_mixture
from ivl.formats.rows import RowFormat
from ivl.recipes import published
from ivl.runs.config import RunConfig

MIN_STEPS = 32
"""Steps that an epoch has at least: of few rows the published batch would leave fewer, and a step takes fewer rows instead."""

LINES, VALIDATIONS, STEPS_BETWEEN = 20, 10, 10
"""Lines on the console of a run, validation losses if there are rows for them, and the fewest steps between two of these."""


def unknown_model(stage: str) -> RunConfig:
    """The configuration before model and data are known, for `--help`."""
    base = published.STAGES[stage]("1B")
    return replace(
        base,
        name=f"{stage} --model DIR_OR_HUB_ID --data ROWS ...",
        model="MODEL",
        architecture=None,
        data=replace(base.data, mixture="ROWS"),
    )


def any_model(
    stage: str,
    model: str,
    data: tuple[str, ...],
    *,
    format: str | None = None,
    val_share: float = 0.0,
    epochs: int | None = None,
    num_steps: int | None = None,
    packs_per_step: int | None = None,
    lr: float | None = None,
) -> tuple[RunConfig, str]:
    """Make the configuration of a run, and say what was chosen.

    Args:
        stage: `finetune`, `lora`, or `mpo` whose rows are preference pairs.
        model: a directory or a hub id. Architecture, tokenizer and template are its own.
        data: files and folders of rows, and mixtures.
        format: the format of all rows; None looks.
        val_share: share of the rows that is not trained on. The caller sets it in the configuration.
        epochs: passes over the rows; None makes one, or as many as `num_steps` take.
        num_steps: steps after which the run ends, or earlier where `epochs` end.
        packs_per_step: rows of a step; None takes the published number, or fewer where an epoch would have too few steps.
        lr: learning rate; None takes the published one.

    Raises:
        InputError: if the model's configuration cannot be read, or a file of rows.
    """
    architecture = load_config(resolve(model))
    size = _nearest(architecture)
    base = published.RECIPES[f"{size}-{stage}"]()
    specs = load_mixture(data, format=cast(RowFormat | None, format))
    num_rows = len(Mixture(specs, seed=0))
    rows = len(Mixture(specs, seed=0, val_share=val_share)) if val_share else num_rows
    published_packs, ranks = base.train.packs_per_step, int(os.environ.get("WORLD_SIZE", "1"))
    packs = min(published_packs, 2 ** int(math.log2(max(1, rows / MIN_STEPS))))
    packs = packs_per_step or -(-packs // ranks) * ranks
    sequences = 2 if stage == "mpo" else 1
    max_tokens = sequences * min(base.data.max_tokens // sequences, architecture.decoder.max_positions)
    steps = -(-rows // packs)
    epochs = epochs or (None if num_steps else 1)
    total = int(min(num_steps or math.inf, steps * (epochs or math.inf)))
    optim = replace(base.train.optim, lr=lr) if lr else base.train.optim
    config = replace(
        base,
        name=f"{_name(model)}-{stage}",
        model=model,
        architecture=None,
        data=replace(
            base.data, mixture=data[0] if len(data) == 1 else data, max_tokens=max_tokens,
            max_tiles=max(base.data.max_tiles, max_tokens // architecture.tokens_per_tile),
            over_budget="refuse" if stage == "mpo" else "truncate", epochs=epochs,
        ),
        train=replace(
            base.train, optim=optim, num_steps=num_steps, packs_per_step=packs, precision="auto",
            log_every=max(1, -(-total // LINES)),
        ),
        keep_best=True,
        val_every=max(STEPS_BETWEEN, -(-total // VALIDATIONS)),
    )  # fmt: skip
    kept = f" and {num_rows - rows:,} for validation" if val_share else ""
    chosen = (
        f"{config.name}: published settings of {size}; {rows:,} rows{kept}, {packs} a step (published {published_packs}), "
        f"{steps:,} steps an epoch; lr {optim.lr:g}"
    )
    return config, chosen


def _nearest(architecture: ModelConfig) -> str:
    """Return the published size, of the same release if there is one, whose decoder is nearest in the number of parameters."""
    # Layers hold about num_layers * width^2 parameters, up to a factor that is much the same in all sizes.
    decoder = architecture.decoder
    others = {size: model.config.decoder for size, model in MODELS.items()}
    kind = (decoder.family, decoder.rope_dynamic_factor)  # what tells the decoders of a later release
    later = [s for s, other in others.items() if s not in SIZES and (other.family, other.rope_dynamic_factor) == kind]
    scales = {size: others[size].num_layers * others[size].width ** 2 for size in later or SIZES}
    own = decoder.num_layers * decoder.width**2
    return min(scales, key=lambda size: abs(math.log(scales[size] / own)))


def _name(model: str) -> str:
    """Name a model by its directory; the run's where that is called `model`."""
    pieces = [piece for piece in Path(model).absolute().parts if piece != "model"]
    return re.sub(r"[^\w.-]+", "-", pieces[-1])
