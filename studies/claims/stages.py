"""Claim 5: what stages 1, 1.5 and 2 each bring; each is left out once."""

from __future__ import annotations

import random
from pathlib import Path

from ivl.formats.rows import write_jsonl
from studies.claims import small
from studies.claims.study import Arm, Figures, Lab, Results, Study, Verdict, sign, together

TEST_PICTURES, SHARE = 250, 0.5
"""Pictures asked about, and the steps of this study as a share of those of the models that other studies start from."""
ARMS = {
    "all": small.STAGES,
    **{f"without-{name}": {k: v for k, v in small.STAGES.items() if k != name} for name in small.STAGES},
}


def measure(lab: Lab, arm: str, seed: int) -> Figures:
    """Train the stages of an arm; those that are left give their steps to the others, so that all arms cost the same."""
    given, out = small.data(lab), lab.runs / f"stages/{arm}-{seed}"
    total, own = (sum(steps for _, steps in stages.values()) for stages in (small.STAGES, ARMS[arm]))
    model: Path = small.nano_start(lab)["vision"]
    for name, (parts, steps) in ARMS[arm].items():
        lr = 1e-3 if parts == ("projector",) else 2e-3
        rows = given / "train-questions.jsonl"
        config = small.training(
            out / name, rows, parts, model=model, steps=lab.few(SHARE * steps * total / own), lr=lr, seed=seed
        )
        model = small.trained(config)
    questions = random.Random(7).sample(small.read(given / "test-questions.jsonl"), lab.few(TEST_PICTURES, 8))
    found = small.exact(model, write_jsonl(questions, out / "test.jsonl"))
    small.drop(out)
    return found


def judge(results: Results) -> Verdict:
    gains = {name: results.gain("all", f"without-{name}", "accuracy") for name in small.STAGES}
    said = ", ".join(f"{name} {gain.shown('+.1%')}" for name, gain in gains.items())
    holds = together([sign(gain) for gain in gains.values()])
    return Verdict(holds, f"What each stage brings to accuracy at the same number of steps: {said}.")


STUDY = Study(
    name="stages",
    title="Stages",
    claim="Stage 1 warms up the projector, stage 1.5 lets the ViT learn from the language model's loss, and stage 2 trains "
    "everything; each serves the next (section 3.2).",
    done="nano after the warm-ups of decoder and ViT learns easy-vqa by all three stages, and by two of them, which then "
    "take over the steps of the third. Accuracy is that of greedy replies to questions about 250 pictures of the test split.",
    arms={
        "all": Arm("stages 1, 1.5 and 2"),
        "without-stage1": Arm("without stage 1"),
        "without-stage1.5": Arm("without stage 1.5"),
        "without-stage2": Arm("without stage 2"),
    },
    measure=measure,
    judge=judge,
    needs=tuple(ARMS),
    columns={"accuracy": ("accuracy", ".1%")},
    draw=lambda results, axes: results.bars(axes, "accuracy", "test questions right"),
)  # fmt: skip
