"""Claim 1: a ViT trained beside a small language model moves to a larger one, which then needs a fraction of the data."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from examples.real_parts.parts import settle, smollm2
from ivl.checkpoint.compose import compose
from ivl.formats.rows import write_jsonl
from ivl.runs.config import RunConfig
from ivl.train.config import TrainablePart
from studies.claims import small
from studies.claims.study import Arm, Estimate, Figures, Lab, Results, Study, Verdict

POINTS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the training rows after which accuracy is measured."""
PICTURES, QUESTIONS_A_PICTURE, TEST_PICTURES = 1400, 5, 160
PROJECTOR_UNTIL = 1 / 32
"""Share of the rows that train the projector alone in the arm that then trains the decoder, too."""
RATES = (5e-4, 1e-3, 2e-3)
WIDE: dict[str, int] = {"width": 320, "num_layers": 8, "mlp_width": 896, "num_heads": 10, "num_kv_heads": 2}
PICKED_AT, REAL_SHARE, REAL_RATE = 1 / 16, 1 / 16, 1e-3
"""Shares of the rows by which learning rates are picked, and beside the real language model, whose rate is not picked."""
MOVED = ("projector", "moved", "real-moved")


def measure(lab: Lab, arm: str, seed: int) -> Figures:
    out = lab.runs / f"scaling/{arm}-{seed}"
    if arm.startswith("real"):
        return curve(lab, arm, seed, REAL_RATE, out, until=REAL_SHARE)
    return curve(lab, arm, seed, lab.pick("scaling", arm, RATES, partial(validated, lab, arm)), out)


def validated(lab: Lab, arm: str, rate: float) -> float:
    """Accuracy on held-out pictures after a part of the rows."""
    found = curve(lab, arm, 0, rate, lab.runs / f"scaling/{arm}-{rate:g}", until=PICKED_AT, split="validation")
    return found["curve"][-1]["accuracy"]


def curve(lab: Lab, arm: str, seed: int, rate: float, out: Path, until: float = 1.0, split: str = "test") -> Figures:
    """Train an arm part by part and measure it after each.

    Every part is a run with a cosine of its own, twice as long as the one before (SGDR, arXiv:1608.03983): so each point is at
    the end of a schedule, and all lie on one training. An arm that was interrupted begins anew, for its time is measured.
    """
    small.drop(out)
    model = start(lab, arm, seed)
    test = some_rows(small.data(lab) / f"{split}-questions.jsonl", lab.few(TEST_PICTURES, 8), QUESTIONS_A_PICTURE, seed=7)
    rows = some_rows(
        small.data(lab) / "train-questions.jsonl", lab.few(PICTURES, round(1 / POINTS[0])), QUESTIONS_A_PICTURE, seed=seed
    )
    done, points = 0, [{"rows": 0, "seconds": 0.0, "flops": 0.0}]
    write_jsonl(test, out / "test.jsonl")
    for share in POINTS:
        if share > until:
            break
        part, done = rows[done : round(share * len(rows))], round(share * len(rows))
        write_jsonl(part, out / f"{share:.4f}.jsonl")
        began = time.process_time()
        config = small.training(
            out / f"{share:.4f}", out / f"{share:.4f}.jsonl", trainable(arm, share), model=model, optimizer="adamw",
            lr=rate, seed=seed, max_tokens=small.PACK_TOKENS // 3,
        )  # fmt: skip
        model = small.trained(config)
        seconds = time.process_time() - began
        flops = small.flops_per_token(config) * small.last_step(config)["total_tokens"]
        last = points[-1]
        found = small.exact(model, out / "test.jsonl") if split == "test" or share == until else {}
        points.append({
            "rows": done * QUESTIONS_A_PICTURE, "seconds": last["seconds"] + seconds, "flops": last["flops"] + flops, **found,
        })  # fmt: skip
    figures: Figures = {"curve": points[1:], "rate": rate, "accuracy": points[-1]["accuracy"]}
    if arm in MOVED:
        figures["shuffled"] = small.exact(model, write_jsonl(shuffled(test), out / "shuffled.jsonl"))["accuracy"]
    small.drop(out)
    return figures


def trainable(arm: str, share: float) -> tuple[TrainablePart, ...]:
    """What an arm trains on the rows up to a share of all."""
    if arm in ("random", "warmed"):
        return small.EVERYTHING
    if arm == "projector" or arm.startswith("real") or share <= PROJECTOR_UNTIL:
        return ("projector",)
    return ("projector", "decoder")


def start(lab: Lab, arm: str, seed: int) -> Path:
    """The model that an arm starts from: a ViT, a fresh projector, and a language model that has read texts alone."""
    stage = {"random": "", "real-random": "", "warmed": "vision"}.get(arm, "stage1.5")
    vit = small.nano_start(lab)[stage] if stage else untrained(lab, seed)
    llm = smollm2() if arm.startswith("real") else lab.once("wide", lambda out: small.trained(wide(lab, out))) / "model"

    def make(out: Path) -> None:
        compose(vit, llm, None, out / "joined", seed=seed, force=True)
        if arm.startswith("real"):
            settle(out / "joined")

    return lab.once(f"scaling/start-{arm}-{seed}", make) / "joined"


def untrained(lab: Lab, seed: int) -> Path:
    """A ViT of random weights, with the decoder that it came with."""
    return lab.once(f"untrained-{seed}", lambda out: small.untrained(out / "model", small.data(lab), seed)) / "model"


def wide(lab: Lab, out: Path) -> RunConfig:
    """The larger decoder's warm-up on text alone."""
    return small.language(out, small.data(lab), lab.few(150), **WIDE)


