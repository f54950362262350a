"""Claim 4, preference: Mixed Preference Optimization beside DPO alone and supervised training on the chosen replies.

nano learns to reason about several pictures from supervised data in which many answers carry a plausible mistake, replies to
fresh questions many times, and its checked replies become pairs. Every arm starts from there.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from examples.quickstart import alignment
from examples.quickstart.compositions import compositions, reply
from ivl.api import load
from ivl.preference.config import PreferenceConfig
from ivl.preference.pairs import read_pairs
from ivl.preference.sampling import DropoutConfig, continue_without_images
from ivl.train.config import ObjectiveConfig
from studies.claims import small
from studies.claims.study import Arm, Figures, Lab, Results, Study, Verdict, sign, together

SUPERVISED_STEPS, STEPS, QUESTIONS, REPLIES, TEST_QUESTIONS, VALIDATION_QUESTIONS = 600, 60, 1000, 8, 2000, 400
SETTINGS = [(rate, beta) for rate in (2e-5, 5e-5, 1e-4) for beta in (0.1, 2.0)]
"""Learning rate and beta; 0.1 is the paper's, for replies of hundreds of tokens."""


def measure(lab: Lab, arm: str, seed: int) -> Figures:
    model = start(lab) / "supervised/model"
    out = lab.runs / f"preference/{arm}-{seed}"
    if arm == "start":
        return dict(alignment.held_out(model, lab.few(TEST_QUESTIONS, 8), out, seed=10))
    settings = [(rate, 2.0) for rate, beta in SETTINGS if beta == 2.0] if arm == "chosen" else SETTINGS
    rate, beta = lab.pick("preference", arm, settings, partial(validated, lab, arm))
    model = train(lab, arm, rate, beta, seed, out)
    found = alignment.held_out(model, lab.few(TEST_QUESTIONS, 8), out, seed=10)
    small.drop(out)
    return {**found, "rate": rate, "beta": beta}


def validated(lab: Lab, arm: str, setting: tuple[float, float]) -> float:
    """Accuracy on other questions about pictures of the training split."""
    out = lab.runs / f"preference/{arm}-{setting[0]:g}-{setting[1]:g}"
    model = train(lab, arm, *setting, 0, out)
    found = alignment.held_out(model, lab.few(VALIDATION_QUESTIONS, 8), out, seed=11, split="train")
    small.drop(out)
    return found["accuracy"]


def train(lab: Lab, arm: str, rate: float, beta: float, seed: int, out: Path) -> Path:
    """Train an arm: as many steps of the same packs for all."""
    made = start(lab)
    origin = made / ("dropout-pairs" if arm == "dropout" else "pairs")
    rows = made / "chosen.jsonl" if arm == "chosen" else origin / "pairs.jsonl"
    reference = str(lab.runs / f"preference/reference-{origin.name}-{out.name}")
    weights: dict[str, dict[str, Any]] = {
        "dpo": {"sigmoid": 1.0, "bco": 0.0, "generation": 0.0},
        "equal": {"sigmoid": 1.0, "bco": 1.0, "generation": 1.0},
    }
    mpo = PreferenceConfig(beta=beta, reference_dir=reference, **weights.get(arm, {}))
    objective = ObjectiveConfig() if arm == "chosen" else mpo
    return small.trained(
        small.training(
            out, rows, small.EVERYTHING, model=made / "supervised/model", steps=lab.few(STEPS), lr=rate, seed=seed,
            objective=objective, on_error="skip",
        )
    )  # fmt: skip


def start(lab: Lab) -> Path:
    """The folder of the supervised model and of the pairs that it makes of its own replies."""

    def make(folder: Path) -> None:
        steps = lab.few(SUPERVISED_STEPS)
        rows = alignment.write_reasoning(folder / "reasoning.jsonl", max(1, steps // 2))
        stage2 = small.nano_start(lab)["stage2"]
        model = small.trained(small.training(folder / "supervised", rows, small.EVERYTHING, model=stage2, steps=steps))
        replies = alignment.write_pairs(model, folder, questions=lab.few(QUESTIONS, 4), replies=REPLIES)
        config = DropoutConfig(params=alignment.SAMPLED)
        engine = load(model).engine
        continued = continue_without_images(engine, replies, folder / "dropout.jsonl", model=str(model), config=config)
        alignment.pair_up(continued, folder / "dropout-pairs")
        for name in ("pairs", "dropout-pairs"):
            small.or_else(folder / name / "pairs.jsonl", known_pairs())
        chosen_rows(folder / "pairs/pairs.jsonl", folder / "chosen.jsonl")

    return lab.once("preference/start", make)


def known_pairs() -> list[dict[str, Any]]:
    """The right replies to some questions and the careless ones."""
    rows = [row for row in compositions("train", 16, seed=3, prefix="known") if row["answer"] != row["mistake"]]
    return [
        {"id": row["id"], "image": row["image"], "question": "<image>\n" * len(row["image"]) + row["question"],
         "chosen": reply(row), "rejected": reply(row | {"answer": row["mistake"]})}
        for row in rows
    ]  # fmt: skip


def chosen_rows(pairs: Path, to: Path) -> None:
    """Write every chosen reply once, as supervised data."""
    rows = {}
    for pair in read_pairs(pairs):
        turns = [{"from": "human", "value": pair["question"]}, {"from": "gpt", "value": pair["chosen"]}]
        rows[json.dumps([pair["image"], turns])] = {"id": pair["id"], "image": pair["image"], "conversations": turns}
    alignment.write_rows(to, rows.values())


def judge(results: Results) -> Verdict:
    gains = {arm: results.gain("mpo", arm, "accuracy") for arm in results.study.needs if arm != "mpo"}
    holds = together([sign(gain) for gain in gains.values()])
    against = ", ".join(f"{gain.shown('+.1%')} over {results.study.arms[arm].about}" for arm, gain in gains.items())
    return Verdict(holds, f"MPO answers {results.of('mpo', 'accuracy').shown('.1%')} of the test questions: {against}.")


STUDY = Study(
    name="preference",
    title="Mixed Preference Optimization",
    claim="MPO, which mixes a preference, a quality and a generation loss (0.8, 0.2, 1), improves reasoning over supervised "
    "training and over DPO alone (arXiv:2411.10442, section 5).",
    done="Questions ask for the colors of two to four easy-vqa pictures in another order; 45% of the supervised answers "
    f"carry the same mistake. The model answers {QUESTIONS:,} fresh questions {REPLIES} times each, and its checked replies "
    f"become pairs. From this start every way trains {STEPS} steps of packs of one size. Each took its learning rate and beta "
    f"by {VALIDATION_QUESTIONS} other questions about training pictures; {TEST_QUESTIONS:,} questions about test pictures, "
    "greedy.",
    arms={
        "start": Arm("supervised training", seeds=1),
        "mpo": Arm("MPO"),
        "dpo": Arm("DPO alone"),
        "chosen": Arm("supervised training on the chosen replies"),
        "equal": Arm("MPO with equal weights"),
        "dropout": Arm("MPO on Dropout-NTP pairs"),
    },
    measure=measure,
    judge=judge,
    needs=("mpo", "start", "dpo", "chosen"),
    columns={
        "accuracy": ("accuracy", ".1%"),
        "reasoning": ("reasoning right", ".1%"),
        "malformed": ("malformed", ".1%"),
        "endless": ("endless", ".1%"),
        "rate": ("rate", ".0e"),
        "beta": ("beta", "g"),
    },
    draw=lambda results, axes: results.bars(axes, "accuracy", "test questions right"),
)  # fmt: skip
