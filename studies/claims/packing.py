"""Claim 4, packing: samples that share one pass, without padding, make more of the processor's time."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivl.checkpoint import load_processor
from ivl.data.config import DataConfig
from ivl.data.loader import Loader
from studies.claims import descriptions, small
from studies.claims.study import Arm, Estimate, Figures, Lab, Results, Study, Verdict, sign, together

STEPS, SAMPLES_A_STEP, EVALUATIONS = 100, 32, 8


def measure(lab: Lab, arm: str, seed: int) -> Figures:
    """Train on short and long answers; every step of every arm has as many samples on average."""
    given, out = descriptions.data(lab), lab.runs / f"packing/{arm}-{seed}"
    steps = lab.few(STEPS)
    config = small.training(
        out, rows_of(given), small.EVERYTHING, model=descriptions.start(lab), steps=steps, seed=seed,
        max_samples=1 if arm == "alone" else SAMPLES_A_STEP, max_tokens=16_384, max_tiles=256,
    )  # fmt: skip
    packs = SAMPLES_A_STEP if arm == "alone" else 1
    config = replace(
        config, train=replace(config.train, packs_per_step=packs), val_every=max(1, steps // EVALUATIONS), val_packs=1,
        val_data=DataConfig(mixture=str(given / "test-descriptions.jsonl"), num_workers=0, max_tokens=8192, max_tiles=256),
    )  # fmt: skip
    began = time.process_time()
    small.trained(config)
    seconds = time.process_time() - began  # not of a clock: whatever else runs on the machine does not count
    rows = small.read(out / "metrics.jsonl")
    points = [
        {"step": row["step"], "seconds": seconds * row["step"] / steps, "loss": row["loss"]}
        for row in rows
        if "evaluation" in row
    ]
    tokens = sum(row["tokens"] for row in rows if "evaluation" not in row)
    small.drop(out)
    found = {"curve": points, "tokens_per_second": tokens / seconds, "loss": points[-1]["loss"]}
    return found | {"padding": padding(descriptions.start(lab), rows_of(given))}


def rows_of(given: Path) -> list[Path]:
    return [given / "descriptions.jsonl", given / "names.jsonl"]


def padding(model: Path, rows: list[Path]) -> float:
    """Share of padding if as many samples as a step has were padded to the longest of them, which ivl never does."""
    config = DataConfig(mixture=tuple(map(str, rows)), num_workers=0, max_samples=1)
    stream = iter(Loader(config, load_processor(model), seed=0))
    lengths = [len(next(stream).tokens_T) for _ in range(10 * SAMPLES_A_STEP)]
    batches = [lengths[at : at + SAMPLES_A_STEP] for at in range(0, len(lengths), SAMPLES_A_STEP)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def seconds_to(points: list[dict[str, float]], loss: float) -> float:
    """Seconds until the held-out loss is as low, at the first measurement that is."""
    return next((point["seconds"] for point in points if point["loss"] <= loss), points[-1]["seconds"])


def judge(results: Results) -> Verdict:
    pairs = list(zip(results.figures("packed"), results.figures("alone"), strict=True))
    pace = Estimate(tuple(p["tokens_per_second"] / a["tokens_per_second"] for p, a in pairs))
    common = [max(p["loss"], a["loss"]) for p, a in pairs]
    time_to = Estimate(tuple(
        seconds_to(a["curve"], loss) / seconds_to(p["curve"], loss) for (p, a), loss in zip(pairs, common, strict=True)
    ))  # fmt: skip
    gains = [Estimate(tuple(math.log(value) for value in each.values)) for each in (pace, time_to)]
    return Verdict(
        together([sign(gain) for gain in gains]),
        f"Packed, training takes {pace.shown('.2f')} times as many useful tokens a second as sample by sample, and reaches the "
        f"same loss {time_to.shown('.2f')} times as fast; padding to the longest would add "
        f"{results.of('packed', 'padding').mean:.0%} of useless tokens.",
    )


def draw(results: Results, axes: Any) -> None:
    for arm, color in {"packed": "#2ca02c", "alone": "#7f7f7f"}.items():
        for number, figures in enumerate(results.figures(arm)):
            points = figures["curve"]
            label = results.study.arms[arm].about if number == 0 else None
            axes.plot([p["seconds"] for p in points], [p["loss"] for p in points], color=color, label=label)
    axes.set(xlabel="processor seconds of training", ylabel="loss on held-out descriptions")
    axes.legend(fontsize=8)


STUDY = Study(
    name="packing",
    title="Data packing",
    claim="Packing samples into one sequence up to its limits raises the use of the hardware (section 3.3).",
    done=f"nano learns names and descriptions, short and long answers, {SAMPLES_A_STEP} samples a step: all of them in one "
    "pack, or each in a pass of its own. ivl has no padding in either; how much there would be is counted. Seconds are "
    "processor time of one core, validation included; the loss is that of held-out descriptions. Nothing was tuned.",
    arms={"packed": Arm("packed"), "alone": Arm("each sample in a pass of its own")},
    measure=measure,
    judge=judge,
    needs=("packed", "alone"),
    columns={
        "tokens_per_second": ("useful tokens a processor second", ",.0f"),
        "loss": ("loss at the end", ".3f"),
        "padding": ("would be padding", ".0%"),
    },
    draw=draw,
)  # fmt: skip