def some_rows(path: Path, pictures: int, questions: int, *, seed: int) -> list[dict[str, Any]]:
    """Some pictures of a file, each with some of its questions."""
    rng = random.Random(seed)
    rows = small.read(path)
    rows = rng.sample(rows, min(pictures, len(rows)))
    return [
        row | {"conversations": rng.sample(row["conversations"], min(questions, len(row["conversations"])))} for row in rows
    ]


def shuffled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same questions and answers, each about the picture of another row."""
    return [row | {"image": other["image"]} for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]


def needed(points: Sequence[dict[str, float]], accuracy: float, axis: str) -> float:
    """Rows, seconds or operations until an accuracy is reached, between two points by their logarithms; infinite if never."""
    for before, after in zip([None, *points[:-1]], points, strict=True):
        if after["accuracy"] >= accuracy:
            if before is None:
                return after[axis]
            part = (accuracy - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return math.exp(math.log(before[axis]) * (1 - part) + math.log(after[axis]) * part)
    return math.inf


def ratios(results: Results, base: str, axis: str) -> Estimate:
    """Of every seed, what the moved ViT needs for the base's final accuracy, as a share of what the base needed: its logarithm,
    whose mean and interval suit a ratio."""
    pairs = zip(results.figures("moved"), results.figures(base), strict=True)
    return Estimate(tuple(math.log(needed(m["curve"], b["accuracy"], axis) / b["curve"][-1][axis]) for m, b in pairs))


def share(logs: Estimate) -> str:
    """Format a ratio and its interval, which is not known of a single seed."""
    mean, low, high = (math.exp(logs.mean + part) for part in (0, -logs.half, logs.half))
    return f"{mean:.1%}" if math.isnan(logs.half) else f"{mean:.1%} ({low:.1%} to {high:.1%})"


def judge(results: Results) -> Verdict:
    rows, seconds, flops = (ratios(results, "random", axis) for axis in ("rows", "seconds", "flops"))
    if math.inf in rows.values:
        return Verdict("does not hold here", "In some seed the moved ViT stays below the accuracy of training from nothing.")
    few = rows.mean <= math.log(0.1) and seconds.mean <= math.log(0.2)
    holds = "holds" if few else "holds in part" if rows.mean < 0 else "does not hold here"
    said = (
        "With the moved ViT the larger model reaches the final accuracy of training everything from nothing with "
        f"{share(rows)} of its rows, {share(seconds)} of its processor time and {share(flops)} of its operations"
    )
    if len(results.rows["warmed"]) == len(results.rows["moved"]):
        against = ratios(results, "warmed", "rows").mean
        shown = f"{math.exp(against):.0%} of the rows" if math.isfinite(against) else "no number of rows that was tried"
        said += f"; that of a ViT that was warmed up on its own with {shown}"
    ends, blind = results.of("random", "accuracy"), results.of("moved", "shuffled")
    guessed = blind.shown(".1%")
    said += f". From nothing it ends at {ends.shown('.1%')}; features of other pictures give the moved ViT's {guessed}"
    return Verdict(holds, f"{said}.")


def draw(results: Results, axes: Any) -> None:
    colors = {"moved": "#2ca02c", "projector": "#98df8a", "warmed": "#1f77b4", "random": "#7f7f7f"}
    titles = {"rows": "training questions", "seconds": "seconds of one core", "flops": "operations"}
    for panel, (axis, title) in zip(axes, titles.items(), strict=True):
        for arm, color in (colors | {"real-moved": "#d62728", "real-random": "#ff9896"}).items():
            for number, figures in enumerate(results.figures(arm)):
                points = figures["curve"]
                label = None if number else results.study.arms[arm].about.removesuffix(", projector only, 1/16 of the rows")
                values = [point["accuracy"] for point in points]
                panel.plot([point[axis] for point in points], values, "o-", color=color, markersize=3, label=label)
        panel.set(xscale="log", xlabel=title)
        panel.xaxis.set_major_formatter("{x:g}")
        for figures in results.figures("moved"):
            panel.axhline(figures["shuffled"], color="#333", linestyle=":", linewidth=0.8)
    axes[0].set_ylabel("test questions right (dotted: of other pictures)")
    axes[0].legend(fontsize=6)


STUDY = Study(
    name="scaling",
    title="Progressive scaling",
    claim="A ViT that was trained beside a small language model serves a larger one, which then needs a fraction of the data "
    "(section 3.2: the 78B saw about 120 billion tokens, Qwen2-VL 1.4 trillion).",
    done="nano's ViT, trained beside its decoder of 1 M parameters through stage 1.5, moves by `ivl compose` to a decoder of "
    "9.5 M that has read descriptions in words only. Accuracy is that of greedy replies to 800 questions of easy-vqa's "
    "official test split. Each arm takes one of three learning rates, by held-out pictures of the training split.",
    arms={
        "random": Arm("ViT from random weights, everything trained"),
        "moved": Arm("moved ViT, projector then decoder"),
        "warmed": Arm("ViT that has learned to name pictures on its own, everything trained"),
        "projector": Arm("moved ViT, projector only"),
        "real-moved": Arm("moved ViT beside SmolLM2-135M-Instruct, projector only, 1/16 of the rows", seeds=1),
        "real-random": Arm("random ViT beside SmolLM2-135M-Instruct, projector only, 1/16 of the rows", seeds=1),
    },
    measure=measure,
    judge=judge,
    needs=("moved", "random"),
    columns={"accuracy": ("accuracy after all rows", ".1%"), "shuffled": ("features of other pictures", ".1%")},
    draw=draw,
    panels=3,
)  # fmt: skip
